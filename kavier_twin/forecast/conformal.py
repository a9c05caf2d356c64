"""Intervals that cover as often as they say, by what was observed of those before.

Conformalized quantile regression (Romano, Patterson, Candès, NeurIPS 2019): how far an observation lay outside its
interval (negative: inside) is its score; a new interval is moved outwards by a high quantile of recent scores, inwards
if they are negative. Scores are in units of the interval's own size (locally weighted, Lei et al., JASA 2018). Load
drifts, so that the past is no fair sample of what comes: the level follows what was missed lately (adaptive conformal
inference, Gibbs and Candès, NeurIPS 2021).
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

import numpy as np

COVERAGE: Final = 0.90  # aimed at
SCORES: Final = 200  # remembered
SCORES_NEEDED: Final = 10  # before that an interval stays as it is
ADAPTATION: Final = 0.02  # how far one miss moves the level: that of Gibbs and Candès is 0.005 for thousands of steps
_SMALLEST_SHARE: Final = 0.05  # an interval counts as no narrower than this share of its median and of what was seen


class Widening:
    """One KPI at one horizon."""

    def __init__(self) -> None:
        self._scores: deque[float] = deque(maxlen=SCORES)
        self._sizes: deque[float] = deque(maxlen=SCORES)  # of observations
        self._miss = 1.0 - COVERAGE

    @property
    def ready(self) -> bool:
        """Whether enough was observed."""
        return len(self._scores) >= SCORES_NEEDED

    def widen(self, low: float, median: float, high: float) -> tuple[float, float]:
        """The interval that covers; the one given where too little was observed. Never below zero."""
        if not self.ready or not math.isfinite(high - low):
            return low, high
        level = (1.0 - self._miss) * (1.0 + 1.0 / len(self._scores))
        scores = np.array(self._scores)
        # Beyond the largest score seen there is nothing to read it from: half as far again.
        reach = float(np.quantile(scores, max(level, 0.0))) if level <= 1.0 else max(1.5 * float(scores.max()), 0.0)
        by = reach * self._scale(low, median, high)
        return max(0.0, min(low - by, median)), max(high + by, median)

    def observe(
        self, low: float, median: float, high: float, wide_low: float, wide_high: float, observed: float
    ) -> None:
        """What came of an interval, as it was before and as it was widened."""
        if not math.isfinite(high - low) or not math.isfinite(observed):
            return
        if self.ready:
            missed = not wide_low <= observed <= wide_high
            # Not so far that it would take long to come back.
            self._miss = min(0.5, max(-0.1, self._miss + ADAPTATION * (1.0 - COVERAGE - missed)))
        self._scores.append(max(low - observed, observed - high) / self._scale(low, median, high))
        self._sizes.append(abs(observed))

    def _scale(self, low: float, median: float, high: float) -> float:
        usual = float(np.mean(self._sizes)) if self._sizes else 0.0
        return max(high - low, _SMALLEST_SHARE * abs(median), _SMALLEST_SHARE * usual, 1e-9)
