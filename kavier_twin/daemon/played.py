"""A live recording played through the daemon's own path on a simulated clock, and what it showed by minute."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Final

import numpy as np

from connectors.prometheus.engine_config import EngineConfigs
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.recordings.live_recording import METRICS, REQUESTS, ClientRequest, LiveRecording
from kavier_twin.serve.models import TwinView
from kavier_twin.simulation.kpi_table import GAUGES, KPIS
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.telemetry import EngineSample, TelemetryRecord

MINUTE_SECONDS: Final = 60.0
STEP_SECONDS: Final = 0.5  # between two looks, as a running daemon publishes
SETTLE_SECONDS: Final = 10.0  # played on after the last record
REQUEST_KPIS: Final = tuple(
    (kpi.name, ("", *kpi.statistics)[-1]) for kpi in KPIS.values() if kpi.compared and not kpi.gauge
)
"""KPIs of requests that are compared, each with its highest statistic."""


class SimulatedClock:
    """Unix seconds that pass when told to."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


class PlayedSource:
    """Hands out each record of a live recording when the clock reaches the time at which it arrived."""

    trouble = ""

    def __init__(
        self,
        name: str,
        arrivals: Sequence[tuple[float, TelemetryRecord]],
        clock: SimulatedClock,
        configs: EngineConfigs,
    ) -> None:
        self.name = name
        self.configs = configs
        self.last_record_seconds: float | None = None
        self._arrivals = arrivals
        self._clock = clock
        self._next = 0

    @property
    def exhausted(self) -> bool:
        """Whether every record was handed out."""
        return self._next >= len(self._arrivals)

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        """At most `max_records` that have arrived by now."""
        found: list[TelemetryRecord] = []
        while len(found) < max_records and not self.exhausted and self._arrivals[self._next][0] <= self._clock():
            found.append(self._arrivals[self._next][1])
            self._next += 1
        if found:
            newest = max(record.time_seconds for record in found)
            self.last_record_seconds = max(newest, self.last_record_seconds or newest)
        return found

    def rejected(self) -> Mapping[str, int]:
        """Malformed lines were counted when the recording was read."""
        return {}

    def close(self) -> None:
        """Hand out nothing more."""
        self._next = len(self._arrivals)


@dataclass
class Minute:
    """One minute of event time. Means over the scrapes, or statistics over the requests that ended in it.

    `mirrored` and `observed` by KPI and statistic. Gauges are those published at the time of each scrape. Of these,
    `absolute_error` is the mean of |mirrored - observed|, and `absolute_error_before` that of the last values published
    before the scrape, which do not know it yet. `trusted` is the share of the minute in which a KPI was trusted.
    """

    start_seconds: float
    mirrored: dict[str, float] = field(default_factory=dict)
    observed: dict[str, float] = field(default_factory=dict)
    absolute_error: dict[str, float] = field(default_factory=dict)
    absolute_error_before: dict[str, float] = field(default_factory=dict)
    clients: dict[str, float] = field(default_factory=dict)
    trusted: dict[str, float] = field(default_factory=dict)
    pool_trusted: float = math.nan
    stale: float = math.nan
    reasons: list[str] = field(default_factory=list)


@dataclass
class Played:
    """What a live recording showed."""

    minutes: list[Minute]
    records: dict[str, int]  # what became of the records that the mirror took, by result
    rejected: dict[str, dict[str, int]]
    exact_cache_ratio: float  # share of requests whose prefix hit was predicted to the token
    finished_requests: int


def play(
    recording: LiveRecording,
    fleet: FleetSettings,
    mirror: MirrorSettings,
    *,
    calibrated: bool = False,
    given: Sequence[str] = (),
    progress: Callable[[float], None] = lambda _: None,
) -> Played:
    """Play a live recording. `progress` gets the share that is done."""
    clock = SimulatedClock(recording.start_seconds)
    pool = PoolTwin(
        fleet,
        replace(mirror, bucket_seconds=MINUTE_SECONDS),
        ForecastSettings(),
        calibrated=calibrated,
        from_metrics=REQUESTS not in recording.arrivals,
        given=given,
        clock=clock,
    )
    interval = _interval_seconds(recording)
    feeds = [
        Feed(PlayedSource(kind, arrivals, clock, recording.configs), pool.name, interval if kind == METRICS else None)
        for kind, arrivals in recording.arrivals.items()
    ]
    daemon = Daemon([pool], feeds, clock=clock)
    looks: list[_Look] = []
    course: dict[float, dict[tuple[str, str], tuple[float, float]]] = {}  # by the end of each whole minute
    scrapes = iter(sorted({at for at, _ in recording.arrivals.get(METRICS, ())}))
    scrape, regular = next(scrapes, math.inf), clock.seconds
    while clock.seconds < recording.end_seconds + SETTLE_SECONDS:
        while daemon.ingest():
            pass
        daemon.publish()
        view = daemon.view
        looks.append(_Look.of(view))
        for place, until in enumerate(view.history.event_seconds):
            course[until] = {
                (one.kpi, one.statistic): (one.mirrored[place], one.observed[place]) for one in view.history.series
            }
        progress((clock.seconds - recording.start_seconds) / (recording.end_seconds - recording.start_seconds))
        if clock.seconds >= regular:
            regular += STEP_SECONDS
        while scrape <= clock.seconds:
            scrape = next(scrapes, math.inf)
        clock.seconds = min(regular, scrape)
    samples = [record for _, record in recording.arrivals.get(METRICS, ()) if isinstance(record, EngineSample)]
    first, last = (math.floor(at / MINUTE_SECONDS) for at in (recording.start_seconds, recording.end_seconds))
    return Played(
        [_minute(number * MINUTE_SECONDS, looks, samples, course, recording.clients) for number in range(first, last)],
        dict(pool.mirror.ingested),
        {kind: dict(found) for kind, found in recording.rejected.items() if found},
        view.exact_cache_ratio,
        view.finished_requests,
    )


@dataclass(frozen=True)
class _Look:
    """What was shown at a moment."""

    unix_seconds: float
    gauges: Mapping[str, float]  # of the whole pool, as mirrored
    trusted: Mapping[str, bool]
    pool_trusted: bool
    stale: bool
    reasons: tuple[str, ...]

    @classmethod
    def of(cls, view: TwinView) -> _Look:
        return cls(
            view.unix_seconds,
            {gauge.kpi: gauge.mirrored for gauge in view.gauges},
            {kpi: found.trusted for kpi, found in view.trust.items()},
            view.trusted and not view.stale,
            bool(view.stale),
            (*view.stale, *view.untrusted_reasons),
        )


def _minute(
    start: float,
    looks: Sequence[_Look],
    samples: Sequence[EngineSample],
    course: Mapping[float, Mapping[tuple[str, str], tuple[float, float]]],
    clients: Sequence[ClientRequest],
) -> Minute:
    stop = start + MINUTE_SECONDS
    found = Minute(start)
    within = [look for look in looks if start < look.unix_seconds <= stop]
    if within:
        found.pool_trusted = float(np.mean([look.pool_trusted for look in within]))
        found.stale = float(np.mean([look.stale for look in within]))
        found.trusted = {kpi: float(np.mean([look.trusted[kpi] for look in within])) for kpi in within[0].trusted}
        found.reasons = list(dict.fromkeys(reason for look in within for reason in look.reasons))
    for kpi, pairs in _scraped(start, stop, looks, samples).items():
        before, mirrored, observed = np.array(pairs).T
        found.mirrored[kpi], found.observed[kpi] = float(mirrored.mean()), float(observed.mean())
        found.absolute_error[kpi] = float(np.abs(mirrored - observed).mean())
        found.absolute_error_before[kpi] = float(np.abs(before - observed).mean())
    for key, (predicted, observed) in course.get(stop, {}).items():
        if key in REQUEST_KPIS:
            found.mirrored[name_of(*key)], found.observed[name_of(*key)] = predicted, observed
    sent, ttft, e2e = np.array([astuple(one) for one in clients], np.float64).reshape(-1, 3).T
    for name, seconds, share in (("ttft_seconds_p99", ttft, 0.99), ("e2e_seconds_p95", e2e, 0.95)):
        ended = seconds[(start < sent + seconds) & (sent + seconds <= stop)]
        if ended.size:
            found.clients[name] = float(np.quantile(ended, share, method="inverted_cdf"))
    return found


def _scraped(
    start: float, stop: float, looks: Sequence[_Look], samples: Sequence[EngineSample]
) -> dict[str, list[tuple[float, float, float]]]:
    """By gauge and scrape: what was published before it, with it, and what engines reported (sums; means of ratios)."""
    scrapes: dict[float, list[EngineSample]] = {}
    for sample in samples:
        if start < sample.time_seconds <= stop:
            scrapes.setdefault(round(sample.time_seconds, 1), []).append(sample)
    found: dict[str, list[tuple[float, float, float]]] = {}
    times = [look.unix_seconds for look in looks]
    for engines in scrapes.values():
        place = max(1, bisect_right(times, max(sample.time_seconds for sample in engines)) - 1)
        before, shown = looks[place - 1], looks[place]
        for kpi in GAUGES:
            values = [value for sample in engines if (value := getattr(sample, kpi)) is not None]
            if values and kpi in shown.gauges:
                observed = sum(values) / (len(values) if kpi.endswith("ratio") else 1)
                found.setdefault(kpi, []).append((before.gauges.get(kpi, math.nan), shown.gauges[kpi], observed))
    return found


def _interval_seconds(recording: LiveRecording) -> float:
    times = sorted({at for at, _ in recording.arrivals.get(METRICS, ())})
    return float(np.median(np.diff(times))) if len(times) > 1 else 1.0


def name_of(kpi: str, statistic: str) -> str:
    """The key of a KPI's statistic in a `Minute`."""
    return f"{kpi}_{statistic}" if statistic else kpi
