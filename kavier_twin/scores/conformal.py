"""Intervals that cover as often as they say, by what was observed of those before.

Conformalized quantile regression (Romano, Patterson, Candès, NeurIPS 2019), each side for itself: where an observation
lay, seen from the median, in units of the interval's half on that side (locally weighted, Lei et al., JASA 2018), is
its score; a new interval reaches from the 5 % to the 95 % quantile of recent scores, further out than the simulated one
or less far. The unit is the geometric mean of the interval's own half and the usual one: what many narrow halves missed
by is not missed by as many wide ones. Load drifts, so that the past is no fair sample of what comes: newer scores weigh
more (Barber et al., "Conformal prediction beyond exchangeability", 2023), and the level follows what was missed lately
(adaptive conformal inference, Gibbs and Candès, NeurIPS 2021).

It begins at once: a prior counts like a few scores, those of an interval that is half as wide as it should be over a
minute; and what shorter horizons of the same KPI scored counts until there are own scores, which come a horizon late.
Further ahead both count for more, as a random walk's deviation grows: that the scenarios drift apart is in their width,
that load turns in a way they do not know of is not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]

COVERAGE: Final = 0.90  # aimed at
SCORES: Final = 200  # remembered
ADAPTATION: Final = 0.02  # how far one miss moves the level: that of Gibbs and Candès is 0.005 for thousands of steps
_FORGET: Final = 0.98  # a score weighs so much less than the next
_PRIOR_SCORES: Final = 8  # it counts like so many
# Between the extremes of eight scenarios lie 78 %: 90 % of normal values are 1.35 times as wide, and scenarios know
# only what was seen before.
_PRIOR_SPREAD: Final = 2.0
_LENT: Final = 0.3  # weight of another horizon's score beside an own one
# Horizons whose prior was tried: with it 90, 89 and 88 % of the intervals over 60, 300 and 900 s covered in the
# backtests that `benchmarks.forecast_scores` calls design; with as wide a prior for all of them 90, 80 and 68 %.
_TRIED_SECONDS: Final = 60.0, 900.0
_SMALLEST_SHARE: Final = 0.05  # a half counts as no narrower than this share of the median and of what was seen
_USUAL: Final = 50  # latest halves whose geometric mean is the usual one
INTERVAL_END: Final = float(special.ndtri(0.5 + 0.5 * COVERAGE))  # of a normal distribution: deviations from its middle
_PRIOR: Final[Floats] = _PRIOR_SPREAD / INTERVAL_END * special.ndtri((np.arange(_PRIOR_SCORES) + 0.5) / _PRIOR_SCORES)


class Widening:
    """One KPI at one horizon; `lenders` are those of the same KPI at shorter ones."""

    def __init__(self, horizon_seconds: float, lenders: Sequence[Widening] = ()) -> None:
        shortest, longest = _TRIED_SECONDS
        self._growth = math.sqrt(min(max(horizon_seconds, shortest), longest) / shortest)
        self._scores: deque[float] = deque(maxlen=SCORES)
        self._sizes: deque[float] = deque(maxlen=SCORES)  # of observations
        self._usual: deque[Floats] = deque(maxlen=_USUAL)  # logarithms of both halves
        self._lenders = tuple(lenders)
        self._miss = 1.0 - COVERAGE

    def widen(self, low: float, median: float, high: float) -> tuple[float, float]:
        """The interval that covers. It holds the median, and nothing below zero."""
        if not math.isfinite(high - low):
            return low, high
        scores, weights = self._pooled()
        order = np.argsort(scores)
        # In the middle of its weight, so that the extremes stand for the ends.
        place = np.cumsum(weights[order]) - 0.5 * weights[order]
        tail = 0.5 * max(self._miss, 0.0)
        down, up = np.interp((tail, 1.0 - tail), place / weights.sum(), scores[order])
        more = 1.0 + max(-self._miss, 0.0) * 10.0  # all that was seen did not suffice
        below, above = self._units(low, median, high)
        return float(max(0.0, median + min(more * down, 0.0) * below)), float(median + max(more * up, 0.0) * above)

    def observe(
        self, low: float, median: float, high: float, wide_low: float, wide_high: float, observed: float
    ) -> None:
        """What came of an interval, as it was before and as it was widened."""
        if not math.isfinite(high - low) or not math.isfinite(observed):
            return
        missed = not wide_low <= observed <= wide_high
        # Not so far that it would take long to come back.
        self._miss = min(0.5, max(-0.1, self._miss + ADAPTATION * (1.0 - COVERAGE - missed)))
        below, above = self._units(low, median, high)
        self._scores.append((observed - median) / (below if observed < median else above))
        self._sizes.append(abs(observed))
        self._usual.append(np.log(self._halves(low, median, high)))

    def _pooled(self) -> tuple[Floats, Floats]:
        """All scores and what each weighs."""
        scores: list[Floats] = [_PRIOR * self._growth]
        weights: list[Floats] = [np.ones(_PRIOR_SCORES)]
        for widening, weight in ((self, 1.0), *((lender, _LENT) for lender in self._lenders)):
            own: Floats = np.array(widening._scores, np.float64)
            scores.append(own * (self._growth / widening._growth))
            weights.append(np.asarray(weight * _FORGET ** np.arange(own.size)[::-1], np.float64))
        return np.concatenate(scores), np.concatenate(weights)

    def _units(self, low: float, median: float, high: float) -> Floats:
        """What a score of one reaches below and above the median."""
        own = np.log(self._halves(low, median, high))
        usual = np.mean(self._usual, axis=0) if self._usual else own
        return np.asarray(np.exp(0.5 * (own + usual)), np.float64)

    def _halves(self, low: float, median: float, high: float) -> tuple[float, float]:
        usual = float(np.mean(self._sizes)) if self._sizes else 0.0
        least = max(_SMALLEST_SHARE * abs(median), _SMALLEST_SHARE * usual, 1e-9)
        return max(median - low, least), max(high - median, least)
