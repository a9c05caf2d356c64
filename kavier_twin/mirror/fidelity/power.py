"""The watts that GPUs draw beside those of the mirrored fleet, and its power model fitted to them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from kavier_twin.mirror.calibration.power import ObservedPower, calibrate_power
from kavier_twin.mirror.calibration.requests import CalibrationError
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.footprint import PowerModel
from kavier_twin.simulation.power import Reading, energy, phase_seconds
from kavier_twin.telemetry import GpuSample

STRETCH_SECONDS: Final = 30.0  # of event time; longer than most scrape intervals
KEPT_STRETCHES: Final = 240  # two hours: fitted to, the older ones forgotten
SHOWN_STRETCHES: Final = 20  # the last ten minutes
CALIBRATE_EVERY_STRETCHES: Final = 10
MAX_PENDING_SAMPLES: Final = 50_000


class Stretch(NamedTuple):
    """A stretch of time: mean watts of a GPU as measured and as mirrored, and the mirror's shares of time (0..1)."""

    observed_watts: float
    mirrored_watts: float  # by the model in use then
    computing: float
    reading: float


class PowerWatch:
    """Follows GPU samples up to where the mirror stands. A fleet without a footprint has no watts to compare.

    A MIG instance's sample tells the watts of the whole card, of which others use their part: it is passed over.
    """

    def __init__(self) -> None:
        self.stretches: deque[Stretch] = deque(maxlen=KEPT_STRETCHES)
        self.calibrations = 0
        self._power: PowerModel | None = None  # as fitted
        self._pending: deque[tuple[float, float]] = deque(maxlen=MAX_PENDING_SAMPLES)  # time, watts
        self._newest_seconds = -math.inf
        self._since_fit = 0  # stretches
        self._readings: deque[Reading] = deque(maxlen=KEPT_STRETCHES)  # the first begins the next stretch

    def take(self, sample: GpuSample) -> None:
        """Take in a sample."""
        if sample.power_watts is not None and not sample.mig_instance:
            self._pending.append((sample.time_seconds, sample.power_watts))
            self._newest_seconds = max(self._newest_seconds, sample.time_seconds)

    def follow(self, fleet: Fleet) -> None:
        """Catch up with the mirrored fleet; its power model is the fitted one from the first fit on."""
        now = fleet.now_seconds
        if fleet.settings.footprint is None:
            return
        if self._power is not None and fleet.settings.footprint.power != self._power:
            self._use(fleet, self._power)
        if math.isfinite(self._newest_seconds) and (
            not self._readings or now >= self._readings[-1].time_seconds + STRETCH_SECONDS
        ):
            self._readings.append(Reading.of(fleet.state, now))
        while len(self._readings) > 1 and self._readings[1].time_seconds <= self._newest_seconds:
            before = self._readings.popleft()
            self._compare(fleet, before, self._readings[0])

    def means(self) -> tuple[float, float]:
        """Mirrored and observed mean watts of a GPU over the last minutes; NaN where nothing was measured."""
        last = list(self.stretches)[-SHOWN_STRETCHES:]
        if not last:
            return math.nan, math.nan
        return _mean([s.mirrored_watts for s in last]), _mean([s.observed_watts for s in last])

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "stretches": list(self.stretches),
            "calibrations": self.calibrations,
            "since_fit": self._since_fit,
            "power": self._power and self._power.model_dump(),
            "pending": list(self._pending),
            "newest_seconds": self._newest_seconds,
            "readings": [
                [*reading[:1], reading.work.tolist(), *reading[2:4], reading.seconds_per_work.tolist()]
                for reading in self._readings
            ],
        }

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> PowerWatch:
        """What `save` gave."""
        watch = cls()
        watch.stretches.extend(Stretch(*values) for values in saved["stretches"])
        watch.calibrations, watch._since_fit = saved["calibrations"], saved["since_fit"]
        watch._power = PowerModel.model_validate(saved["power"]) if saved["power"] else None
        watch._pending.extend((time, watts) for time, watts in saved["pending"])
        watch._newest_seconds = saved["newest_seconds"]
        for time, work, busy, alive, seconds_per_work in saved["readings"]:
            watch._readings.append(Reading(time, np.array(work), busy, alive, np.array(seconds_per_work)))
        return watch

    def _compare(self, fleet: Fleet, before: Reading, after: Reading) -> None:
        watts = []
        kept = []
        for time, value in self._pending:
            if time > after.time_seconds:
                kept.append((time, value))
            elif time > before.time_seconds:
                watts.append(value)
        self._pending = deque(kept, maxlen=MAX_PENDING_SAMPLES)
        alive = after.alive_seconds - before.alive_seconds
        footprint = fleet.settings.footprint
        if not watts or alive <= 0.0 or footprint is None:
            return
        phases = phase_seconds(before, after, fleet.settings.step_time)
        mirrored = sum(energy(footprint.power, alive, phases)) / alive
        computing, reading = (phases.prefill + phases.decode) / alive, phases.reading / alive
        self.stretches.append(Stretch(_mean(watts), mirrored, computing, reading))
        self._since_fit += 1
        if self._since_fit >= CALIBRATE_EVERY_STRETCHES:
            self._since_fit = 0
            self._calibrate(fleet, footprint.power)

    def _calibrate(self, fleet: Fleet, prior: PowerModel) -> None:
        columns = np.array(self.stretches, np.float64).T
        try:
            found = calibrate_power(prior, ObservedPower(columns[0], columns[2], columns[3]))
        except CalibrationError:
            return
        self.calibrations += 1
        self._power = found.power
        self._use(fleet, found.power)

    def _use(self, fleet: Fleet, power: PowerModel) -> None:
        footprint = fleet.settings.footprint
        if footprint is not None:
            changed = footprint.model_copy(update={"power": power})
            fleet.settings = fleet.settings.model_copy(update={"footprint": changed})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
