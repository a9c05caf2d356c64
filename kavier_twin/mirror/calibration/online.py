"""Calibration as the stream goes on: step times follow the fleet, from the requests that the mirror saw end.

The mirror has simulated every request in the batches it ran in, so the work its replica did for it (`state.WORK`) is
there when its durations become known: nothing is simulated again. Rows of work and seconds are fitted now and then
(`fit`), each counting less the older it is, and what the rows do not tell stays where the last fit left it.

A jump of the fleet's speed is told from its noise by a two-sided CUSUM (Page 1954) on the logarithm of observed over
predicted decoding time, a value for each few seconds because requests of one batch err together. It makes calibration
forget what was before, and start from the coefficients times the jump.
"""

from __future__ import annotations

import math
from collections import deque
from copy import copy, deepcopy
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.mirror.calibration.fit import fit
from kavier_twin.mirror.calibration.requests import FRONTEND, MINIMUM_REQUESTS, Calibration, at_least, named
from kavier_twin.simulation.settings import COEFFICIENTS, StepTime

Floats = npt.NDArray[np.float64]

MEMORY_SECONDS: Final = 120.0  # after which a row counts 1 / e
MEMORY_REQUESTS: Final = 100  # but so many rows always count as much as that
KEPT_ROWS: Final = 1_000
_APART_SECONDS: Final = 3 * MEMORY_SECONDS / KEPT_ROWS  # between rows of a pool with many requests, on average
# What of a prefill's wait is the queue is simulated, not known: only waits shorter than most prefills are used. It is
# the simulated wait alone that decides: chosen by the observed one, what is left would be biased.
_CALM_QUANTILE: Final = 0.1

BLOCK_SECONDS: Final = 5.0
_BLOCK_REQUESTS: Final = 3
# In deviations of a block: half the shift to be found, and the sum that tells it. A false alarm then comes once in
# more than 10,000 blocks of independent noise (Siegmund's approximation of the run length).
_SLACK: Final = 1.0
_ALARM: Final = 5.0
_SMALLEST_DEVIATION: Final = 0.03
_FIRST_DEVIATION: Final = 0.1
_DEVIATION_BLOCKS: Final = 20.0
_CLIPPED_DEVIATIONS: Final = 3.0


class Row(NamedTuple):
    """A request that ended: the work done for it and what it took. Seconds; work in units of `COEFFICIENTS`."""

    time: float
    wait: float  # simulated, from the engine's queue to its first step
    ttft: float
    decode: float
    prefill_work: tuple[float, ...]
    decode_work: tuple[float, ...]


class Change(NamedTuple):
    """The fleet's speed changed: durations are `ratio` times what they were, since about `since_seconds`."""

    since_seconds: float
    ratio: float


class Online:
    """Rows of the requests that ended lately, and watch over the speed they show."""

    def __init__(self) -> None:
        self._rows: deque[Row] = deque(maxlen=KEPT_ROWS)
        self._cusum = Cusum()

    def fork(self) -> Online:
        """An independent copy."""
        twin = copy(self)
        twin._rows, twin._cusum = self._rows.copy(), deepcopy(self._cusum)
        return twin

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {"rows": list(self._rows), "cusum": self._cusum.save()}

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        for time, wait, ttft, decode, prefill_work, decode_work in saved["rows"]:
            self._rows.append(Row(time, wait, ttft, decode, tuple(prefill_work), tuple(decode_work)))
        self._cusum.restore(saved["cusum"])

    def observe(self, row: Row, step_time: StepTime) -> Change | None:
        """A request ended that was simulated with these coefficients. Returns a change of speed that it tells."""
        if not all(map(math.isfinite, (row.wait, row.ttft, row.decode, *row.prefill_work, *row.decode_work))):
            return None
        if len(self._rows) < 10 or row.time - self._rows[-10].time >= 10 * _APART_SECONDS:
            self._rows.append(row)
        modelled = float(step_time.coefficients() @ np.array(row.decode_work))
        change = self._cusum.observe(row.time, row.decode, modelled)
        if change is not None:
            self._rows = deque((kept for kept in self._rows if kept.time >= change.since_seconds), maxlen=KEPT_ROWS)
        return change

    def fit(self, step_time: StepTime, frontend_seconds: float, floor: StepTime | None) -> Calibration | None:
        """Coefficients from the rows, starting from those in use; None with fewer than MINIMUM_REQUESTS."""
        if len(self._rows) < MINIMUM_REQUESTS:
            return None
        time, wait, ttft, decode = (np.array(column) for column in list(zip(*self._rows, strict=True))[:4])
        prefill_work = np.array([row.prefill_work for row in self._rows])
        decode_work = np.array([row.decode_work for row in self._rows])
        memory = max(MEMORY_SECONDS, time[-1] - time[max(-MEMORY_REQUESTS, -time.size)])
        counts = np.exp((time - time[-1]) / memory)
        calm = wait <= max(np.quantile(ttft, _CALM_QUANTILE), np.quantile(wait, 0.5))
        decodes = decode > 0.0
        found = fit(
            np.vstack(
                [
                    np.column_stack([decode_work[decodes], np.zeros(int(decodes.sum()))]),
                    np.column_stack([prefill_work[calm], np.ones(int(calm.sum()))]),
                ]
            ),
            np.concatenate([decode[decodes], np.maximum(ttft - wait, 0.0)[calm]]),
            prior=np.append(step_time.coefficients(), max(frontend_seconds, 1e-6)),
            floor=at_least(floor),
            weights=np.concatenate([counts[decodes], counts[calm]]),
        )
        values = found.values.copy()
        # The frontend's time is what makes mean TTFTs agree.
        rest = ttft - wait - prefill_work @ values[:-1]
        values[-1] = max(0.0, float((counts * rest)[calm].sum() / counts[calm].sum()))
        predicted_ttft = wait + prefill_work @ values[:-1] + values[-1]
        predicted_e2e = predicted_ttft + decode_work @ values[:-1]
        return Calibration(
            step_time=step_time.with_coefficients(values[: len(COEFFICIENTS)]),
            frontend_seconds=float(values[-1]),
            requests=len(self._rows),
            mean_ttft_ratio=float(predicted_ttft.mean() / ttft.mean()),
            mean_e2e_ratio=float(predicted_e2e.mean() / (ttft + decode).mean()),
            coefficients=named(found, values, (*COEFFICIENTS, FRONTEND), step_time),
        )


class _Side:
    """One of the two sums, and what was observed and modelled since it left zero."""

    def __init__(self) -> None:
        self.total, self.since_seconds, self.observed, self.modelled = 0.0, -math.inf, 0.0, 0.0

    def take(self, deviations: float, block_seconds: float, observed: float, modelled: float) -> Change | None:
        if self.total == 0.0:
            self.since_seconds, self.observed, self.modelled = block_seconds, 0.0, 0.0
        self.total = max(0.0, self.total + deviations - _SLACK)
        self.observed += observed
        self.modelled += modelled
        return Change(self.since_seconds, self.observed / self.modelled) if self.total > _ALARM else None


class Cusum:
    """Watches the logarithm of observed over modelled time, by blocks of some seconds."""

    def __init__(self) -> None:
        self._block = -math.inf  # when it began
        self._requests, self._observed, self._modelled = 0, 0.0, 0.0
        self._variance = _FIRST_DEVIATION**2
        self._slower, self._faster = _Side(), _Side()

    def save(self) -> list[Any]:
        """As JSON types."""
        own = [self._block, self._requests, self._observed, self._modelled, self._variance]
        return [own, list(vars(self._slower).values()), list(vars(self._faster).values())]

    def restore(self, saved: list[Any]) -> None:
        """What `save` gave."""
        (self._block, self._requests, self._observed, self._modelled, self._variance), *sides = saved
        for side, values in zip((self._slower, self._faster), sides, strict=True):
            side.total, side.since_seconds, side.observed, side.modelled = values

    def observe(self, time_seconds: float, observed_seconds: float, modelled_seconds: float) -> Change | None:
        """A request ended; its duration counts in its block. Returns what the block before it tells."""
        change = None
        if time_seconds >= self._block + BLOCK_SECONDS:
            if self._requests >= _BLOCK_REQUESTS and self._modelled > 0.0 and self._observed > 0.0:
                change = self._close()
            self._block = time_seconds
            self._requests, self._observed, self._modelled = 0, 0.0, 0.0
        self._requests += 1
        self._observed += observed_seconds
        self._modelled += modelled_seconds
        return change

    def _close(self) -> Change | None:
        error = math.log(self._observed / self._modelled)
        deviation = max(_SMALLEST_DEVIATION, math.sqrt(self._variance))
        block = (self._block, self._observed, self._modelled)
        slower, faster = self._slower.take(error / deviation, *block), self._faster.take(-error / deviation, *block)
        # A jump must not pass for noise.
        clipped = min(_CLIPPED_DEVIATIONS * deviation, abs(error))
        self._variance += (clipped**2 - self._variance) / _DEVIATION_BLOCKS
        if slower or faster:
            self._slower, self._faster = _Side(), _Side()
        return slower or faster
