"""The load to come: how many requests arrive when.

Several methods forecast the arrival rate; the one in use is whichever has been better over the recent past, which is
tried out: from moments of the last hour or so, each forecasts what is known by now. What the chosen one got wrong there
tells how uncertain the rate is. A scenario draws a path of the rate from that distribution, then arrivals at that rate,
as bursty as those that came lately. Where the rate is climbing or falling nobody knows how far: in some scenarios it
goes on.

Methods are fitted, tried and chosen on schedule (event time), and fed with the newest counts at each forecast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from kavier_twin.forecast.load_methods import (
    DISPERSION_LIMITS,
    METHODS,
    STEP_SECONDS,
    USUAL_METHOD,
    History,
    Method,
    fit_all,
    persistence_steps,
    relative_variance,
    trend,
)
from kavier_twin.mirror.snapshot import COARSE_COUNT_SECONDS, COUNT_SECONDS, Snapshot
from kavier_twin.simulation.plain import Figure

Floats = npt.NDArray[np.float64]

REFIT_SECONDS = 120.0
_ORIGINS = 6  # moments of the past that methods are tried from
_ORIGINS_IN_HORIZON = 3  # of them
_BLOCKS = 4  # parts of the horizon whose errors are told apart
_FEWEST_STEPS = 4  # fewer say less than the recent requests themselves
_FEWEST_TRAINING_STEPS = 12
_FEWEST_TRIED_STEPS = 12  # less of a scenario is mostly chance
_SHORTEST_WINDOW_SECONDS = 1.0  # two requests in a millisecond are no rate of thousands a second
_IMPOSSIBLE_REQUESTS = 14.0  # none where so many were due has a probability of one in a million: exp(-14)
_NEIGHBOURS = 6  # buckets on each side of a gap that tell how many were due
_DISPERSION_REQUESTS = 50  # fewer tell nothing of how bursty they are
_DISPERSION_BUCKETS = 360  # an hour
_POISSON_BUCKETS = 20  # beside them, so that a few buckets do not tell much
_BETTER_RATIO = 0.95  # of the usual method's error: what is hardly better over a few moments may well be worse
_SURPRISE = 4.0  # standard deviations from what was foreseen at the last fit that call for another
_MOST_RELATIVE_DEVIATION = 1.0
# Before anything was tried: a rate that doubles or halves within a quarter of an hour is two deviations off. (On the
# hour of Azure's production chat, which neither ramps nor bursts, persistence is a fifth off.) It counts like so many
# trials.
_PRIOR_RELATIVE_VARIANCE = 0.35**2 / 900.0  # per second ahead
_PRIOR_TRIALS = 2
_QUANTILE_Z = 1.2816  # of the 10 % and 90 % quantiles of a normal distribution
_CHUNK = 1024
_PAUSES = 1_000  # between recent arrivals that scenarios are made of; with fewer than a tenth, gamma-distributed ones
_PAUSES_TOGETHER = 25  # drawn in a row: what comes bunched stays bunched
_PAUSES_AROUND = 50  # on each side that tell the rate a pause belongs to


@dataclass(frozen=True)
class LoadAhead:
    """The arrival rate over one horizon, requests per second."""

    horizon_seconds: Annotated[float, Field(examples=[300])]
    mean: Annotated[float, Field(examples=[4.2])]
    p10: Annotated[float, Field(description="Percentile of the rate at the end of the horizon.", examples=[3.5])]
    p90: Annotated[float, Field(description="Percentile of the rate at the end of the horizon.", examples=[5.0])]
    by_method: Annotated[dict[str, float], Field(description="Mean rate by method.", examples=[{"persistence": 4.0}])]


@dataclass(frozen=True)
class LoadOutlook:
    """How the load to come is forecast."""

    method: Annotated[str, Field(description="Method in use.", examples=["exponential_smoothing"])]
    errors: Annotated[
        dict[str, Figure],
        Field(
            description="Mean absolute scaled error by method. Null: not measured yet.", examples=[{"persistence": 1.1}]
        ),
    ]
    dispersion_ratio: Annotated[
        float, Field(description="Variance divided by mean of arrival counts. 1 is a Poisson process.", examples=[1.0])
    ]
    refitted_seconds: Annotated[Figure, Field(description="Event time of the last fit.", examples=[1767225600.5])]
    ahead: Annotated[tuple[LoadAhead, ...], Field(description="By horizon.")]


@dataclass(frozen=True)
class LoadForecast:
    """The arrival rate to come, requests per second, in steps of `STEP_SECONDS` from `time_seconds` on.

    Its logarithm is a random walk: `deviation` is the standard deviation of the rate, `mean` its mean, in each step.
    In scenarios that are told to be trending its mean is `trend`, and the deviation is as large in proportion.
    """

    time_seconds: float
    mean: Floats  # [steps]
    deviation: Floats  # [steps], never less than in the step before, relative to the mean
    dispersion_ratio: float  # variance of the number of arrivals over its mean, at a given rate; 1: Poisson
    method: str
    refitted_seconds: float  # event time at which methods were last fitted and compared
    errors: Mapping[str, float]  # mean absolute scaled error by method over the recent past; NaN: not tried yet
    others: Mapping[str, Floats]  # [steps] mean by method
    pauses: Floats = field(default_factory=lambda: np.zeros(0))  # between recent arrivals, in units of their mean
    trend: Floats = field(default_factory=lambda: np.zeros(0))  # [steps] mean in scenarios that are trending

    def rate(self, horizon_seconds: float, method: str | None = None) -> float:
        """The mean over the next `horizon_seconds`, as forecast by the method in use or another."""
        path = self.mean if method is None else self.others[method]
        return float(path[: _steps(horizon_seconds)].mean()) if path.size else 0.0

    def scaled(self, factor: float) -> LoadForecast:
        """The same with `factor` times as many requests."""
        others = {name: factor * path for name, path in self.others.items()}
        return dataclasses.replace(
            self,
            mean=factor * self.mean,
            deviation=factor * self.deviation,
            others=others,
            trend=factor * self.trend,
        )

    def interval(self, horizon_seconds: float) -> tuple[float, float]:
        """The 10 % and 90 % quantiles of the rate at the end of `horizon_seconds`."""
        step = min(_steps(horizon_seconds), self.mean.size) - 1
        if step < 0 or self.mean[step] <= 0.0:
            return 0.0, 0.0
        spread = float(_log_deviation(self.mean, self.deviation)[step])
        middle = math.log(float(self.mean[step])) - spread**2 / 2.0
        return math.exp(middle - _QUANTILE_Z * spread), math.exp(middle + _QUANTILE_Z * spread)

    def outlook(self, horizons_seconds: Sequence[float]) -> LoadOutlook:
        """What is shown of it, over these horizons."""
        ahead = []
        for horizon in horizons_seconds:
            by_method = {name: self.rate(horizon, name) for name in self.others}
            ahead.append(LoadAhead(horizon, self.rate(horizon), *self.interval(horizon), by_method))
        return LoadOutlook(self.method, dict(self.errors), self.dispersion_ratio, self.refitted_seconds, tuple(ahead))

    def draw_arrivals(self, horizon_seconds: float, rng: np.random.Generator, trending: bool = False) -> Floats:
        """Sorted arrival times in (time, time + horizon), seconds, at a rate path of the forecast's distribution.

        Pauses are recent ones, some in a row at a time (a moving block bootstrap, Künsch 1989), so that requests come
        as bunched as they did; where too few are known, gamma-distributed ones, as bursty as told. Their clock runs at
        the drawn rate. With the same generator state a shorter horizon gives the beginning of a longer one.
        """
        path_rng, arrivals_rng = rng.spawn(2)
        rate = self.draw_rate(path_rng, trending)[: _steps(horizon_seconds)]
        expected = np.concatenate([np.zeros(1), np.cumsum(rate * STEP_SECONDS)])
        if expected[-1] <= 0.0:
            return np.zeros(0)
        chunks = [np.zeros(1)]
        while chunks[-1][-1] < expected[-1]:
            pauses = self._draw_pauses(arrivals_rng)
            chunks.append(chunks[-1][-1] + np.cumsum(pauses))
        elapsed = np.interp(np.concatenate(chunks[1:]), expected, STEP_SECONDS * np.arange(expected.size), right=np.inf)
        return np.asarray(self.time_seconds + elapsed[elapsed < horizon_seconds], np.float64)

    def _draw_pauses(self, rng: np.random.Generator) -> Floats:
        if self.pauses.size < _PAUSES // 10:
            return rng.gamma(1.0 / self.dispersion_ratio, self.dispersion_ratio, _CHUNK)
        begins = rng.integers(0, self.pauses.size - _PAUSES_TOGETHER + 1, _CHUNK // _PAUSES_TOGETHER)
        return np.asarray(self.pauses[begins[:, None] + np.arange(_PAUSES_TOGETHER)].ravel(), np.float64)

    def draw_rate(self, rng: np.random.Generator, trending: bool = False) -> Floats:
        """One path of the rate, requests per second: [steps]. `trending`: it goes on as it lately rose or fell."""
        spread = _log_deviation(self.mean, self.deviation)
        grown = np.diff(spread**2, prepend=0.0)
        walk = np.cumsum(np.sqrt(np.maximum(grown, 0.0)) * rng.standard_normal(spread.size))
        mean = self.trend if trending and self.trend.size else self.mean
        return np.asarray(mean * np.exp(walk - spread**2 / 2.0), np.float64)


class LoadForecaster:
    """Forecasts the load of one pool; keeps the methods fitted last until it is time to fit again.

    Any thread may ask.
    """

    def __init__(self, refit_seconds: float = REFIT_SECONDS) -> None:
        self._refit_seconds = refit_seconds
        self._lock = Lock()
        self._fitted: dict[str, Method] = {}
        self._errors: dict[str, float] = {}
        self._trials: _Trials | None = None
        self._expected = np.zeros(0)  # requests in each step since the last fit, as the method in use foresaw then
        self._method = USUAL_METHOD
        self._refitted_seconds = -math.inf
        self._history_steps = 0

    def forecast(self, snapshot: Snapshot, horizon_seconds: float, *, refit: bool = True) -> LoadForecast:
        """The arrivals over the next `horizon_seconds`. Deterministic in the snapshots forecast so far.

        Without `refit` the methods stay as they are, if any was fitted yet.
        """
        with self._lock:
            return self._forecast(snapshot, horizon_seconds, refit)

    def _forecast(self, snapshot: Snapshot, horizon_seconds: float, refit: bool) -> LoadForecast:
        fine = counts_of(snapshot)
        steps = _steps(horizon_seconds)
        history = _history(snapshot, fine, steps_ago=0)
        dispersion = dispersion_ratio(fine)
        due = snapshot.time_seconds - self._refitted_seconds >= self._refit_seconds
        doubled = history.steps.size >= 2 * self._history_steps  # tells much more
        if not self._fitted or (refit and (due or doubled or self._surprised(snapshot, history, dispersion))):
            self._refit(snapshot, fine, history, steps, dispersion)
        told = {name: method.predict(history, steps) for name, method in self._fitted.items()}
        mean, own = told[self._method]
        trending = trend(history, steps)
        if history.steps.size < _FEWEST_STEPS:
            mean = trending = np.full(steps, arrival_rate(snapshot) * STEP_SECONDS)
        return LoadForecast(
            time_seconds=snapshot.time_seconds,
            mean=mean / STEP_SECONDS,
            deviation=self._deviation(history, mean, own, dispersion) / STEP_SECONDS,
            dispersion_ratio=dispersion,
            method=self._method,
            refitted_seconds=self._refitted_seconds,
            errors=dict(self._errors),
            others={name: path / STEP_SECONDS for name, (path, _) in told.items()},
            pauses=_pauses(snapshot.recent.arrival),
            trend=trending / STEP_SECONDS,
        )

    def _surprised(self, snapshot: Snapshot, history: History, dispersion: float) -> bool:
        """Whether what came since the last fit is far from what it said: the level has shifted."""
        since = int((snapshot.time_seconds - self._refitted_seconds) // STEP_SECONDS)
        if not 0 <= since <= min(self._expected.size, history.steps.size):
            return True  # another past
        expected = float(self._expected[:since].sum())
        came = float(history.steps[history.steps.size - since :].sum())
        return abs(came - expected) > _SURPRISE * math.sqrt(dispersion * max(expected, 1.0))

    def _refit(self, snapshot: Snapshot, fine: Floats, history: History, steps: int, dispersion: float) -> None:
        self._fitted = fit_all(history, list(METHODS))
        self._refitted_seconds = snapshot.time_seconds
        self._history_steps = history.steps.size
        tried_steps = min(max(steps, _FEWEST_TRIED_STEPS), _tried_steps(history))
        trials = _trials(snapshot, fine, list(self._fitted), tried_steps)
        errors = {name: (trials.error(name) if trials else math.nan) for name in self._fitted}
        self._errors = errors
        tried = {name: error for name, error in errors.items() if not math.isnan(error)}
        self._method = min(tried, key=lambda name: tried[name]) if tried else USUAL_METHOD
        if tried and tried[self._method] > _BETTER_RATIO * tried[USUAL_METHOD]:
            self._method = USUAL_METHOD
        self._trials = trials
        ahead = max(1, math.ceil(self._refit_seconds / STEP_SECONDS))
        self._expected = self._fitted[self._method].predict(history, ahead)[0]

    def _deviation(self, history: History, mean: Floats, own: Floats, dispersion: float) -> Floats:
        """Standard deviation of requests expected in each step: the largest of three answers.

        What the method says (less what its first step has: that is the chance of single arrivals), what it got wrong
        lately, and what the last minutes cannot tell as they hold so many requests only.
        """
        safe = np.maximum(mean, 1e-12)
        counted = persistence_steps(history.steps)
        level = max(float(history.steps[-counted:].sum()), 1.0) if history.steps.size else 1.0
        ahead_seconds = STEP_SECONDS * np.arange(1.0, mean.size + 1.0, dtype=np.float64)
        observed = _PRIOR_RELATIVE_VARIANCE * ahead_seconds
        if self._trials is not None:
            moments = self._trials.independent
            tried = self._trials.relative_variance(self._method, dispersion, ahead_seconds)
            observed = (_PRIOR_TRIALS * observed + moments * tried) / (_PRIOR_TRIALS + moments)
        relative = np.maximum(np.maximum((own**2 - own[:1] ** 2) / safe**2, observed), dispersion / level)
        return np.asarray(np.sqrt(np.maximum.accumulate(np.minimum(relative, _MOST_RELATIVE_DEVIATION**2))) * mean)


# --- trying methods on the past -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trials:
    """What methods said at some moments of the past, in blocks of the horizon, beside what came: requests."""

    predicted: Mapping[str, Floats]  # [moments, blocks]
    came: Floats  # [moments, blocks]
    block_seconds: float
    scale: float  # mean absolute difference between a block and the one before

    @property
    def independent(self) -> float:
        """Moments, without what they have in common: each begins a third of the horizon before the next."""
        return float(1.0 + (self.came.shape[0] - 1) / _ORIGINS_IN_HORIZON)

    def error(self, name: str) -> float:
        """Mean absolute scaled error (Hyndman and Koehler, 2006): 1 is as bad as taking each block for the last."""
        return float(np.abs(self.predicted[name] - self.came).mean() / self.scale)

    def relative_variance(self, name: str, dispersion: float, ahead_seconds: Floats) -> Floats:
        """Squared errors so far ahead that the chance of single arrivals does not explain, over the squared mean.

        Further ahead than was tried they grow with time, as a random walk's do.
        """
        predicted = np.maximum(self.predicted[name], 1e-12)
        squares = (self.came - predicted) ** 2 - dispersion * predicted
        blocks = np.maximum(squares.mean(axis=0), 0.0) / np.maximum((predicted**2).mean(axis=0), 1e-12)
        middles = (np.arange(blocks.size) + 0.5) * self.block_seconds
        return np.asarray(np.interp(ahead_seconds, middles, blocks) * np.maximum(1.0, ahead_seconds / middles[-1]))


def _tried_steps(history: History) -> int:
    return max(0, (history.steps.size - _FEWEST_TRAINING_STEPS) // 2)


def _trials(snapshot: Snapshot, fine: Floats, names: list[str], steps: int) -> _Trials | None:
    """Try methods from moments up to where the horizon ends now; None where the history is too short for one."""
    block = steps // _BLOCKS
    if block < 1:
        return None
    steps = block * _BLOCKS
    known = _history(snapshot, fine, steps_ago=0).steps
    predicted: dict[str, list[Floats]] = {name: [] for name in names}
    came = []
    for origin in range(_ORIGINS):
        ago = steps + origin * max(1, steps // _ORIGINS_IN_HORIZON)
        if known.size - ago < _FEWEST_TRAINING_STEPS:
            break
        history = _history(snapshot, fine, steps_ago=ago)
        came.append(_in_blocks(known[known.size - ago : known.size - ago + steps], block))
        fitted = fit_all(history, names)
        for name in names:
            if name in fitted:
                predicted[name].append(_in_blocks(fitted[name].predict(history, steps)[0], block))
    if not came:
        return None
    blocks = _in_blocks(known[known.size % block :], block)
    differences = np.abs(np.diff(blocks))
    scale = float(differences.mean()) if differences.size else 0.0
    everywhere = {name: np.array(paths) for name, paths in predicted.items() if len(paths) == len(came)}
    unknown = np.full((len(came), _BLOCKS), np.nan)  # a method that did not apply at all moments
    return _Trials(
        {name: everywhere.get(name, unknown) for name in names}, np.array(came), block * STEP_SECONDS, scale or 1.0
    )


def _in_blocks(steps: Floats, block: int) -> Floats:
    return np.asarray(steps[: steps.size // block * block].reshape(-1, block).sum(axis=1))


# --- the history --------------------------------------------------------------------------------------------------


def counts_of(snapshot: Snapshot) -> Floats:
    """Arrivals in buckets of `COUNT_SECONDS`, gaps filled; from the recent requests where no longer past is known."""
    if snapshot.arrivals.fine.size:
        return fill_gaps(snapshot.arrivals.fine.astype(np.float64))
    arrivals = snapshot.recent.arrival
    if not arrivals.size:
        return np.zeros(0)
    buckets = np.floor_divide(arrivals, COUNT_SECONDS).astype(np.int64)
    begin, end = int(buckets[0]) + 1, int(snapshot.time_seconds // COUNT_SECONDS)
    inside = buckets[(buckets >= begin) & (buckets < end)]
    return fill_gaps(np.bincount(inside - begin, minlength=max(0, end - begin)).astype(np.float64))


def fill_gaps(counts: Floats) -> Floats:
    """Counts with a straight line through stretches of zeros that cannot be chance: nothing was heard of the stream.

    Zeros at the end stay: whether they will prove to be a gap is not known yet.
    """
    filled = counts.copy()
    edges = np.flatnonzero(np.diff(np.concatenate([np.zeros(1), counts == 0.0, np.zeros(1)])))
    for begin, end in edges.reshape(-1, 2):
        if begin == 0 or end == counts.size:
            continue
        before, behind = counts[max(0, begin - _NEIGHBOURS) : begin].mean(), counts[end : end + _NEIGHBOURS].mean()
        if min(before, behind) * (end - begin) > _IMPOSSIBLE_REQUESTS:
            filled[begin:end] = np.linspace(before, behind, end - begin + 2)[1:-1]
    return filled


def dispersion_ratio(counts: Floats) -> float:
    """Variance of the arrivals in a bucket over their mean, of the last hour; slow changes of the rate left out.

    Half the mean squared difference of neighbours is their variance (von Neumann, 1941).
    """
    recent = counts[-_DISPERSION_BUCKETS:]
    if recent.sum() < _DISPERSION_REQUESTS or recent.size < 3:
        return 1.0
    lowest, highest = DISPERSION_LIMITS
    likely = (recent.size * relative_variance(recent) + _POISSON_BUCKETS) / (recent.size + _POISSON_BUCKETS)
    return float(np.clip(likely, lowest, highest))


def _pauses(arrival: Floats) -> Floats:
    """Between the newest arrivals, in units of the mean of those around, so that a rate that changes is no burst."""
    pauses = np.diff(arrival[-_PAUSES - 1 :])
    if pauses.size < _PAUSES // 10:
        return np.zeros(0)
    window = np.ones(min(2 * _PAUSES_AROUND + 1, pauses.size))  # "same" is as long as the longer of the two
    around = np.convolve(pauses, window, "same") / np.convolve(np.ones(pauses.size), window, "same")
    relative = np.divide(pauses, around, out=np.ones(pauses.size), where=around > 0.0)
    return np.asarray(relative / relative.mean(), np.float64)


def _history(snapshot: Snapshot, fine: Floats, steps_ago: int) -> History:
    """What was known `steps_ago` steps before the snapshot."""
    per_step = round(STEP_SECONDS / COUNT_SECONDS)
    known = fine[: fine.size - steps_ago * per_step] if steps_ago else fine
    steps = known[known.size % per_step :].reshape(-1, per_step).sum(axis=1)
    coarse = fill_gaps(snapshot.arrivals.coarse.astype(np.float64))
    now = snapshot.time_seconds - steps_ago * STEP_SECONDS
    missing = int(snapshot.time_seconds // COARSE_COUNT_SECONDS) - int(now // COARSE_COUNT_SECONDS)
    return History(
        steps=steps,
        coarse=coarse[: max(0, coarse.size - missing)],
        lag_seconds=now % COARSE_COUNT_SECONDS,
    )


def _steps(horizon_seconds: float) -> int:
    return max(1, math.ceil(horizon_seconds / STEP_SECONDS))


def _log_deviation(mean: Floats, deviation: Floats) -> Floats:
    """Standard deviation of the logarithm of a log-normal rate with this mean and standard deviation."""
    relative = np.divide(deviation, mean, out=np.zeros_like(mean), where=mean > 0.0)
    return np.asarray(np.maximum.accumulate(np.sqrt(np.log1p(relative**2))))


def arrival_rate(snapshot: Snapshot) -> float:
    """Requests per second over the recent window, 0 where fewer than two requests were seen.

    The window begins at its first arrival, which then only tells when: a stream that just began is not taken for one
    that was silent before, and what came behind the first is a fair sample whether the window was full or not.
    """
    arrivals = snapshot.recent.arrival
    if arrivals.size < 2:
        return 0.0
    window = max(snapshot.time_seconds - float(arrivals[0]), _SHORTEST_WINDOW_SECONDS)
    return (arrivals.size - 1) / window
