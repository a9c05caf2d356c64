"""The forecaster: a sweep of the latest snapshot every so often."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Event

from apscheduler.schedulers.background import BackgroundScheduler

from kavier_twin.forecast.executors import Executor, RayExecutor, ThreadExecutor
from kavier_twin.forecast.load import LoadForecaster
from kavier_twin.forecast.result import Forecast
from kavier_twin.forecast.settings import ForecastSettings as ForecastSettings
from kavier_twin.forecast.sweep import OutOfTime, sweep, sweep_within
from kavier_twin.mirror.snapshot import Snapshot

log = logging.getLogger(__name__)


class Forecaster:
    """Forecasts a pool: on demand with `run`, or in the background between `start` and `stop`."""

    def __init__(self, settings: ForecastSettings) -> None:
        self.settings = settings
        self.cycles = 0  # forecasts published
        self.failures = 0  # cycles that raised
        self.late = 0  # cycles that took longer than they come
        self.scenarios = 0  # simulated in all cycles, of today's policy
        self.shed: Counter[str] = Counter()  # by policy: cycles that had no time for it
        self.stopped: Counter[str] = Counter()  # by reason: why cycles simulated no more scenarios
        self.load = LoadForecaster()
        self._executor = _executor(settings)
        self._scheduler: BackgroundScheduler | None = None
        self._stopping = Event()
        self._told_shed: tuple[str, ...] = ()

    def run(self, snapshot: Snapshot) -> Forecast:
        """The forecast from this snapshot, which stays as it is: all the scenarios needed, however long that takes."""
        began = time.perf_counter()
        arrivals = self.load.forecast(snapshot, self.settings.horizons_seconds[-1])
        forecast = sweep(snapshot, self.settings, self._executor, arrivals=arrivals)
        return dataclasses.replace(forecast, duration_seconds=time.perf_counter() - began)

    def start(self, snapshot_source: Callable[[], Snapshot | None], publish: Callable[[Forecast], None]) -> None:
        """Forecast now and then every `every_seconds`, in a thread of its own; a cycle that is late is not made up for.

        `snapshot_source` may have nothing yet. An error in a cycle is logged and counted; the next cycle goes on.
        Raises RuntimeError if already started.
        """
        if self._scheduler is not None:
            raise RuntimeError("the forecaster is already running")
        self._stopping.clear()
        self._scheduler = BackgroundScheduler(timezone=UTC)
        self._scheduler.add_job(
            self._cycle,
            "interval",
            args=(snapshot_source, publish),
            seconds=self.settings.every_seconds,
            next_run_time=datetime.now(UTC),
            max_instances=1,
            coalesce=True,
            misfire_grace_time=None,
        )
        self._scheduler.start()

    def stop(self) -> None:
        """Cut a sweep under way short, wait for its cycle and start no other."""
        self._stopping.set()
        if self._scheduler is not None:
            self._scheduler.shutdown(wait=True)
            self._scheduler = None

    def _cycle(self, snapshot_source: Callable[[], Snapshot | None], publish: Callable[[Forecast], None]) -> None:
        began, settings = time.perf_counter(), self.settings
        try:
            snapshot = snapshot_source()
            if snapshot is None:
                return
            arrivals = self.load.forecast(snapshot, settings.horizons_seconds[-1])
            left = settings.cycle_seconds - (time.perf_counter() - began)
            forecast = sweep_within(snapshot, settings, self._executor, left, self._stopping.is_set, arrivals)
            seconds = time.perf_counter() - began
            publish(dataclasses.replace(forecast, duration_seconds=seconds))
            self._count(forecast, seconds)
        except OutOfTime:
            pass  # told to stop
        except Exception:
            self.failures += 1
            log.exception("a forecast failed; the next one starts in %g s", self.settings.every_seconds)

    def _count(self, forecast: Forecast, seconds: float) -> None:
        self.cycles += 1
        self.late += seconds > self.settings.every_seconds
        self.scenarios += forecast.scenarios
        self.shed.update(forecast.shed)
        self.stopped[forecast.stopped_because] += 1
        if forecast.shed != self._told_shed:
            self._told_shed = forecast.shed
            if forecast.shed:
                log.warning(
                    "pool %s: not enough time to simulate %s; raise forecast.budget_seconds, or configure fewer "
                    "policies or scenarios",
                    forecast.pool,
                    ", ".join(forecast.shed),
                )


def _executor(settings: ForecastSettings) -> Executor:
    if settings.executor == "ray":
        return RayExecutor(settings.workers)
    return ThreadExecutor(settings.workers)
