"""How much slower or faster the real engine runs than its coefficients say, from the ends of requests.

Between two moments the simulation did some work (`state.WORK`), which the coefficients turn into seconds; reality
took the time that passed with a request alive. The ratio of both, with exponential forgetting, is the pace.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.settings import StepTime

SLOWEST, FASTEST = 5.0, 0.2  # bounds of the factor on every step time
MEMORY_SECONDS = 2.0
# What the coefficients themselves weigh against observation, seconds of work.
_PRIOR_SECONDS = 0.1


class Pace:
    """Tracks the pace of a pool and applies it to its fleet."""

    def __init__(self, fleet: Fleet, memory_seconds: float = MEMORY_SECONDS) -> None:
        self.factor = 1.0
        self._memory_seconds = memory_seconds
        self._real = self._modelled = 1.0
        self.reset(fleet)

    def reset(self, fleet: Fleet) -> None:
        """Start counting from the fleet's present (its coefficients changed, or it did)."""
        self._coefficients = coefficients(fleet.settings.step_time)
        self._work = _work(fleet)
        self._busy = float(fleet.state.replicas["busy_seconds"].sum())

    def observe(self, fleet: Fleet) -> None:
        """Called when the simulation was just brought in line with reality (a request ended)."""
        work, busy = _work(fleet), float(fleet.state.replicas["busy_seconds"].sum())
        real, modelled = busy - self._busy, float(self._coefficients @ (work - self._work))
        self._work, self._busy = work, busy
        keep = math.exp(-real / self._memory_seconds)
        self._real = self._real * keep + real
        self._modelled = self._modelled * keep + modelled
        ratio = (self._real + _PRIOR_SECONDS) / (self._modelled + _PRIOR_SECONDS)
        self.factor = min(SLOWEST, max(FASTEST, ratio))

    def apply(self, fleet: Fleet, factor: float | None = None) -> None:
        """Let every step of the fleet last `factor` times what the coefficients say (default: the pace)."""
        scaled = self._coefficients * (self.factor if factor is None else factor)
        for name, value in zip(StepTime.model_fields, scaled, strict=True):
            fleet.state.engines[name] = value


def coefficients(step_time: StepTime) -> npt.NDArray[np.float64]:
    """The coefficients in the order of `state.WORK`."""
    return np.array([getattr(step_time, name) for name in StepTime.model_fields])


def _work(fleet: Fleet) -> npt.NDArray[np.float64]:
    return np.asarray(fleet.state.replicas["work"].sum(axis=0), dtype=np.float64)
