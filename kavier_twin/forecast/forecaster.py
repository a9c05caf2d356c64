"""The forecaster: a sweep of the latest snapshot every so often."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

from apscheduler.schedulers.background import BackgroundScheduler
from pydantic import BaseModel, ConfigDict, Field, field_validator

from kavier_twin.forecast.executors import ThreadExecutor
from kavier_twin.forecast.load import LoadForecaster
from kavier_twin.forecast.policy_set import refuse_doubles, with_today
from kavier_twin.forecast.result import Forecast
from kavier_twin.forecast.slo import DEFAULT_SLOS, Slo
from kavier_twin.forecast.sweep import sweep
from kavier_twin.simulation.policies import DEFAULT_POLICIES, Policy
from kavier_twin.twin.snapshot import Snapshot

log = logging.getLogger(__name__)

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class ForecastSettings(BaseModel):
    """What is forecast, and how often."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_seconds: Seconds = 30.0
    horizons_seconds: Annotated[tuple[Seconds, ...], Field(min_length=1)] = (60.0, 300.0, 900.0)
    futures: Count = 4
    workers: Count = Field(default_factory=lambda: os.cpu_count() or 1)
    seed: Annotated[int, Field(ge=0)] = 0
    policies: tuple[Policy, ...] = DEFAULT_POLICIES
    slos: tuple[Slo, ...] = DEFAULT_SLOS

    @field_validator("horizons_seconds")
    @classmethod
    def _ascending(cls, horizons: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(horizons)))

    @field_validator("policies")
    @classmethod
    def _one_is_today(cls, policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
        return with_today(policies)

    @field_validator("slos")
    @classmethod
    def _by_name(cls, slos: tuple[Slo, ...]) -> tuple[Slo, ...]:
        refuse_doubles([slo.name for slo in slos])
        return slos


class Forecaster:
    """Forecasts a pool: on demand with `run`, or in the background between `start` and `stop`."""

    def __init__(self, settings: ForecastSettings) -> None:
        self.settings = settings
        self.cycles = 0  # forecasts published
        self.failures = 0  # cycles that raised
        self.load = LoadForecaster()
        self._executor = ThreadExecutor(settings.workers)
        self._scheduler: BackgroundScheduler | None = None

    def run(self, snapshot: Snapshot) -> Forecast:
        """The forecast from this snapshot, which stays as it is."""
        settings = self.settings
        began = time.perf_counter()
        forecast = sweep(
            snapshot,
            settings.policies,
            settings.horizons_seconds,
            settings.futures,
            settings.seed,
            settings.slos,
            self._executor,
            self.load.forecast(snapshot, settings.horizons_seconds[-1]),
        )
        return dataclasses.replace(forecast, duration_seconds=time.perf_counter() - began)

    def start(self, snapshot_source: Callable[[], Snapshot | None], publish: Callable[[Forecast], None]) -> None:
        """Forecast now and then every `every_seconds`, in a thread of its own; a cycle that is late is not made up for.

        `snapshot_source` may have nothing yet. An error in a cycle is logged and counted; the next cycle goes on.
        Raises RuntimeError if already started.
        """
        if self._scheduler is not None:
            raise RuntimeError("the forecaster is already started")
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
        """Wait for a cycle under way and start no other."""
        if self._scheduler is not None:
            self._scheduler.shutdown(wait=True)
            self._scheduler = None

    def _cycle(self, snapshot_source: Callable[[], Snapshot | None], publish: Callable[[Forecast], None]) -> None:
        try:
            snapshot = snapshot_source()
            if snapshot is not None:
                publish(self.run(snapshot))
                self.cycles += 1
        except Exception:
            self.failures += 1
            log.exception("a forecast failed; the next one is tried in %g s", self.settings.every_seconds)
