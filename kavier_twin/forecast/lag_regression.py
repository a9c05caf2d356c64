"""Arrival rates from a level that smooths recent counts, and from weights learnt from days of errors with forgetting.

The level mixes exponential smoothings of several half-lives by their errors over the last two hours, so that it looks
back further the more the counts vary by chance. The rate of each part of the next hour departs from the level by a
weighted sum of what the means of the last minutes and hours say, and of how the rate moved at this time of day on
earlier days. A ridge penalty (Hoerl and Kennard, 1970) pulls the weights towards 0: a short history gives the level, a
long one departs from it as far as its errors justify. Those errors also give the uncertainty: their quantile, in units
of how much the rate varied over the hours before each (locally weighted conformal prediction, Lei et al., 2018).

Everything follows from the counts: nothing else is kept between two fits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import signal

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LOOK_BACK_MINUTES: Final = (1, 2, 5, 10, 20, 40, 60, 120)
LEAD_MINUTES: Final = (0, 1, 5, 15, 60)  # ends of the parts of the next hour that have weights of their own
_HALF_LIFE_MINUTES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # of the smoothings
_CHOICE_MINUTES: Final = 120  # over which they are compared
_SHARPNESS: Final = 20.0  # a smoothing whose squared error is 5 % above the best one's weighs 1/e of it
_START_MINUTES: Final = 30  # whose mean smoothing starts from
_DAY_MINUTES: Final = 1_440
_PROFILE_HALF_MINUTES: Final = 15  # a daily profile is smoothed over twice this
_LARGEST_PROFILE_RATIO: Final = 3.0
_FORGET_MINUTES: Final = 2.0 * _DAY_MINUTES  # for the weights, a moment this old counts 1/e
_FORGET_ERRORS_MINUTES: Final = 1.0 * _DAY_MINUTES  # and for the intervals, which follow how turbulent it is now
_MOST_ORIGINS: Final = 3_000  # moments of the past that a fit looks at
_FEWEST_ORIGINS: Final = 30
_FEWEST_LEARNT_MINUTES: Final = _DAY_MINUTES // 2  # of a shorter one a single burst would decide
_TURBULENCE_MINUTES: Final = 180  # over which the rate's recent variation is measured
_TURBULENCE_STEP_MINUTES: Final = 5
_LEAST_TURBULENCE: Final = 0.01
_PRIOR_MINUTES: Final = 360.0  # weights of 0 count like so much history
_LARGEST_FACTOR: Final = 4.0  # that a prediction may depart from the mean of the last minutes
_COVERED: Final = 0.90  # of the errors lie within `_COVERED_Z` deviations, which are scaled so
_COVERED_Z: Final = 1.6449


class Fitted(NamedTuple):
    """Weights and errors of one history. Per lead: of the mean rate from now to the end of the lead, NaN where the
    history is too short to know."""

    weights: Floats  # [leads, features]
    deviation_to_turbulence: Floats  # [leads] relative standard deviation of the error, in units of `turbulence`
    requests: Floats  # [leads] predicted in that time, mean
    independent: Floats  # [leads] errors that do not overlap
    persistence_error: Floats  # [leads] mean absolute error of persistence, requests a minute
    error: Floats  # [leads] the same of the fitted weights
    scale: Floats  # [leads] mean absolute difference between neighbouring stretches of that length


class Minutes:
    """Sums over any stretch of a history of counts a minute."""

    def __init__(self, counts: Floats) -> None:
        self.size = counts.size
        self._sums = np.concatenate([np.zeros(1), np.cumsum(counts)])

    def mean(self, begin: Ints, end: Ints) -> Floats:
        """Requests a minute in [begin, end), cut off at the history's ends; 0 where nothing is left."""
        first, last = np.clip(begin, 0, self.size), np.clip(end, 0, self.size)
        return np.asarray((self._sums[last] - self._sums[first]) / np.maximum(last - first, 1), np.float64)

    def profile_ratio(self, at: Ints, begin: int, end: int) -> Floats:
        """[at]: the rate from `begin` to `end` minutes ahead over that of the last ten, on all earlier days; 1 before
        there are any."""
        ahead, now = np.zeros(at.size), np.zeros(at.size)
        middle = (begin + end) // 2
        for day in range(1, self.size // _DAY_MINUTES + 1):
            then = at - day * _DAY_MINUTES
            known = then >= _PROFILE_HALF_MINUTES + 5
            for total, offset in ((ahead, middle), (now, -5)):
                around = then + offset
                mean = self.mean(around - _PROFILE_HALF_MINUTES, np.minimum(around + _PROFILE_HALF_MINUTES, at))
                total += np.where(known, mean, 0.0)
        ratio = np.divide(ahead, now, out=np.ones(at.size), where=now > 0.0)
        return np.asarray(np.clip(ratio, 1.0 / _LARGEST_PROFILE_RATIO, _LARGEST_PROFILE_RATIO), np.float64)

    def turbulence(self, at: Ints) -> Floats:
        """[at]: mean absolute difference between neighbouring five minutes of the last hours, over their mean rate."""
        step, moved, known = _TURBULENCE_STEP_MINUTES, np.zeros(at.size), np.zeros(at.size)
        for ago in range(0, _TURBULENCE_MINUTES, step):
            older, newer = at - ago - 2 * step, at - ago - step
            inside = older >= 0
            moved += np.where(inside, np.abs(self.mean(newer, newer + step) - self.mean(older, newer)), 0.0)
            known += inside
        moved /= np.maximum(known, 1.0)
        level = self.mean(at - _TURBULENCE_MINUTES, at)
        return np.asarray(np.maximum(moved / np.maximum(level, 1e-9), _LEAST_TURBULENCE), np.float64)


def smoothed(counts: Floats) -> Floats:
    """[minutes]: the level after each minute, requests a minute."""
    if not counts.size:
        return counts
    start = counts[:_START_MINUTES].mean()
    begins = np.maximum(np.arange(1, counts.size + 1) - _CHOICE_MINUTES, 0)
    levels, losses = [], []
    for half_life in _HALF_LIFE_MINUTES:
        share = 1.0 - 0.5 ** (1.0 / half_life)
        level, _ = signal.lfilter([share], [1.0, share - 1.0], counts, zi=[(1.0 - share) * start])
        missed = np.concatenate([np.zeros(2), np.cumsum((counts[1:] - level[:-1]) ** 2)])
        levels.append(level)
        losses.append(missed[1:] - missed[begins])
    lost = np.array(losses)
    worse = lost / np.maximum(lost.min(axis=0), 1e-9) - 1.0
    weights = np.exp(-np.minimum(_SHARPNESS * worse, 100.0))
    return np.asarray((weights * np.array(levels)).sum(axis=0) / weights.sum(axis=0), np.float64)


def departures(means: Floats, level: Floats, profile: Floats) -> Floats:
    """[n, features]: what each look-back says beyond the level, and what the daily profile does."""
    return np.concatenate([means - level[:, None], (level * (profile - 1.0))[:, None]], axis=1)


def predict(persisted: Floats, level: Floats, features: Floats, weights: Floats) -> Floats:
    """[n]: requests a minute; where persistence is nothing, nothing."""
    told = level + features @ weights
    return np.asarray(np.clip(told, persisted / _LARGEST_FACTOR, persisted * _LARGEST_FACTOR), np.float64)


def fit(counts: Floats, persistence_minutes: int) -> Fitted | None:
    """Learn from requests a minute, oldest first; None where too little is known for any lead.

    Persistence is the mean of `persistence_minutes`.
    """
    minutes = Minutes(counts)
    shortest = LOOK_BACK_MINUTES[3]
    last = counts.size - LEAD_MINUTES[1]
    if last - shortest < _FEWEST_ORIGINS or not counts.any():
        return None
    stride = max(1, (last - shortest) // _MOST_ORIGINS)
    at = np.arange(last, shortest - 1, -stride, dtype=np.int64)[::-1]
    means = np.stack([minutes.mean(at - back, at) for back in LOOK_BACK_MINUTES], axis=1)
    persisted = minutes.mean(at - persistence_minutes, at)
    level = smoothed(counts)[at - 1]
    unit = np.maximum(means[:, LOOK_BACK_MINUTES.index(60)], 1e-9)
    age = np.exp(-(counts.size - at) / _FORGET_MINUTES)
    turbulence = minutes.turbulence(at)
    leads = len(LEAD_MINUTES) - 1
    weights = np.zeros((leads, len(LOOK_BACK_MINUTES) + 1))
    figures = np.full((6, leads), np.nan)
    told_sum, kept_sum = np.zeros(at.size), np.zeros(at.size)
    for lead, (begin, end) in enumerate(pairwise(LEAD_MINUTES)):
        known = at + end <= counts.size
        if known.sum() < _FEWEST_ORIGINS:
            break
        features = departures(means, level, minutes.profile_ratio(at, begin, end))
        came = minutes.mean(at + begin, at + end)
        target = (came - level)[known] / unit[known]
        if counts.size >= _FEWEST_LEARNT_MINUTES:
            weights[lead] = _ridge(features[known] / unit[known, None], target, age[known], _PRIOR_MINUTES / stride)
        told_sum += (end - begin) * predict(persisted, level, features, weights[lead])
        kept_sum += (end - begin) * persisted
        told, kept, total = told_sum[known] / end, kept_sum[known] / end, minutes.mean(at, at + end)[known]
        errors = np.abs(told - total)
        relative = np.divide(errors, told, out=np.zeros(told.size), where=told > 0.0)
        neighbours = np.abs(minutes.mean(at - end, at)[known] - total)
        share = np.exp(-(counts.size - at[known]) / _FORGET_ERRORS_MINUTES)
        share /= share.sum()
        figures[:, lead] = (
            _quantile(relative / turbulence[known], share, _COVERED) / _COVERED_Z,
            end * (told @ share),
            1.0 + stride * (known.sum() - 1) / end,
            np.abs(kept - total) @ share,
            errors @ share,
            neighbours @ share,
        )
    return Fitted(weights, *figures)


def _ridge(features: Floats, target: Floats, counts: Floats, prior: float) -> Floats:
    """Weights of features [rows, features] whose rows count `counts`; that all are 0 counts like `prior` rows."""
    weighted = features * counts[:, None]
    gram = weighted.T @ features
    penalty = prior * float(np.diag(gram).mean()) / counts.sum() + 1e-9
    return np.asarray(np.linalg.solve(gram + penalty * np.eye(gram.shape[0]), weighted.T @ target), np.float64)


def _quantile(values: Floats, shares: Floats, place: float) -> float:
    order = np.argsort(values)
    return float(np.interp(place, np.cumsum(shares[order]), values[order]))
