"""Forecasts judged by what came.

Every forecast of the policy in force is kept until its time has come. Then its medians are compared with what was
observed, beside persistence (the same KPI over as long a time before the forecast), its intervals with how often they
covered, its breach probabilities with how often the objective broke, and its alerts with the breaches that followed.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from kavier_twin.forecast.result import Forecast, Row
from kavier_twin.forecast.slo import Slo
from kavier_twin.scores.alerts import HOLD_SECONDS, standing
from kavier_twin.scores.conformal import Widening
from kavier_twin.scores.correction import Correction
from kavier_twin.scores.observed import Floats, Reality
from kavier_twin.scores.serving import Foretold, interval, movement, possible, served
from kavier_twin.simulation.footprint import Footprint
from kavier_twin.simulation.kpi_table import Metric
from kavier_twin.simulation.plain import Figure

SETTLE_SECONDS: Final = 120.0  # for which requests that arrived in time are waited for until they end
JUDGED: Final = 2_000  # newest forecasts that a score is of
RELIABILITY_BINS: Final = 10
READINGS: Final = 500  # of an engine over the longest horizon, at most: what bounds their memory
SILENT_SECONDS: Final = 10.0  # a stream without a record for longer: nothing happened
GAP_MOMENTS: Final = 2  # so many forecasts without a breach do not end it
DAY_SECONDS: Final = 86_400.0


class ScoredKpi(NamedTuple):
    """One KPI of one forecast and what came. Units are the KPI's, times seconds of event time."""

    time_seconds: float
    horizon_seconds: float
    kpi: Metric
    low: float
    median: float
    high: float
    wide_low: float
    wide_high: float
    persisted: float  # NaN: too little was known before
    observed: float
    served: float  # the median as corrected
    known: float  # what was known of `persisted` when the forecast was made; NaN: too little


class ScoredBreach(NamedTuple):
    """How likely a breach was said to be, and whether it came."""

    time_seconds: float
    horizon_seconds: float
    slo: str
    probability: float
    breached: bool
    simulated: float  # the share of scenarios


class Moment(NamedTuple):
    """One objective when a forecast was made: how likely it was to be broken over any time as long as the shortest
    horizon before the longest one ends, and whether it was so just then."""

    time_seconds: float
    slo: str
    probability: float
    breached: bool


class Settled(NamedTuple):
    """What became known at once."""

    kpis: list[ScoredKpi]
    breaches: list[ScoredBreach]
    moments: list[Moment]


ForecastCount = Annotated[int, Field(examples=[120])]
HorizonSeconds = Annotated[float, Field(examples=[300])]
Kpi = Annotated[Metric, Field(examples=["ttft_p99_seconds"])]
SloName = Annotated[str, Field(examples=["fast"])]


@dataclass(frozen=True)
class KpiScore:
    """How well one KPI was forecast over one horizon. Errors are mean absolute ones, in the KPI's unit."""

    kpi: Kpi
    horizon_seconds: HorizonSeconds
    forecasts: Annotated[int, Field(description="Judged.", examples=[120])]
    error: Annotated[Figure, Field(description="Mean absolute error of the simulated medians.", examples=[0.08])]
    persistence_error: Annotated[
        Figure, Field(description="Mean absolute error of persistence, if known.", examples=[0.11])
    ]
    error_to_persistence_ratio: Annotated[Figure, Field(description="Below 1 is better.", examples=[0.73])]
    served_error: Annotated[Figure, Field(description="Mean absolute error of the corrected medians.", examples=[0.07])]
    served_error_to_persistence_ratio: Annotated[Figure, Field(examples=[0.64])]
    coverage_ratio: Annotated[
        Figure, Field(description="Share of observed values inside the simulated interval.", examples=[0.7])
    ]
    widened_coverage_ratio: Annotated[
        Figure, Field(description="Share of observed values inside the widened interval.", examples=[0.9])
    ]
    width: Annotated[Figure, Field(description="Mean simulated interval width.", examples=[0.2])]
    widened_width: Annotated[Figure, Field(examples=[0.4])]


@dataclass(frozen=True)
class Bin:
    """Forecasts with breach probabilities of about the same size."""

    lower: Annotated[float, Field(description="Lower bound of the bin. Bins are 0.1 wide.", examples=[0.3])]
    forecasts: Annotated[int, Field(examples=[14])]
    probability: Annotated[float, Field(description="Mean.", examples=[0.34])]
    breached_ratio: Annotated[
        float, Field(description="Share of forecasts that were followed by a violation.", examples=[0.36])
    ]


@dataclass(frozen=True)
class BreachScore:
    """How true the breach probabilities of one objective over one horizon were."""

    slo: SloName
    horizon_seconds: HorizonSeconds
    forecasts: ForecastCount
    breached: Annotated[int, Field(description="Number of forecasts that were followed by a violation.", examples=[9])]
    brier: Annotated[Figure, Field(description="Brier score. 0 is perfect.", examples=[0.04])]
    simulated_brier: Annotated[Figure, Field(description="Brier score of the share of scenarios.", examples=[0.05])]
    persistence_brier: Annotated[Figure, Field(description="Brier score of persistence.", examples=[0.07])]
    reliability: Annotated[tuple[Bin, ...], Field(description="Bins in ascending order, without empty ones.")]


@dataclass(frozen=True)
class AlertScore:
    """Alerts of one objective compared with its breaches. Either is one however many forecasts it lasts."""

    slo: SloName
    alerts: Annotated[int, Field(examples=[4])]
    breaches: Annotated[int, Field(examples=[3])]
    precision: Annotated[
        Figure,
        Field(
            description="Share of alerts that were followed by a violation within the longest horizon.", examples=[0.75]
        ),
    ]
    recall: Annotated[Figure, Field(description="Share of violations that were preceded by an alert.", examples=[1.0])]
    lead_seconds: Annotated[
        tuple[float, ...],
        Field(description="Time from the alert to the violation, one value each.", examples=[[340, 420, 610]]),
    ]
    median_lead_seconds: Annotated[Figure, Field(examples=[420])]
    most_lead_seconds: Annotated[
        tuple[float, ...],
        Field(
            description="Lead times if each alert had started right after the previous violation.",
            examples=[[900, 420, 1800]],
        ),
    ] = ()
    alerts_per_day: Annotated[Figure, Field(description="Judged alerts.", examples=[4.0])] = math.nan
    false_alerts_per_day: Annotated[
        Figure, Field(description="Judged alerts that no breach followed.", examples=[0.5])
    ] = math.nan
    healthy_alert_minutes_per_day: Annotated[
        Figure,
        Field(description="Under an alert while the objective held and no breach followed in time.", examples=[12.0]),
    ] = math.nan


@dataclass(frozen=True)
class Interval:
    """Of the last forecast: as simulated, and as served: corrected and widened."""

    kpi: Kpi
    horizon_seconds: HorizonSeconds
    low: Annotated[Figure, Field(examples=[0.6])]
    median: Annotated[Figure, Field(examples=[0.7])]
    high: Annotated[Figure, Field(examples=[0.8])]
    wide_low: Annotated[Figure, Field(examples=[0.5])]
    served: Annotated[Figure, Field(description="Corrected median.", examples=[0.72])]
    wide_high: Annotated[Figure, Field(examples=[0.9])]


@dataclass(frozen=True)
class Scores:
    """How good a pool's forecasts have been."""

    kpis: tuple[KpiScore, ...] = ()
    breaches: tuple[BreachScore, ...] = ()
    alerts: tuple[AlertScore, ...] = ()
    intervals: tuple[Interval, ...] = ()
    pending: Annotated[
        int,
        Field(description="Number of forecasts, summed over horizons, whose horizon has not ended yet.", examples=[12]),
    ] = 0
    unscored: Annotated[
        Mapping[str, int],
        Field(description="Number of forecasts that could not be scored, by reason.", examples=[{"interrupted": 3}]),
    ] = field(default_factory=dict)
    unobserved: Annotated[
        Mapping[Metric, int],
        Field(
            description="Number of forecasts that could not be scored because no telemetry reported the KPI, by KPI.",
            examples=[{"power_watts": 120}],
        ),
    ] = field(default_factory=dict)


class _Measure(Protocol):
    def __call__(self, start: float, stop: float) -> dict[Metric, float]: ...


class Foreseen(NamedTuple):
    """A forecast over one horizon."""

    time_seconds: float
    horizon_seconds: float
    kpis: dict[Metric, Foretold]
    breach: dict[str, tuple[float, float]]  # by objective: the probability as served, and the share of scenarios


class Scorer:
    """Judges one pool's forecasts. `reality` is to be told what happens; nothing here reads a clock.

    Scores are of the newest `judged` forecasts of each KPI and horizon; None: of all.
    """

    def __init__(self, slos: Sequence[Slo], judged: int | None = JUDGED) -> None:
        self.reality = Reality()
        self.unscored: dict[str, int] = defaultdict(int)
        self.unobserved: dict[Metric, int] = defaultdict(int)
        self._slos = {slo.name: slo for slo in slos}
        self._pending: deque[Foreseen] = deque()
        self._moments: deque[tuple[float, float, dict[str, float]]] = deque()
        self._widenings: dict[tuple[float, Metric], Widening] = {}
        self._corrections: dict[tuple[float, Metric], Correction] = {}
        self._kpis: dict[tuple[float, Metric], deque[ScoredKpi]] = defaultdict(lambda: deque(maxlen=judged))
        self._breaches: dict[tuple[float, str], deque[ScoredBreach]] = defaultdict(lambda: deque(maxlen=judged))
        self._told: dict[str, deque[Moment]] = defaultdict(lambda: deque(maxlen=judged))
        self._longest_horizon = 0.0
        self._newest = -math.inf  # forecast kept
        self._intervals: tuple[Interval, ...] = ()
        self._footprint: Footprint | None = None  # the last told

    def save(self) -> tuple[dict[str, Any], dict[str, Floats]]:
        """What depends on the position in the stream, as JSON types, and arrays by name: all but what was judged."""
        reality, arrays = self.reality.save()
        document = {
            "reality": reality,
            "pending": list(self._pending),
            "moments": list(self._moments),
            "newest_seconds": self._newest,
            "longest_horizon_seconds": self._longest_horizon,
            "unscored": dict(self.unscored),
            "unobserved": dict(self.unobserved),
        }
        return document, arrays

    def restore(self, document: Mapping[str, Any], arrays: Mapping[str, Floats]) -> None:
        """What `save` gave."""
        self.reality.restore(document["reality"], arrays)
        for time, horizon, kpis, breach in document["pending"]:
            told = {kpi: Foretold(*values) for kpi, values in kpis.items()}
            self._pending.append(
                Foreseen(time, horizon, told, {slo: (said, share) for slo, (said, share) in breach.items()})
            )
        self._moments.extend((time, window, probabilities) for time, window, probabilities in document["moments"])
        self._newest, self._longest_horizon = document["newest_seconds"], document["longest_horizon_seconds"]
        self.unscored.update(document["unscored"])
        self.unobserved.update(document["unobserved"])

    def needed_since(self, now_seconds: float) -> float:
        """What ended before this event time judges nothing any more."""
        return now_seconds - 2.0 * self._longest_horizon - SETTLE_SECONDS

    def foresee(self, forecast: Forecast, policy: str) -> Forecast:
        """Keep what was foreseen under `policy`, the one in force. Returns the forecast as it is to be served.

        A forecast no later than the last one is not kept: nothing happened in between.
        """
        rows = [row for row in forecast.rows if row.policy == policy]
        told: dict[tuple[float, Metric], Foretold] = {}
        for row in rows:
            told |= self._foretell(forecast.time_seconds, row)
        shown = served(forecast, told, list(self._slos.values()))
        if not rows or forecast.time_seconds <= self._newest:
            return shown
        self._newest = forecast.time_seconds
        for row, served_row in zip(rows, (row for row in shown.rows if row.policy == policy), strict=True):
            horizon = row.horizon_seconds
            breach = {}
            for name, said in served_row.breach_probability.items():
                breach[name] = (said, row.breach_probability[name])
            kpis = {metric: one for (at, metric), one in told.items() if at == horizon}
            self._keep(Foreseen(forecast.time_seconds, horizon, kpis, breach))
        self._intervals = tuple(Interval(metric, horizon, *one[:6]) for (horizon, metric), one in told.items())
        shortest = min(row.horizon_seconds for row in rows)
        first = {one.slo: one.probability for one in forecast.first_breaches if one.policy == policy}
        self._moments.append((forecast.time_seconds, shortest, {slo: first.get(slo, 0.0) for slo in self._slos}))
        return shown

    def _foretell(self, time_seconds: float, row: Row) -> dict[tuple[float, Metric], Foretold]:
        """The row's KPIs, corrected and widened."""
        horizon = row.horizon_seconds
        known: Mapping[Metric, float] = {}
        # Up to where everything is known: what happened in the last moments may not have been applied yet.
        until = self.reality.until_seconds
        until = time_seconds if time_seconds > until + SILENT_SECONDS else min(until, time_seconds)
        if until - horizon >= self.reality.since_seconds:
            known = self.reality.measure(until - horizon, until, self._footprint)
        told = {}
        for metric, values in row.kpis.items():
            low, median, high = interval(values)
            if not math.isfinite(median):
                continue
            before = known.get(metric, math.nan)
            corrected = possible(metric, self._correction(horizon, metric).serve(median, before))
            ends = _moved(low, median, high, corrected)
            wide_low, wide_high = self._widening(horizon, metric).widen(ends[0], corrected, ends[1])
            wide_low, wide_high = possible(metric, wide_low), possible(metric, wide_high)
            told[horizon, metric] = Foretold(low, median, high, wide_low, corrected, wide_high, before)
        return told

    def _correction(self, horizon_seconds: float, metric: Metric) -> Correction:
        return self._corrections.setdefault((horizon_seconds, metric), Correction(horizon_seconds))

    def _widening(self, horizon_seconds: float, metric: Metric) -> Widening:
        """What was learnt of this horizon; with what was of shorter ones until then."""
        if (horizon_seconds, metric) not in self._widenings:
            shorter = [found for (at, of), found in self._widenings.items() if of == metric and at < horizon_seconds]
            self._widenings[horizon_seconds, metric] = Widening(horizon_seconds, shorter)
        return self._widenings[horizon_seconds, metric]

    def _keep(self, one: Foreseen) -> None:
        self._pending.append(one)
        self._newest = max(self._newest, one.time_seconds)
        self._longest_horizon = max(self._longest_horizon, one.horizon_seconds)
        self.reality.readings.spacing_seconds = self._longest_horizon / READINGS

    def settle(self, now_seconds: float, footprint: Footprint | None = None) -> Settled:
        """Judge what can be judged at this event time. Returns what is new. Without a `footprint` watts, energy,
        carbon and cost are not."""
        self._footprint = footprint
        settled = Settled([], [], [])
        waiting: deque[Foreseen] = deque()
        measured: dict[tuple[float, float], dict[Metric, float]] = {}

        def measure(start: float, stop: float) -> dict[Metric, float]:
            if (start, stop) not in measured:
                measured[start, stop] = self.reality.measure(start, stop, footprint)
            return measured[start, stop]

        while self._pending:
            one = self._pending.popleft()
            stop = one.time_seconds + one.horizon_seconds
            if not self._known(stop, now_seconds):
                waiting.append(one)
            elif one.time_seconds < self.reality.since_seconds:
                self.unscored["interrupted"] += 1  # the twin was not there for part of its time
            else:
                self._judge(one, measure, settled)
        self._pending = waiting
        while self._moments and self._known(self._moments[0][0], now_seconds):
            time, window, probabilities = self._moments.popleft()
            if time - window < self.reality.since_seconds:
                continue
            now = measure(time - window, time)
            for name, probability in probabilities.items():
                if name in self._slos and self._slos[name].metric in now:
                    breached = self._slos[name].breached(now[self._slos[name].metric])
                    settled.moments.append(Moment(time, name, probability, breached))
        self.remember(settled)
        self.reality.forget(self.needed_since(now_seconds))
        return settled

    def remember(self, settled: Settled) -> None:
        """Count what was judged, now or before a restart."""
        for kpi in sorted(settled.kpis, key=lambda one: one.horizon_seconds):  # shorter horizons lend to longer ones
            self._kpis[kpi.horizon_seconds, kpi.kpi].append(kpi)
            correction = self._correction(kpi.horizon_seconds, kpi.kpi)
            correction.observe(kpi.time_seconds, kpi.median, kpi.known, kpi.observed)
            low, high = _moved(kpi.low, kpi.median, kpi.high, kpi.served)
            self._widening(kpi.horizon_seconds, kpi.kpi).observe(
                low, kpi.served, high, kpi.wide_low, kpi.wide_high, kpi.observed
            )
        for breach in settled.breaches:
            self._breaches[breach.horizon_seconds, breach.slo].append(breach)
        for moment in settled.moments:
            self._told[moment.slo].append(moment)

    def scores(self) -> Scores:
        """As it stands."""
        horizons = sorted({horizon for horizon, _ in self._kpis})
        states = {(m.slo, m.time_seconds): m.breached for moments in self._told.values() for m in moments}
        return Scores(
            kpis=tuple(kpi_score(rows) for _, rows in sorted(self._kpis.items()) if rows),
            breaches=tuple(breach_score(rows, states) for _, rows in sorted(self._breaches.items()) if rows),
            alerts=tuple(
                alert_score(moments, max(horizons, default=0.0)) for _, moments in sorted(self._told.items()) if moments
            ),
            intervals=self._intervals,
            pending=len(self._pending),
            unscored=dict(self.unscored),
            unobserved=dict(self.unobserved),
        )

    def _known(self, until_seconds: float, now_seconds: float) -> bool:
        if now_seconds < until_seconds:
            return False
        return now_seconds >= until_seconds + SETTLE_SECONDS or self.reality.complete(until_seconds, SETTLE_SECONDS)

    def _judge(self, one: Foreseen, measure: _Measure, settled: Settled) -> None:
        start, stop = one.time_seconds, one.time_seconds + one.horizon_seconds
        observed = measure(start, stop)
        before: Mapping[Metric, float] = {}
        if start - one.horizon_seconds >= self.reality.since_seconds:
            before = measure(start - one.horizon_seconds, start)
        for kpi, values in one.kpis.items():
            seen = observed.get(kpi, math.nan)
            if math.isfinite(seen):
                persisted = before.get(kpi, math.nan)
                wide = (values.low, values.median, values.high, values.wide_low, values.wide_high)
                after = (values.served, values.known)
                settled.kpis.append(ScoredKpi(start, one.horizon_seconds, kpi, *wide, persisted, seen, *after))
        for name, (probability, simulated) in one.breach.items():
            if name in self._slos and self._slos[name].metric in observed:
                breached = self._slos[name].breached(observed[self._slos[name].metric])
                settled.breaches.append(
                    ScoredBreach(start, one.horizon_seconds, name, probability, breached, simulated)
                )
        asked = {*one.kpis, *(self._slos[name].metric for name in one.breach if name in self._slos)}
        for kpi in sorted(asked - observed.keys()):
            self.unobserved[kpi] += 1


def _moved(low: float, median: float, high: float, corrected: float) -> tuple[float, float]:
    """The ends of an interval whose median becomes another."""
    factor, shift = movement(median, corrected)
    return factor * low + shift, factor * high + shift


def kpi_score(rows: Iterable[ScoredKpi]) -> KpiScore:
    """Of forecasts of one KPI over one horizon, at least one."""
    rows = list(rows)
    columns = np.array([row[3:] for row in rows], np.float64).T
    low, median, high, wide_low, wide_high, persisted, observed, corrected, _ = columns
    error = np.abs(median - observed)
    served_error = np.abs(corrected - observed)
    both = np.isfinite(persisted)
    persistence = float(np.abs(persisted - observed)[both].mean()) if both.any() else math.nan
    ratio, served_ratio = math.nan, math.nan
    if both.any() and persistence > 0.0:
        ratio, served_ratio = (float(each[both].mean()) / persistence for each in (error, served_error))
    return KpiScore(
        kpi=rows[0].kpi,
        horizon_seconds=rows[0].horizon_seconds,
        forecasts=len(rows),
        error=float(error.mean()),
        persistence_error=persistence,
        error_to_persistence_ratio=ratio,
        served_error=float(served_error.mean()),
        served_error_to_persistence_ratio=served_ratio,
        coverage_ratio=float(((low <= observed) & (observed <= high)).mean()),
        widened_coverage_ratio=float(((wide_low <= observed) & (observed <= wide_high)).mean()),
        width=float((high - low).mean()),
        widened_width=float((wide_high - wide_low).mean()),
    )


def breach_score(rows: Iterable[ScoredBreach], states: Mapping[tuple[str, float], bool]) -> BreachScore:
    """Of one objective over one horizon. `states`: whether it was broken when a forecast was made."""
    rows = list(rows)
    said = np.array([row.probability for row in rows])
    simulated = np.array([row.simulated for row in rows])
    came = np.array([row.breached for row in rows], np.float64)
    now = np.array([float(states.get((row.slo, row.time_seconds), math.nan)) for row in rows])
    place = np.minimum((said * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    bins = [
        Bin(
            float(number) / RELIABILITY_BINS,
            int((place == number).sum()),
            float(said[place == number].mean()),
            float(came[place == number].mean()),
        )
        for number in np.unique(place)
    ]
    told = np.isfinite(now)
    return BreachScore(
        slo=rows[0].slo,
        horizon_seconds=rows[0].horizon_seconds,
        forecasts=len(rows),
        breached=int(came.sum()),
        brier=float(((said - came) ** 2).mean()),
        simulated_brier=float(((simulated - came) ** 2).mean()),
        persistence_brier=float(((now - came)[told] ** 2).mean()) if told.any() else math.nan,
        reliability=tuple(bins),
    )


def alert_score(moments: Iterable[Moment], horizon_seconds: float) -> AlertScore:
    """Of one objective's moments in order of time.

    An alert that begins while the objective is broken tells nothing new: it is neither counted nor held against it;
    one that stands on after a breach counts from there for the next. A breach at the first moment has no before.
    Alerts so young that their breach may still come are left out.
    """
    moments = list(moments)
    times = [moment.time_seconds for moment in moments]
    stands = standing(times, [moment.probability for moment in moments])
    alerts = _runs(stands, gap=0)
    breaches = _runs([moment.breached for moment in moments])
    broken = {place for first, last in breaches for place in range(first, last + 1)}
    ended = breaches.pop(0)[1] if breaches and breaches[0][0] == 0 else -1
    onsets = [times[first] for first, _ in breaches]

    def reach(last: int) -> float:
        """Until when a breach is one that this alert meant: it was last said a hold before the alert's end."""
        return times[last] + max(0.0, horizon_seconds - HOLD_SECONDS)

    judged, right = 0, 0
    for first, last in alerts:
        if first in broken:
            continue
        came = any(times[first] < onset <= reach(last) for onset in onsets)
        if came or (last < len(times) - 1 and times[-1] >= reach(last)):
            judged, right = judged + 1, right + came
    span = times[-1] - times[0]
    days = span / DAY_SECONDS if span > 0.0 else math.nan
    healthy = 0.0
    for place in range(len(moments) - 1):
        near = any(times[place] <= onset <= times[place] + horizon_seconds for onset in onsets)
        if stands[place] and place not in broken and not near:
            healthy += times[place + 1] - times[place]
    leads, most = [], []
    for first, last in breaches:
        # The alert that stood last, or ended so shortly before that it meant this breach.
        begins = [
            times[max(begin, ended + 1)]
            for begin, end in alerts
            if max(begin, ended + 1) <= min(end, first - 1) and reach(end) >= times[first]
        ]
        if begins:
            leads.append(times[first] - max(begins))
            most.append(times[first] - times[ended + 1])
        ended = last
    return AlertScore(
        slo=moments[0].slo,
        alerts=judged,
        breaches=len(breaches),
        precision=right / judged if judged else math.nan,
        recall=len(leads) / len(breaches) if breaches else math.nan,
        lead_seconds=tuple(leads),
        median_lead_seconds=float(np.median(leads)) if leads else math.nan,
        most_lead_seconds=tuple(most),
        alerts_per_day=judged / days,
        false_alerts_per_day=(judged - right) / days,
        healthy_alert_minutes_per_day=healthy / 60.0 / days,
    )


def _runs(inside: Sequence[bool], gap: int = GAP_MOMENTS) -> list[tuple[int, int]]:
    """First and last place of every run of moments that are inside; a short gap does not end it."""
    runs: list[tuple[int, int]] = []
    for place in range(len(inside)):
        if inside[place]:
            if runs and place - runs[-1][1] <= 1 + gap:
                runs[-1] = (runs[-1][0], place)
            else:
                runs.append((place, place))
    return runs
