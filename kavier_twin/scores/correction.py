"""The simulated median, corrected by what came of earlier forecasts.

Three experts foretell a KPI: the simulation, persistence (as it was over as long a time before), and the middle
between both. What is served lies between simulation and persistence, where the experts' weights say: those of the
exponentially weighted average forecaster (Cesa-Bianchi and Lugosi, "Prediction, Learning, and Games", 2006, chapter 2).
They fall with an expert's losses, so that what is served is in the long run hardly worse than the best of them. Losses
are absolute errors over the usual one. Forecasts that overlap tell the same several times: each counts for the time
since the one before, over the horizon.

Between means in proportion, a geometric mean: where a queue builds up, a TTFT is foreseen a hundred times as long as it
was, and half of that is no compromise.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_SHARES: Final[Floats] = np.array([1.0, 0.5, 0.0])  # of the simulation, by expert
# Before anything was seen simulation counts as much as persistence so far ahead, more before and less behind: it knows
# the present, and what it supposes of the load grows stale. Chosen from half, once and twice as much on the backtests
# that `benchmarks.forecast_scores` calls design.
_EVEN_SECONDS: Final = 300.0
_NOTHING: Final = 0.01  # of the larger of two values: the smaller counts as no less, so that there is a mean with 0
_FORGET: Final = 0.97  # of what was lost before, kept at each forecast that overlaps with none
_LEAST_COUNT: Final = 0.1  # what a forecast counts at least, however much it overlaps
_LARGEST_LOSS: Final = 5.0  # usual ones: no single forecast decides


class Correction:
    """One KPI at one horizon."""

    def __init__(self, horizon_seconds: float) -> None:
        self._horizon_seconds = horizon_seconds
        share = _EVEN_SECONDS / (_EVEN_SECONDS + horizon_seconds)
        self._prior = np.array([share**2, 2.0 * share * (1.0 - share), (1.0 - share) ** 2])  # its mean share is this
        self._lost = np.zeros(_SHARES.size)
        self._errors, self._counted = 0.0, 0.0
        self._newest_seconds = -math.inf

    @property
    def share(self) -> float:
        """How much of what is served is the simulation's; the rest is persistence."""
        weights = self._prior * np.exp(self._lost.min() - self._lost)
        return float(weights @ _SHARES / weights.sum())

    def serve(self, simulated: float, persisted: float) -> float:
        """The median to serve; the simulated one where `persisted` is not known (NaN)."""
        return float(_between(simulated, persisted, self.share)) if math.isfinite(persisted) else simulated

    def observe(self, time_seconds: float, simulated: float, persisted: float, observed: float) -> None:
        """What came of the forecast made at this time."""
        if not (math.isfinite(simulated) and math.isfinite(persisted) and math.isfinite(observed)):
            return
        count = min(1.0, max(_LEAST_COUNT, (time_seconds - self._newest_seconds) / self._horizon_seconds))
        self._newest_seconds = max(self._newest_seconds, time_seconds)
        errors = np.abs(_between(simulated, persisted, _SHARES) - observed)
        keep = _FORGET**count
        self._errors = keep * self._errors + count * float(errors.mean())
        self._counted = keep * self._counted + count
        self._lost = keep * self._lost
        if self._errors > 0.0:
            self._lost = self._lost + count * np.minimum(errors * self._counted / self._errors, _LARGEST_LOSS)


def _between(simulated: float, persisted: float, share: float | Floats) -> Floats:
    """Their geometric mean, the simulation with this weight; neither is below 0."""
    nothing = _NOTHING * max(simulated, persisted)
    return np.asarray((simulated + nothing) ** share * (persisted + nothing) ** (1.0 - share) - nothing, np.float64)
