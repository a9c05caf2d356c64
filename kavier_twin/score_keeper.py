"""One pool's scores: what the stream tells of requests, what is forecast, and the file that outlives both."""

from __future__ import annotations

import time
from threading import Lock

from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.forecast.reality import Ended
from kavier_twin.forecast.result import Forecast
from kavier_twin.forecast.scores import Scorer, Scores
from kavier_twin.score_store import ScoreStore
from kavier_twin.telemetry import RequestFinished, RequestRecord, RequestSeen, TelemetryRecord


class ScoreKeeper:
    """Thread-safe: records come from the thread that ingests, forecasts from the forecaster's."""

    def __init__(self, pool: str, settings: ForecastSettings, store: ScoreStore | None = None) -> None:
        self.scores = Scores()
        self._pool = pool
        self._scorer = Scorer(settings.slos)
        self._store = store
        self._lock = Lock()
        self._ended: list[tuple[str, Ended]] = []  # and not stored yet
        if store is not None:
            self._scorer.remember(store.judged(pool))
            self._scorer.resume(store.open_forecasts(pool), *store.requests(pool))
            self.scores = self._scorer.scores()

    def take(self, record: TelemetryRecord) -> None:
        """A record of the stream, in any order."""
        if isinstance(record, RequestRecord):
            self.take(record.seen())
            finished = record.finished()
            if finished is not None:
                self.take(finished)
        elif isinstance(record, RequestSeen):
            with self._lock:
                self._scorer.reality.arrive(record.id, record.time_seconds, record.prompt_tokens)
        elif isinstance(record, RequestFinished):
            with self._lock:
                ended = tell_end(self._scorer, record)
                if ended is not None and self._store is not None:
                    self._ended.append((record.id, ended))

    def judge(self, forecast: Forecast, policy: str) -> None:
        """Keep this forecast of the policy in force, and judge those whose time has come by it."""
        with self._lock:
            settled = self._scorer.settle(forecast.time_seconds)
            self._scorer.foresee(forecast, policy)
            self.scores = self._scorer.scores()
            still_open, live = self._scorer.open_forecasts, self._scorer.reality.live
            ended, self._ended = self._ended, []
        if self._store is not None:
            self._store.save(
                self._pool,
                settled,
                still_open,
                ended,
                live,
                now_unix=time.time(),
                forget_before_seconds=self._scorer.needed_since(forecast.time_seconds),
            )


def tell_end(scorer: Scorer, record: RequestFinished) -> Ended | None:
    """A request's end, as a scorer takes it."""
    return scorer.reality.end(
        record.id,
        record.time_seconds,
        record.output_tokens,
        ttft_seconds=record.ttft_seconds,
        e2e_seconds=record.e2e_seconds,
        queue_seconds=record.queue_seconds,
        cached_tokens=record.cached_tokens,
    )
