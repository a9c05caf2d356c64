"""One pool's scores: what the mirror applied, what is forecast, and the file that keeps what was judged."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from threading import Lock

from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.forecast.result import Forecast
from kavier_twin.mirror.applied import Applied, Arrived, Dropped, Ended, GivenUp, Sized
from kavier_twin.mirror.checkpoint_file import Saved
from kavier_twin.scores.observed import Outcome, Reality
from kavier_twin.scores.readings import EngineReading, GpuReading, SizeReading
from kavier_twin.scores.scorer import Scorer, Scores
from kavier_twin.scores.store import ScoreStore
from kavier_twin.simulation.footprint import Footprint
from kavier_twin.telemetry import EngineSample, GpuSample, TelemetryRecord


class ScoreKeeper:
    """Thread-safe: events come from the thread that ingests, forecasts from the forecaster's.

    What depends on the position in the stream is part of the pool's checkpoint. What was judged goes to `store`, each
    row with the number of the first checkpoint that counts it, so that a pool that resumes drops what it judges again.
    """

    def __init__(self, pool: str, settings: ForecastSettings, store: ScoreStore | None = None) -> None:
        self.scores = Scores()
        self._pool = pool
        self._scorer = Scorer(settings.slos)
        self._store = store
        self._next_checkpoint = 1
        self._lock = Lock()

    def follow(self, applied: Iterable[Applied], until_seconds: float) -> None:
        """What the mirror applied, up to this event time."""
        with self._lock:
            follow(self._scorer.reality, applied, until_seconds)

    def read(self, sample: TelemetryRecord) -> None:
        """What an engine or a GPU says of itself; other records are none of it."""
        with self._lock:
            read(self._scorer.reality, sample)

    def judge(self, forecast: Forecast, policy: str, footprint: Footprint | None = None) -> Forecast:
        """Keep this forecast of the policy in force, and judge those whose time has come by it. Returns the forecast
        as it is to be served: corrected by what earlier ones missed."""
        with self._lock:
            settled = self._scorer.settle(forecast.time_seconds, footprint)
            served = self._scorer.foresee(forecast, policy)
            self.scores = self._scorer.scores()
            # Before anyone can take a checkpoint that counts them as judged.
            if self._store is not None:
                self._store.save(self._pool, settled, self._next_checkpoint, time.time())
        return served

    def save(self, checkpoint: int) -> Saved:
        """The state for the checkpoint of this number."""
        with self._lock:
            self._next_checkpoint = checkpoint + 1
            return Saved(*self._scorer.save())

    def resume(self, checkpoint: int, saved: Saved | None) -> None:
        """Go on from the checkpoint of this number; None: begin anew, with what was judged in earlier lives."""
        with self._lock:
            self._next_checkpoint = checkpoint + 1
            if self._store is not None:
                self._store.roll_back(self._pool, None if saved is None else checkpoint)
                self._scorer.remember(self._store.judged(self._pool))
            if saved is not None:
                self._scorer.restore(*saved)
            self.scores = self._scorer.scores()


def follow(reality: Reality, applied: Iterable[Applied], until_seconds: float) -> None:
    """Let what a mirror applied count, up to this event time."""
    for event in applied:
        if isinstance(event, Arrived):
            reality.arrive(event.id, event.time_seconds)
        elif isinstance(event, Ended):
            reality.end(event.finished.id, _outcome(event))
        elif isinstance(event, GivenUp):
            reality.give_up(event.id, Outcome(*event[1:7], cached_tokens=math.nan))
        elif isinstance(event, Dropped):
            reality.drop(event.id)
        elif isinstance(event, Sized):
            reality.readings.add("mirror", SizeReading(event.time_seconds, event.replicas))
    reality.until_seconds = until_seconds


def read(reality: Reality, sample: TelemetryRecord) -> None:
    """Let what an engine or a GPU says of itself count; other records are none of it."""
    if isinstance(sample, EngineSample):
        reality.readings.add(f"{sample.namespace}/{sample.pod}/{sample.engine}", _engine(sample))
    elif isinstance(sample, GpuSample) and not sample.mig_instance:  # whose watts are those of the whole card
        reading = GpuReading(sample.time_seconds, _number(sample.power_watts), _number(sample.energy_joules))
        reality.readings.add(sample.gpu, reading)


def _outcome(ended: Ended) -> Outcome:
    arrival, finished = ended.arrival_seconds, ended.finished
    return Outcome(
        arrival,
        arrival + _number(finished.queue_seconds),
        arrival + _number(finished.ttft_seconds),
        finished.time_seconds if finished.e2e_seconds is None else arrival + finished.e2e_seconds,
        ended.prompt_tokens,
        finished.output_tokens,
        _number(finished.cached_tokens),
    )


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
