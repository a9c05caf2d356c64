"""How much slower or faster the real engine runs than its coefficients say, from the requests that end.

While a request decoded, its replica did some work (`state.WORK`), which the coefficients turn into seconds; reality
took as long as the request's record says. The ratio of both, with exponential forgetting, is the pace.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.settings import COEFFICIENTS, StepTime

SLOWEST, FASTEST = 5.0, 0.2  # bounds of the factor on every step time
MEMORY_SECONDS = 3.0
# What the coefficients themselves weigh against observation, seconds of decoding.
_PRIOR_SECONDS = 1.0


class Pace:
    """Tracks the pace of a pool whose coefficients are `step_time`."""

    def __init__(self, step_time: StepTime, memory_seconds: float = MEMORY_SECONDS) -> None:
        self.factor = 1.0
        self._coefficients = step_time.coefficients()
        self._memory_seconds = memory_seconds
        self._real = self._modelled = 0.0
        self._time = -math.inf

    def observe(self, time_seconds: float, decode_seconds: float, decode_work: npt.NDArray[np.float64]) -> None:
        """A request ended at `time_seconds`: it decoded for so long, while its replica did this work."""
        modelled = float(self._coefficients @ decode_work)
        if not (math.isfinite(modelled) and modelled > 0.0 and decode_seconds > 0.0):
            return
        keep = math.exp(-max(0.0, time_seconds - self._time) / self._memory_seconds)
        self._time = max(self._time, time_seconds)
        self._real = self._real * keep + decode_seconds
        self._modelled = self._modelled * keep + modelled
        ratio = (self._real + _PRIOR_SECONDS) / (self._modelled + _PRIOR_SECONDS)
        self.factor = min(SLOWEST, max(FASTEST, ratio))

    def save(self) -> list[float]:
        """As JSON types."""
        return [self.factor, self._real, self._modelled, self._time]

    def restore(self, saved: list[float]) -> None:
        """What `save` gave."""
        self.factor, self._real, self._modelled, self._time = saved

    def apply(self, fleet: Fleet, factor: float | None = None) -> None:
        """Let every step of the fleet last `factor` times what the coefficients say (default: the pace)."""
        scaled = self._coefficients * (self.factor if factor is None else factor)
        for name, value in zip(COEFFICIENTS, scaled, strict=True):
            fleet.state.engines[name] = value
