"""Ways to forecast arrival counts from a history of them.

Persistence is the baseline and what a short history gives; `lag_regression` learns from days. `trend` is for some of
the scenarios only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kavier_twin.forecast import lag_regression
from kavier_twin.mirror.snapshot import COARSE_COUNT_SECONDS

Floats = npt.NDArray[np.float64]

STEP_SECONDS = 10.0  # of a forecast
MINUTE_STEPS: Final = round(COARSE_COUNT_SECONDS / STEP_SECONDS)
PERSISTENCE: Final = "persistence"
LAG_REGRESSION: Final = "lag_regression"
_PERSISTENCE_MINUTES = (2, 10)
# Counts of so many requests, over their dispersion, give the rate within 3 %. The shortest look-back that does is used,
# so that bursty arrivals get a longer one.
_PERSISTENCE_REQUESTS = 1_000
_TREND_STEPS = 60  # ten minutes
_FEWEST_TREND_STEPS = 30
_TREND_DEVIATIONS = 2.0  # of its slope: one that chance alone could well make is none
# A line takes away 4/3 of the squares that a jump does where there is a line, 0.96 where one began halfway, and 3/4 or
# less where there is a jump: then nothing goes on.
_JUMP_RATIO = 0.87
_TREND_SECONDS = 900.0  # in which two thirds of its momentum are gone
_LEAST_LEFT = 0.1  # of the rate, however steeply it falls
_SHIFT_STEPS = 3  # shorter than these two, nothing is told of a shift of the rate
_SHIFT_REQUESTS = 30
_SHIFT_DEVIATIONS = 6.0  # fewer come from bursts, after which the rate returns
_SHIFT_HISTORY_STEPS = 360  # that tell how much counts vary: an hour
_FEWEST_DISPERSION_STEPS = 24
DISPERSION_LIMITS = 0.2, 20.0  # that counts so bursty, or so regular, are taken for at most


@dataclass(frozen=True)
class History:
    """Arrivals up to a moment, oldest first."""

    steps: Floats  # requests in `STEP_SECONDS`; the last ends now
    minutes: Floats  # requests in `COARSE_COUNT_SECONDS`, a minute; the last ends less than a minute ago


def persistence_minutes(steps: Floats) -> int:
    """The look-back of persistence: whole minutes, as many as the counts' dispersion asks for."""
    shortest, longest = _PERSISTENCE_MINUTES
    recent = steps[-_SHIFT_HISTORY_STEPS:]
    if not recent.any():
        return longest
    needed = _PERSISTENCE_REQUESTS * _dispersion(recent) / (MINUTE_STEPS * float(recent.mean()))
    return int(np.clip(np.ceil(needed), shortest, longest))


def persistence_steps(steps: Floats) -> int:
    """How many of the last steps tell today's rate: those of the look-back, but none from before it clearly shifted."""
    window = min(persistence_minutes(steps) * MINUTE_STEPS, max(steps.size, 1))
    dispersion = _dispersion(steps[-_SHIFT_HISTORY_STEPS:])
    while (since := _shifted(steps[-window:], dispersion)) is not None:
        window = since
    return window


def persistence(steps: Floats) -> float:
    """Requests in each step to come if the rate stays as it is."""
    last = steps[-persistence_steps(steps) :]
    return float(last.mean()) if last.size else 0.0


def relative_variance(counts: Floats) -> float:
    """Variance of counts over their mean, from differences of neighbours, which a trend hardly moves."""
    return float((np.diff(counts) ** 2).mean() / 2.0 / counts.mean())


def _dispersion(steps: Floats) -> float:
    """That of few counts is 1."""
    if steps.size < _FEWEST_DISPERSION_STEPS or not steps.any():
        return 1.0
    return float(np.clip(relative_variance(steps), *DISPERSION_LIMITS))


def _shifted(steps: Floats, dispersion: float) -> int | None:
    """How many of these steps came since the rate most clearly shifted; None where it did not.

    The split in two whose means differ by the most standard deviations (binary segmentation, Scott and Knott 1974).
    """
    newest = np.cumsum(steps[::-1])  # requests in the last 1, 2, ... steps
    least = max(_SHIFT_STEPS, int(np.searchsorted(newest, _SHIFT_REQUESTS)) + 1)
    since = np.arange(least, steps.size - _SHIFT_STEPS + 1)
    if not since.size:
        return None
    before = steps.size - since
    difference = newest[since - 1] / since - (newest[-1] - newest[since - 1]) / before
    variance = dispersion * newest[-1] / steps.size * (1.0 / since + 1.0 / before)
    deviations = np.abs(difference) / np.sqrt(np.maximum(variance, 1e-12))
    most = int(np.argmax(deviations))
    return int(since[most]) if deviations[most] >= _SHIFT_DEVIATIONS else None


def _explained_by_a_jump(steps: Floats) -> float:
    """How much of the sum of squares around the mean one step up or down takes away at most."""
    before = np.arange(1, steps.size)
    gone = np.cumsum(steps)[:-1] - before * steps.mean()
    return float((gone**2 * steps.size / (before * (steps.size - before))).max())


def trend(history: History, steps: int) -> Floats:
    """Requests in each of the next steps if their rate goes on rising or falling as in the last ten minutes.

    It does so ever less (a damped trend, Gardner and McKenzie 1985), and by no more than chance leaves of that (the
    slope is shrunk as by positive-part James-Stein). Where a climb ends is not known, so some scenarios follow it and
    others do not.
    """
    lately = np.full(steps, persistence(history.steps))
    recent = history.steps[-_TREND_STEPS:]
    if recent.size < _FEWEST_TREND_STEPS or not lately.any():
        return lately
    places = np.arange(recent.size) - 0.5 * (recent.size - 1)
    slope = float(places @ recent / (places @ places))
    chance = _dispersion(history.steps[-_SHIFT_HISTORY_STEPS:]) * float(recent.mean() / (places @ places))
    sure = max(0.0, 1.0 - _TREND_DEVIATIONS**2 * chance / slope**2) if slope else 0.0
    if slope * float(places @ recent) < _JUMP_RATIO * _explained_by_a_jump(recent):
        return lately
    now = sure * (recent.mean() + 0.5 * recent.size * slope) + (1.0 - sure) * lately
    ahead_seconds = STEP_SECONDS * (np.arange(steps) + 0.5)
    grown_steps = _TREND_SECONDS * (1.0 - np.exp(-ahead_seconds / _TREND_SECONDS)) / STEP_SECONDS
    return np.asarray(np.maximum(now + sure * slope * grown_steps, _LEAST_LEFT * lately), np.float64)


@dataclass(frozen=True)
class LagRegression:
    """The weights that days have taught, applied to the newest counts."""

    fitted: lag_regression.Fitted

    def predict(self, history: History, steps: int) -> Floats:
        """Requests expected in each step to come."""
        window = persistence_minutes(history.steps) * MINUTE_STEPS
        persisted = np.array([persistence(history.steps) * MINUTE_STEPS])
        backs = [
            history.steps[-back * MINUTE_STEPS :].mean() * MINUTE_STEPS for back in lag_regression.LOOK_BACK_MINUTES
        ]
        means = np.array([backs])
        minutes = lag_regression.Minutes(history.minutes)
        at = np.array([history.minutes.size])
        level = lag_regression.smoothed(history.minutes)[-1:]
        if persistence_steps(history.steps) < min(window, history.steps.size):
            level = persisted  # the rate has clearly shifted since: smoothing follows only after minutes
        leads = lag_regression.LEAD_MINUTES
        told = []
        for begin, end, weights in zip(leads[:-1], leads[1:], self.fitted.weights, strict=True):
            features = lag_regression.departures(means, level, minutes.profile_ratio(at, begin, end))
            told.append(float(lag_regression.predict(persisted, level, features, weights)[0]))
        middles = 0.5 * (np.array(leads[:-1]) + np.array(leads[1:]))
        ahead_minutes = (np.arange(steps) + 0.5) / MINUTE_STEPS
        return np.asarray(np.interp(ahead_minutes, middles, told) / MINUTE_STEPS, np.float64)
