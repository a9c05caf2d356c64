"""The twin of one pool: its mirror, what is foreseen from it, and what is shown of both."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock, Thread
from typing import Final, TypeVar

from kavier_twin import __version__
from kavier_twin.daemon.pool_reuse import PoolReuse
from kavier_twin.forecast.forecaster import Forecaster, ForecastSettings
from kavier_twin.forecast.policy_set import in_force
from kavier_twin.forecast.result import Forecast
from kavier_twin.forecast.whatif import WhatIf
from kavier_twin.mirror.applied import Applied
from kavier_twin.mirror.calibration.online import Change
from kavier_twin.mirror.fidelity.cache import CacheWatch
from kavier_twin.mirror.fidelity.power import PowerWatch
from kavier_twin.mirror.from_metrics import MetricsStream, mirror_settings
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.mirror.replicas import replicas
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.scores.keeper import ScoreKeeper
from kavier_twin.scores.store import ScoreStore
from kavier_twin.serve import assemble
from kavier_twin.serve.models import Outlook, SourceState, SweepCounts, TwinView
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.policies import Override, Policy, PolicyError
from kavier_twin.simulation.settings import COEFFICIENTS, FleetSettings
from kavier_twin.telemetry import EngineSample, GpuSample, KvEventBatch, TelemetryRecord

log = logging.getLogger(__name__)

Found = TypeVar("Found")

LIVE_WITHIN_SECONDS: Final = 300.0  # a stream whose newest record is this close to the wall clock is live
SAMPLES_KEPT: Final = 1_000  # for each pod
LATE_LOGGED_EVERY_SECONDS: Final = 30.0
GO_BACK_EVERY_SECONDS: Final = 1.0  # for records that came late
SAMPLE_SECONDS: Final = 120.0  # for which an engine's last word counts


class PoolTwin:
    """One pool's mirror and forecaster. One thread ingests, another forecasts, any may ask for a view.

    `event_clock` tells the stream's time now where the source knows it (a replay). Otherwise a stream of unix times
    close to now is live, and time passes without records; any other stream's time follows its records. With
    `from_metrics` the engines' samples are all there is: requests follow their samples. `given` are settings of the
    engine that hold whatever the engines say. `clock` gives unix seconds.
    """

    def __init__(
        self,
        fleet: FleetSettings,
        mirror: MirrorSettings | None = None,
        forecast: ForecastSettings | None = None,
        *,
        calibrated: bool = False,
        from_metrics: bool = False,
        given: Iterable[str] = (),
        event_clock: Callable[[], float] | None = None,
        notes: Iterable[str] = (),
        score_store: ScoreStore | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        forecast = forecast or ForecastSettings()
        self.fleet = fleet  # as configured
        self.forecaster = Forecaster(forecast)
        self.what_if = WhatIf(self._snapshot, forecast.slos, forecast.workers, self.forecaster.load)
        mirror = mirror or MirrorSettings()
        self.metrics = MetricsStream(mirror.pool, fleet.engine) if from_metrics else None
        self.mirror = Mirror(mirror_settings(mirror) if from_metrics else mirror, fleet, calibrated=calibrated)
        self.caches = CacheWatch()
        self.scores = ScoreKeeper(self.name, forecast, score_store)
        self.power = PowerWatch()
        self.reuse = PoolReuse()
        self.mirror.beside = self._look_beside
        self._lock = Lock()
        self._event_clock = event_clock
        self._clock = clock
        self._notes = tuple(notes)
        self._given = frozenset(given)
        self._refused: Mapping[str, Override] = {}
        self._policies = {policy.name: in_force(fleet, policy) for policy in forecast.policies}
        self._reported = _EngineSamples()
        self._outlook: Outlook | None = None
        self._live = False
        self._go_back_at = -math.inf
        self._behind = False
        self._last_record_unix = math.nan
        self._told_calibration = False
        self._told_late, self._tell_late_at = 0, 0.0
        self._told_change: Change | None = None

    @property
    def name(self) -> str:
        """The pool's."""
        return self.mirror.settings.pool

    def resume(self, mirror: Mirror, caches: CacheWatch, power: PowerWatch) -> None:
        """Go on from another's state, before `start`."""
        self.mirror = mirror
        self.mirror.beside = self._look_beside
        self.caches = caches
        self.power = power

    def start(self) -> None:
        """Forecast from now on."""
        self.forecaster.start(self._snapshot, self._take_forecast)

    def stop(self) -> Thread:
        """End forecasting. Returns what waits for a forecast under way."""
        ending = Thread(target=self.forecaster.stop, name=f"stop-forecaster-{self.name}", daemon=True)
        ending.start()
        return ending

    def ingest(self, records: Sequence[TelemetryRecord], *, more: bool, ended: bool) -> None:
        """Take records in and let the mirror catch up. `more` of them are there now; `ended`: none will ever come."""
        if records:
            self._last_record_unix = self._clock()
        with self._lock:
            for record in records:
                self._take(record)
                self.scores.read(record)
            if self.metrics:
                self.metrics.lead(self.mirror)
            applied = self._advance(more)
            if ended:
                applied += self.mirror.end()
            self.scores.follow(applied, self.mirror.time_seconds)
            self.reuse.follow(applied, self.mirror.fleet)
            self._behind = more
            self._tell_of_calibration()
            self._tell_of_late_records()

    def adopt(self, told: Mapping[str, Override]) -> None:
        """Go on with what the engines say of their settings, but for those that are given."""
        with self._lock:
            engine = self.mirror.fleet.settings.engine
            new = {name: value for name, value in told.items() if name not in self._given}
            new = {name: value for name, value in new.items() if getattr(engine, name) != value}
            if not new or new == self._refused:
                return
            try:
                self.mirror.adopt(new)
            except PolicyError as error:
                self._refused = new
                log.warning("pool %s: the settings reported by the engines are impossible: %s", self.name, error)
                return
            if self.metrics:
                self.metrics.use(self.mirror.fleet.settings.engine)
            self.forecast_under(self.forecaster.settings.policies)
        log.info(
            "pool %s: adopted engine settings reported by the engines: %s%s",
            self.name,
            ", ".join(f"{name} {value} (was {getattr(engine, name)})" for name, value in new.items()),
            f"; kept as given: {', '.join(sorted(self._given))}" if self._given else "",
        )

    def look(self, see: Callable[[Mirror], Found]) -> Found:
        """What `see` finds in the mirror as of now, of which it may keep nothing."""
        with self._lock:
            return see(self._present())

    def forecast_under(self, policies: tuple[Policy, ...]) -> None:
        """Forecast these from the next cycle on."""
        settings, fleet = self.forecaster.settings, self.mirror.fleet.settings
        # A cycle under way still tells of those before.
        self._policies = {policy.name: in_force(fleet, policy) for policy in (*settings.policies, *policies)}
        self.forecaster.settings = settings.model_copy(update={"policies": policies})

    def view(self, sources: tuple[SourceState, ...]) -> TwinView:
        """The figures now; of checkpoints they know nothing."""
        with self._lock:
            return self._seen(self._present(), sources)

    def _seen(self, mirror: Mirror, sources: tuple[SourceState, ...]) -> TwinView:
        records, dropped = assemble.records(mirror, sum(sum(state.rejected.values()) for state in sources))
        settings = mirror.fleet.settings
        lag = max(0.0, mirror.newest_seconds - mirror.time_seconds) if math.isfinite(mirror.time_seconds) else math.nan
        view = TwinView(
            pool=self.name,
            version=__version__,
            unix_seconds=self._clock(),
            event_seconds=mirror.time_seconds,
            lag_seconds=lag,
            buffered_records=mirror.buffered,
            last_record_unix_seconds=self._last_record_unix,
            records=records,
            dropped=dropped,
            finished_requests=mirror.finished,
            calibrated=mirror.calibrated,
            calibrated_on_requests=mirror.calibration.requests if mirror.calibration else 0,
            step_time_scale_ratio=mirror.pace,
            frontend_seconds=mirror.frontend_seconds if mirror.calibration else math.nan,
            step_time={name: getattr(settings.step_time, name) for name in COEFFICIENTS},
            exact_cache_ratio=mirror.windows.exact_ratio("prefix_cache_hit_ratio", mirror.time_seconds),
            stream_coverage_ratio=mirror.doubts.coverage_ratio,
            gauges=assemble.gauges(mirror, self._reported.at(mirror.time_seconds)),
            replicas=replicas(mirror),
            caches=assemble.caches(self.caches),
            prefix_cache=assemble.prefix_cache(self.reuse.watch),
            power=assemble.power(self.power, mirror),
            source="metrics" if self.metrics else "stream",
            sources=sources,
            forecasts={"succeeded": self.forecaster.cycles, "failed": self.forecaster.failures},
            sweeps=SweepCounts(
                self.forecaster.late,
                self.forecaster.scenarios,
                dict(self.forecaster.shed),
                dict(self.forecaster.stopped),
            ),
            every_seconds=self.forecaster.settings.every_seconds,
            slos=assemble.slo_lines(self.forecaster.settings.slos),
            # Of the mirror itself, not of its fork: what has passed is the same, and it remembers what it told.
            history=assemble.history(self.mirror.windows.course(mirror.time_seconds)),
            outlook=self._outlook,
            scores=self.scores.scores,
            currency=settings.footprint.currency if settings.footprint else "",
            notes=self._notes,
        )
        return assemble.judged(view, mirror)

    # --- the mirror -----------------------------------------------------------------------------------------------

    def _take(self, record: TelemetryRecord) -> None:
        if isinstance(record, EngineSample):
            self._reported.add(record)
            if self.metrics:
                self.metrics.take(record)
        if isinstance(record, KvEventBatch):
            self.caches.take(record)
        if isinstance(record, GpuSample):
            self.power.take(record)
        self.mirror.ingest(record)

    def _advance(self, more: bool) -> list[Applied]:
        """Let the mirror catch up. It folds the past again at most once a second, for a third of the time at most, and
        not while the past is still being read."""
        began = time.monotonic()
        go_back = not more and self._clock() >= self._go_back_at
        again = self.mirror.folded_again
        applied = self.mirror.advance(None if more else self._event_now(), go_back=go_back)
        if self.mirror.folded_again > again:
            self._go_back_at = self._clock() + max(GO_BACK_EVERY_SECONDS, 3.0 * (time.monotonic() - began))
        return applied

    def _look_beside(self, fleet: Fleet) -> None:
        self.caches.follow(fleet, self._replica_of)
        self.power.follow(fleet)

    def _replica_of(self, pod: str, rank: str) -> int | None:
        """The replica that mirrors an engine. Where the stream names no pod there may be only one."""
        pods, replicas = self.mirror.pods, self.mirror.fleet.state.replicas
        found = pods.replica_of(pod, rank) if pods.replica_of(pod, rank) is not None else pods.replica_of(pod)
        return 0 if found is None and replicas.size == 1 else found

    def _present(self) -> Mirror:
        """The mirror as of now: of a stream whose time is a clock's, moved on to where no record has come yet."""
        now = None if self._behind else self._event_now()
        if now is None or now <= self.mirror.time_seconds:
            return self.mirror
        return self.mirror.present(now)

    def _event_now(self) -> float | None:
        if self._event_clock is not None:
            return self._event_clock()
        if self.metrics:  # what happened since the last sample is not known yet
            return None
        now = self._clock()
        if not self._live and abs(now - self.mirror.newest_seconds) < LIVE_WITHIN_SECONDS:
            self._live = True
            log.info("pool %s: the stream is live; its time follows the wall clock", self.name)
        return now if self._live else None

    def _tell_of_calibration(self) -> None:
        """The first fit, and jumps of the fleet's speed; the many fits that follow it slowly are in the metrics."""
        calibration, change = self.mirror.calibration, self.mirror.last_change
        if calibration is not None and not self._told_calibration:
            self._told_calibration = True
            log.info(
                "pool %s: step times fitted to %d requests: simulated mean TTFT is %.3f times the observed one, "
                "mean end-to-end latency %.3f times",
                self.name,
                calibration.requests,
                calibration.mean_ttft_ratio,
                calibration.mean_e2e_ratio,
            )
        if change is not None and change != self._told_change:
            log.warning(
                "pool %s: for the last %.0f s engine steps have taken %.2f times as long as before; step times will be "
                "fitted again",
                self.name,
                self.mirror.time_seconds - change.since_seconds,
                change.ratio,
            )
        self._told_change = change

    def _tell_of_late_records(self) -> None:
        """Every now and then: one clock that is behind the others makes all its records late."""
        late = self.mirror.ingested["late"]
        if late > self._told_late and time.monotonic() >= self._tell_late_at:
            self._told_late, self._tell_late_at = late, time.monotonic() + LATE_LOGGED_EVERY_SECONDS
            log.warning(
                "pool %s: %d records so far were more than %g s late and were ignored; synchronise the clocks "
                "that stamp them, or raise mirror.late_seconds",
                self.name,
                late,
                self.mirror.settings.late_seconds,
            )

    # --- forecasting ----------------------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot | None:
        with self._lock:
            return self._present().snapshot()

    def _take_forecast(self, forecast: Forecast) -> None:
        if self._outlook is None:
            log.info("pool %s: first forecast made in %.1f s", self.name, forecast.duration_seconds or 0.0)
        today = next(policy.name for policy in self.forecaster.settings.policies if not policy.overrides)
        forecast = self.scores.judge(forecast, today, self.mirror.fleet.settings.footprint)
        self._outlook = assemble.outlook(forecast, self._clock(), self._policies)


class _EngineSamples:
    """What the engines said of themselves lately, to be read at the time the mirror stands at."""

    def __init__(self) -> None:
        self._pods: dict[tuple[str, str, str], deque[EngineSample]] = {}

    def add(self, sample: EngineSample) -> None:
        self._pods.setdefault((sample.namespace, sample.pod, sample.engine), deque(maxlen=SAMPLES_KEPT)).append(sample)

    def at(self, time_seconds: float) -> tuple[float, float, float]:
        """Running and waiting requests of all pods, and mean KV usage; NaN where unknown."""
        newest = []
        for key, samples in list(self._pods.items()):
            if samples[-1].time_seconds < time_seconds - SAMPLE_SECONDS:  # its pod is gone
                del self._pods[key]
                continue
            while len(samples) > 1 and samples[1].time_seconds <= time_seconds:
                samples.popleft()
            if time_seconds - SAMPLE_SECONDS <= samples[0].time_seconds <= time_seconds:
                newest.append(samples[0])
        usage = [s.kv_cache_usage_ratio for s in newest if s.kv_cache_usage_ratio is not None]
        return (
            _sum([s.requests_running for s in newest]),
            _sum([s.requests_waiting for s in newest]),
            sum(usage) / len(usage) if usage else math.nan,
        )


def _sum(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(sum(known)) if known else math.nan
