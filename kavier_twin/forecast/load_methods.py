"""Ways to forecast arrival counts, each fitted to a history and then asked for the steps to come.

The baselines are ours, a line each; everything else is statsforecast's (https://nixtlaverse.nixtla.io/statsforecast),
imported when it is first needed: it brings pandas along, and takes a second or two.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kavier_twin.mirror.snapshot import COARSE_COUNT_SECONDS

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

STEP_SECONDS = 10.0  # of a forecast
_COARSE_STEPS = round(COARSE_COUNT_SECONDS / STEP_SECONDS)
_DAY = round(86_400.0 / COARSE_COUNT_SECONDS)  # in coarse buckets
_HOUR = round(3_600.0 / COARSE_COUNT_SECONDS)
_MOST_COARSE = 4 * _DAY  # what a seasonal fit looks at
_MOST_STEPS = 720  # what smoothing looks at: two hours
_FEWEST_STEPS = 12  # that automatic exponential smoothing is tried on
_PERSISTENCE_STEPS = (12, 60)  # two minutes; longer, up to ten, where fewer than this many requests came
_PERSISTENCE_REQUESTS = 100
# Bursts end: the rate comes back to the mean of so many steps within such a time. Chosen on the backtests that
# `benchmarks.forecast_scores` calls design, from 5, 10 and 20 minutes.
_REVERSION_STEPS = 360
_REVERSION_SECONDS = 1_200.0
_FEWEST_REVERSION_STEPS = 60  # a mean of less says hardly more than the last minutes do
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
_SHIFT_DEVIATIONS = 3.0
_SHIFT_HISTORY_STEPS = 360  # that tell how much counts vary: an hour
DISPERSION_LIMITS = 0.2, 20.0  # that counts so bursty, or so regular, are taken for at most
_LEVEL = 80  # per cent; statsforecast tells intervals, of normal errors
_LEVEL_Z = 1.2816  # standard deviations from the middle of such an interval to its end (10 % lie above)


@dataclass(frozen=True)
class History:
    """Arrivals up to a moment: in steps that end there, and in coarse buckets that end `lag_seconds` earlier."""

    steps: Floats  # requests in `STEP_SECONDS`, oldest first
    coarse: Floats  # requests in `COARSE_COUNT_SECONDS`
    lag_seconds: float


class Method(Protocol):
    """A way to forecast. `fit` takes the time; `predict` is quick, and may be asked with a history gone on since."""

    def fit(self, history: History) -> None:
        """Learn. Only if `applies`."""
        ...

    def predict(self, history: History, steps: int) -> tuple[Floats, Floats]:
        """Requests expected in each step to come, and the standard deviation that the method itself gives that, 0
        where it gives none."""
        ...

    @staticmethod
    def applies(history: History) -> bool:
        """Whether the history is long enough for this method, and of its kind."""
        ...


def persistence_steps(steps: Floats) -> int:
    """How many of the last steps tell today's rate: few, but enough requests, and none from before it last shifted."""
    shortest, longest = _PERSISTENCE_STEPS
    enough = int(np.searchsorted(np.cumsum(steps[::-1]), _PERSISTENCE_REQUESTS)) + 1
    window = min(max(enough, shortest), longest, max(steps.size, 1))
    dispersion = _dispersion(steps[-_SHIFT_HISTORY_STEPS:])
    while (since := _shifted(steps[-window:], dispersion)) is not None:
        window = since
    return window


def relative_variance(counts: Floats) -> float:
    """Variance of counts over their mean, from differences of neighbours, which a trend hardly moves."""
    return float((np.diff(counts) ** 2).mean() / 2.0 / counts.mean())


def _dispersion(steps: Floats) -> float:
    """That of few counts is 1."""
    if steps.size < 2 * _FEWEST_STEPS or not steps.any():
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


class Persistence:
    """The rate of the last minutes, or since it shifted, goes on: the baseline."""

    def fit(self, history: History) -> None:
        pass

    def predict(self, history: History, steps: int) -> tuple[Floats, Floats]:
        last = history.steps[-persistence_steps(history.steps) :]
        return np.full(steps, last.mean() if last.size else 0.0), np.zeros(steps)

    @staticmethod
    def applies(history: History) -> bool:
        return True


class MeanReverting:
    """The rate of the last minutes comes back to the last hour's: its logarithm as an Ornstein-Uhlenbeck process does.

    So one that is nothing stays nothing. Where less than ten minutes are known, this is persistence.
    """

    def fit(self, history: History) -> None:
        pass

    def predict(self, history: History, steps: int) -> tuple[Floats, Floats]:
        lately, deviation = Persistence().predict(history, steps)
        if history.steps.size < _FEWEST_REVERSION_STEPS:
            return lately, deviation
        usual = history.steps[-_REVERSION_STEPS:].mean()
        left = np.exp(-STEP_SECONDS * (np.arange(steps) + 0.5) / _REVERSION_SECONDS)
        return usual ** (1.0 - left) * lately**left, deviation

    @staticmethod
    def applies(history: History) -> bool:
        return True


def trend(history: History, steps: int) -> Floats:
    """Requests in each of the next steps if their rate goes on rising or falling as in the last ten minutes.

    It does so ever less (a damped trend, Gardner and McKenzie 1985), and by no more than chance leaves of that (the
    slope is shrunk as by positive-part James-Stein). Not one of `METHODS`: where a climb ends is not known, so some
    scenarios follow it and others do not.
    """
    lately, _ = Persistence().predict(history, steps)
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


class SameTimeYesterday:
    """What came 24 hours before comes again: the seasonal baseline."""

    def fit(self, history: History) -> None:
        pass

    def predict(self, history: History, steps: int) -> tuple[Floats, Floats]:
        ahead = _coarse_ahead(history, steps)
        return _in_steps(np.resize(history.coarse[-_DAY:], ahead), history, steps), np.zeros(steps)

    @staticmethod
    def applies(history: History) -> bool:
        return history.coarse.size >= _DAY


class Smoothing:
    """Exponential smoothing; error and trend by the corrected Akaike criterion (statsforecast's AutoETS).

    A trend is damped: over long horizons straight ones overshoot (Gardner and McKenzie, 1985).
    """

    def fit(self, history: History) -> None:
        from statsforecast.models import AutoETS

        self._model: Any = AutoETS(season_length=1, model="ZZN", damped=True).fit(y=history.steps[-_MOST_STEPS:])

    def predict(self, history: History, steps: int) -> tuple[Floats, Floats]:
        return _told(self._model.forward(y=history.steps[-_MOST_STEPS:], h=steps, level=[_LEVEL]))

    @staticmethod
    def applies(history: History) -> bool:
        return history.steps.size >= _FEWEST_STEPS and bool(history.steps.any())


class Seasonal:
    """Hour and day taken out by LOESS, the rest smoothed exponentially (statsforecast's MSTL)."""

    def fit(self, history: History) -> None:
        from statsforecast.models import MSTL, AutoETS

        model = MSTL(season_length=[_HOUR, _DAY], trend_forecaster=AutoETS(model="ZZN"))
        self._model: Any = model.fit(y=history.coarse[-_MOST_COARSE:])

    def predict(self, history: History, steps: int) -> tuple[Floats, Floats]:
        told = self._model.forward(y=history.coarse[-_MOST_COARSE:], h=_coarse_ahead(history, steps), level=[_LEVEL])
        mean, deviation = _told(told)
        return _in_steps(mean, history, steps), _in_steps(deviation, history, steps)

    @staticmethod
    def applies(history: History) -> bool:
        return history.coarse.size >= 2 * _DAY and bool(history.coarse.any())


class Sparse:
    """Few requests with long pauses between: aggregated until none is empty (statsforecast's ADIDA, Nikolopoulos et
    al. 2011)."""

    def fit(self, history: History) -> None:
        pass

    def predict(self, history: History, steps: int) -> tuple[Floats, Floats]:
        from statsforecast.models import ADIDA

        told = ADIDA().forecast(y=history.steps[-_MOST_STEPS:], h=steps)
        return np.maximum(np.asarray(told["mean"], np.float64), 0.0), np.zeros(steps)

    @staticmethod
    def applies(history: History) -> bool:
        steps = history.steps[-_MOST_STEPS:]
        return steps.size >= _FEWEST_STEPS and 0.5 < float((steps == 0.0).mean()) < 1.0


METHODS: dict[str, type[Method]] = {
    "persistence": Persistence,
    "mean_reverting": MeanReverting,
    "same_time_yesterday": SameTimeYesterday,
    "exponential_smoothing": Smoothing,
    "multiple_seasonality": Seasonal,
    "sparse": Sparse,
}
"""By the name that metrics show."""
USUAL_METHOD = "mean_reverting"  # unless another has been better


def _told(told: dict[str, Any]) -> tuple[Floats, Floats]:
    mean = np.maximum(np.asarray(told["mean"], np.float64), 0.0)
    deviation = (np.asarray(told[f"hi-{_LEVEL}"]) - np.asarray(told[f"lo-{_LEVEL}"])) / (2.0 * _LEVEL_Z)
    return mean, np.nan_to_num(np.maximum(deviation, 0.0))


def _coarse_ahead(history: History, steps: int) -> int:
    return int(-(-(history.lag_seconds + steps * STEP_SECONDS) // COARSE_COUNT_SECONDS))


def _in_steps(coarse: Floats, history: History, steps: int) -> Floats:
    """A forecast in coarse buckets, the first of which began `lag_seconds` ago, in steps from now."""
    middle = history.lag_seconds + STEP_SECONDS * (np.arange(steps) + 0.5)
    between = np.interp(middle / COARSE_COUNT_SECONDS, np.arange(coarse.size) + 0.5, coarse)
    return np.asarray(np.maximum(between, 0.0) / _COARSE_STEPS, np.float64)


def prepare() -> None:
    """Import the library now, where it will be needed and the time for it is better than later."""
    import_module("statsforecast.models")


def fit_all(history: History, names: Sequence[str]) -> dict[str, Method]:
    """These methods, fitted to the history; those that do not apply to it are left out."""
    fitted: dict[str, Method] = {}
    for name in names:
        if not METHODS[name].applies(history):
            continue
        method = METHODS[name]()
        try:
            method.fit(history)
        except Exception as error:  # a library's, on data it was not made for: the other methods go on
            log.warning("the load forecast continues without %s: %s: %s", name, type(error).__name__, error)
            continue
        fitted[name] = method
    return fitted
