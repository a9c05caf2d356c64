"""One pool's scores: what the stream tells, what is forecast, and the file that outlives both."""

from __future__ import annotations

import math
import time
from threading import Lock

from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.forecast.result import Forecast
from kavier_twin.mirror.mirror import Mirror
from kavier_twin.scores.observed import Ended, Reality
from kavier_twin.scores.readings import EngineReading, GpuReading, Reading, SizeReading
from kavier_twin.scores.scorer import Scorer, Scores
from kavier_twin.scores.store import ScoreStore
from kavier_twin.simulation.footprint import Footprint
from kavier_twin.telemetry import EngineSample, GpuSample, RequestFinished, RequestRecord, RequestSeen, TelemetryRecord


class ScoreKeeper:
    """Thread-safe: records come from the thread that ingests, forecasts from the forecaster's."""

    def __init__(self, pool: str, settings: ForecastSettings, store: ScoreStore | None = None) -> None:
        self.scores = Scores()
        self._pool = pool
        self._scorer = Scorer(settings.slos)
        self._store = store
        self._lock = Lock()
        self._ended: list[tuple[str, Ended]] = []  # and not stored yet
        self._read: list[tuple[str, Reading]] = []  # and not stored yet
        if store is not None:
            self._scorer.remember(store.judged(pool))
            self._scorer.resume(store.open_forecasts(pool), *store.requests(pool), store.readings(pool))
            self.scores = self._scorer.scores()

    def take(self, record: TelemetryRecord) -> None:
        """A record of the stream, in any order."""
        with self._lock:
            self._keep(tell(self._scorer.reality, record))

    def size(self, mirror: Mirror) -> None:
        """How many replicas the mirror has now."""
        with self._lock:
            self._keep(tell_size(self._scorer.reality, mirror))

    def judge(self, forecast: Forecast, policy: str, footprint: Footprint | None = None) -> Forecast:
        """Keep this forecast of the policy in force, and judge those whose time has come by it. Returns the forecast
        as it is to be served: corrected by what earlier ones missed."""
        with self._lock:
            settled = self._scorer.settle(forecast.time_seconds, footprint)
            served = self._scorer.foresee(forecast, policy)
            self.scores = self._scorer.scores()
            still_open, live = self._scorer.open_forecasts, self._scorer.reality.live
            ended, self._ended = self._ended, []
            read, self._read = self._read, []
        if self._store is not None:
            self._store.save(
                self._pool,
                settled,
                still_open,
                ended,
                live,
                read,
                now_unix=time.time(),
                forget_before_seconds=self._scorer.needed_since(forecast.time_seconds),
            )
        return served

    def _keep(self, told: list[tuple[str, Ended | Reading]]) -> None:
        """For the file, until it is written."""
        if self._store is not None:
            self._ended += [(name, one) for name, one in told if isinstance(one, Ended)]
            self._read += [(name, one) for name, one in told if not isinstance(one, Ended)]


def tell(reality: Reality, record: TelemetryRecord) -> list[tuple[str, Ended | Reading]]:
    """A record to who judges by it. Returns what was new of requests that ended and of readings, each with its name."""
    if isinstance(record, RequestRecord):
        finished = record.finished()
        return [*tell(reality, record.seen()), *(tell(reality, finished) if finished is not None else ())]
    if isinstance(record, RequestSeen):
        reality.arrive(record.id, record.time_seconds, record.prompt_tokens)
    elif isinstance(record, RequestFinished):
        ended = reality.end(
            record.id,
            record.time_seconds,
            record.output_tokens,
            ttft_seconds=record.ttft_seconds,
            e2e_seconds=record.e2e_seconds,
            queue_seconds=record.queue_seconds,
            cached_tokens=record.cached_tokens,
        )
        return [] if ended is None else [(record.id, ended)]
    elif isinstance(record, EngineSample):
        return _read(reality, f"{record.namespace}/{record.pod}/{record.engine}", _engine(record))
    elif isinstance(record, GpuSample) and not record.mig_instance:  # whose watts are those of the whole card
        reading = GpuReading(record.time_seconds, _number(record.power_watts), _number(record.energy_joules))
        return _read(reality, record.gpu, reading)
    return []


def tell_size(reality: Reality, mirror: Mirror) -> list[tuple[str, Ended | Reading]]:
    """How many replicas the mirror has now: a fleet's size where no engine is sampled."""
    if not math.isfinite(mirror.time_seconds):
        return []
    alive = int((mirror.fleet.state.replicas["alive"] == 1).sum())
    return _read(reality, "mirror", SizeReading(mirror.time_seconds, alive))


def _read(reality: Reality, name: str, reading: Reading) -> list[tuple[str, Ended | Reading]]:
    return [(name, reading)] if reality.readings.add(name, reading) else []


def _engine(sample: EngineSample) -> EngineReading:
    latencies = sample.inter_token_latency_seconds
    limits = () if latencies is None else tuple(sorted(latencies.buckets))
    counts = () if latencies is None else (*(latencies.buckets[limit] for limit in limits), latencies.count)
    return EngineReading(
        sample.time_seconds,
        _number(sample.requests_running),
        _number(sample.requests_waiting),
        _number(sample.kv_cache_usage_ratio),
        _number(sample.preemptions),
        limits,
        counts,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
