"""The load to come: how many requests arrive when.

The rate is forecast by weights that were learnt from days of errors (`lag_regression`), or by persistence while too
little is known. The errors of those days tell how uncertain it is. A scenario draws a path of the rate from that
distribution, then arrivals at that rate, as bursty as those that came lately. Where the rate is climbing or falling
nobody knows how far: in some scenarios it goes on.
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

from kavier_twin.forecast import lag_regression
from kavier_twin.forecast.lag_regression import LEAD_MINUTES, Minutes
from kavier_twin.forecast.load_methods import (
    DISPERSION_LIMITS,
    LAG_REGRESSION,
    MINUTE_STEPS,
    PERSISTENCE,
    STEP_SECONDS,
    History,
    LagRegression,
    persistence,
    persistence_minutes,
    persistence_steps,
    relative_variance,
    trend,
)
from kavier_twin.mirror.snapshot import COUNT_SECONDS, Snapshot
from kavier_twin.simulation.plain import Figure

Floats = npt.NDArray[np.float64]

REFIT_SECONDS = 120.0
_FEWEST_STEPS = 4  # fewer say less than the recent requests themselves
_SHORTEST_WINDOW_SECONDS = 1.0  # two requests in a millisecond are no rate of thousands a second
_IMPOSSIBLE_REQUESTS = 14.0  # none where so many were due has odds of one in a million: exp(-14)
_NEIGHBOURS = 6  # buckets on each side of a gap that tell how many were due
_DISPERSION_REQUESTS = 50  # fewer tell nothing of how bursty they are
_DISPERSION_BUCKETS = 360  # an hour
_POISSON_BUCKETS = 20  # beside them, so that a few buckets do not tell much
_MOST_RELATIVE_DEVIATION = 1.0
# Before any error is known: a rate that doubles or halves within a quarter of an hour is two deviations off. (On the
# hour of Azure's production chat, which neither ramps nor bursts, persistence is a fifth off.) It counts like so many
# errors.
_PRIOR_RELATIVE_VARIANCE = 0.35**2 / 900.0  # per second ahead
_PRIOR_ERRORS = 2.0
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

    method: Annotated[str, Field(description="In use.", examples=["lag_regression"])]
    errors: Annotated[
        dict[str, Figure],
        Field(
            description="Mean absolute scaled error by method over the last days; null: not known yet.",
            examples=[{"persistence": 1.1}],
        ),
    ]
    dispersion_ratio: Annotated[
        float, Field(description="Variance divided by mean of arrival counts. 1 is a Poisson process.", examples=[1.0])
    ]
    refitted_seconds: Annotated[
        Figure,
        Field(description="Event time of the last fit, in Unix seconds for live sources.", examples=[1767225600.5]),
    ]
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
    refitted_seconds: float  # event time of the last fit
    errors: Mapping[str, float]  # mean absolute scaled error by method over the last days; NaN: not known yet
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
    """Forecasts the load of one pool; keeps the last fit until it is time for another. Any thread may ask."""

    def __init__(self, refit_seconds: float = REFIT_SECONDS) -> None:
        self._refit_seconds = refit_seconds
        self._lock = Lock()
        self._fitted: lag_regression.Fitted | None = None
        self._refitted_seconds = -math.inf
        self._history_steps = 0

    def forecast(self, snapshot: Snapshot, horizon_seconds: float, *, refit: bool = True) -> LoadForecast:
        """The arrivals over the next `horizon_seconds`. Deterministic in the snapshots forecast so far.

        Without `refit` the weights stay as they are, if any were fitted yet.
        """
        with self._lock:
            return self._forecast(snapshot, horizon_seconds, refit)

    def _forecast(self, snapshot: Snapshot, horizon_seconds: float, refit: bool) -> LoadForecast:
        fine = counts_of(snapshot)
        steps = _steps(horizon_seconds)
        history = _history(snapshot, fine)
        dispersion = dispersion_ratio(fine)
        now = snapshot.time_seconds
        due = not 0.0 <= now - self._refitted_seconds < self._refit_seconds  # a time before the fit: another past
        doubled = history.steps.size >= 2 * self._history_steps  # tells much more
        if self._refitted_seconds == -math.inf or (refit and (due or doubled)):
            self._fitted = lag_regression.fit(history.minutes, persistence_minutes(history.steps))
            self._refitted_seconds = now
            self._history_steps = history.steps.size
        others = {PERSISTENCE: np.full(steps, persistence(history.steps))}
        errors = {PERSISTENCE: math.nan}
        method = PERSISTENCE
        if self._fitted is not None and history.steps.size:
            method = LAG_REGRESSION
            others[method] = LagRegression(self._fitted).predict(history, steps)
            errors = _scaled_errors(self._fitted, steps)
        mean = others[method]
        trending = trend(history, steps)
        if history.steps.size < _FEWEST_STEPS:
            mean = trending = np.full(steps, arrival_rate(snapshot) * STEP_SECONDS)
        return LoadForecast(
            time_seconds=now,
            mean=mean / STEP_SECONDS,
            deviation=self._relative_deviation(history, mean, dispersion) * mean / STEP_SECONDS,
            dispersion_ratio=dispersion,
            method=method,
            refitted_seconds=self._refitted_seconds,
            errors=errors,
            others={name: path / STEP_SECONDS for name, path in others.items()},
            pauses=_pauses(snapshot.recent.arrival),
            trend=trending / STEP_SECONDS,
        )

    def _relative_deviation(self, history: History, mean: Floats, dispersion: float) -> Floats:
        """[steps]: standard deviation of the rate over its mean.

        The errors of the past are those of mean rates from now to the end of each lead. The logarithm of the rate is a
        random walk, and its increments are solved for, lead after lead, so that the means have those variances. What
        single arrivals add by chance is left out: scenarios draw them.
        """
        counted = persistence_steps(history.steps)
        level = max(float(history.steps[-counted:].sum()), 1.0) if history.steps.size else 1.0
        ends = MINUTE_STEPS * np.array(LEAD_MINUTES[1:])
        known = _PRIOR_RELATIVE_VARIANCE * STEP_SECONDS * ends / 3.0 + dispersion / level  # a third of that at the end
        if self._fitted is not None:
            turbulence = float(Minutes(history.minutes).turbulence(np.array([history.minutes.size]))[0])
            seen = (self._fitted.deviation_to_turbulence * turbulence) ** 2
            seen = np.maximum(seen - dispersion / np.maximum(self._fitted.requests, 1.0), dispersion / level)
            count = np.where(np.isfinite(seen), self._fitted.independent, 0.0)
            known = (_PRIOR_ERRORS * known + count * np.nan_to_num(seen)) / (_PRIOR_ERRORS + count)
        known = np.minimum(known, _MOST_RELATIVE_DEVIATION**2)
        grown = np.zeros(max(mean.size, int(ends[-1])))
        grown[0] = known[0]  # the level of now: the shortest lead tells no more
        for begin, end, variance in zip(ends[:-1], ends[1:], known[1:], strict=True):
            share = ((end - np.arange(end)) / end) ** 2
            missing = max(0.0, float(variance - grown[:end] @ share))
            grown[begin:end] = missing / share[begin:].sum()
        grown[ends[-1] :] = grown[ends[-2] : ends[-1]].mean()
        walked = np.minimum(np.cumsum(grown)[: mean.size], math.log1p(_MOST_RELATIVE_DEVIATION**2))
        return np.asarray(np.sqrt(np.expm1(walked)), np.float64)


def _scaled_errors(fitted: lag_regression.Fitted, steps: int) -> dict[str, float]:
    """Mean absolute scaled errors (Hyndman and Koehler, 2006) up to the last lead that ends within the horizon and is
    known: 1 is as bad as taking each stretch for the one before."""
    inside = np.array(LEAD_MINUTES[1:]) * MINUTE_STEPS <= max(steps, MINUTE_STEPS)
    lead = int(np.flatnonzero(inside & np.isfinite(fitted.scale)).max(initial=0))
    scale = float(fitted.scale[lead]) or 1.0
    both = {PERSISTENCE: fitted.persistence_error, LAG_REGRESSION: fitted.error}
    return {name: float(error[lead]) / scale for name, error in both.items()}


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


def _history(snapshot: Snapshot, fine: Floats) -> History:
    per_step = round(STEP_SECONDS / COUNT_SECONDS)
    steps = fine[fine.size % per_step :].reshape(-1, per_step).sum(axis=1)
    return History(steps, fill_gaps(snapshot.arrivals.coarse.astype(np.float64)))


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
