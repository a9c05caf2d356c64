"""How much slower or faster the real engine runs than its coefficients say, from the requests that end.

While a request decoded, its replica did some work (`state.WORK`), which the coefficients turn into seconds; reality
took as long as the request's record says. The ratio of both, with exponential forgetting, is the pace.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

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
        self._real = 0.0
        self._work = np.zeros(len(COEFFICIENTS))
        self._time = -math.inf

    def observe(self, time_seconds: float, decode_seconds: float, decode_work: npt.NDArray[np.float64]) -> None:
        """A request ended at `time_seconds`: it decoded for so long, while its replica did this work."""
        modelled = float(self._coefficients @ decode_work)
        if not (math.isfinite(modelled) and modelled > 0.0 and decode_seconds > 0.0):
            return
        keep = math.exp(-max(0.0, time_seconds - self._time) / self._memory_seconds)
        self._time = max(self._time, time_seconds)
        self._real = self._real * keep + decode_seconds
        self._work = self._work * keep + decode_work
        self._compare()

    def follow(self, step_time: StepTime) -> None:
        """From now on the coefficients are these; what was observed stays and is held against them."""
        self._coefficients = step_time.coefficients()
        self._compare()

    def _compare(self) -> None:
        modelled = float(self._coefficients @ self._work)
        self.factor = min(SLOWEST, max(FASTEST, (self._real + _PRIOR_SECONDS) / (modelled + _PRIOR_SECONDS)))

    def fork(self) -> Pace:
        """An independent copy."""
        return copy(self)  # its array is replaced, never changed

    def save(self) -> list[Any]:
        """As JSON types."""
        return [self._real, self._time, self._work.tolist()]

    def restore(self, saved: list[Any]) -> None:
        """What `save` gave."""
        self._real, self._time, work = saved
        self._work = np.array(work)
        self._compare()

    def apply(self, fleet: Fleet, factor: float | None = None) -> None:
        """Let every step of the fleet last `factor` times what the coefficients say (default: the pace)."""
        scaled = self._coefficients * (self.factor if factor is None else factor)
        for name, value in zip(COEFFICIENTS, scaled, strict=True):
            fleet.state.engines[name] = value
