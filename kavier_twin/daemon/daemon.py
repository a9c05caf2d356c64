"""The daemon: sources into the pools' mirrors, forecasts from them, figures out of both.

Three activities share the mirrors, each behind its pool's lock: a thread that polls the sources and lets the mirrors
catch up, the forecasters' schedulers that fork them now and then, and the HTTP server, which only reads the views
published last.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from threading import Event, Thread
from typing import Final

from connectors.dead_letters import DeadLetters
from connectors.settings import LiveSource, MetricsSource, TraceFile
from connectors.source import Source
from connectors.traces import TraceError
from connectors.traces.follow import FollowFile
from kavier_twin.catalog.model import ModelShape
from kavier_twin.daemon.checkpoints import Checkpoints
from kavier_twin.daemon.config import AnySource, Settings
from kavier_twin.daemon.engine_notes import EngineNotes, unmatched_caches
from kavier_twin.daemon.engine_settings import capacity_notes, contradictions, discovered, tells, told
from kavier_twin.daemon.feed import UNNAMED_POOL, Feed
from kavier_twin.daemon.freshness import STALE_AFTER_SECONDS, Freshness
from kavier_twin.daemon.http_settings import HttpConfig
from kavier_twin.daemon.kept_policies import KeptPolicies
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.daemon.pool_control import PoolControl
from kavier_twin.daemon.unmodelled import UnmodelledFeatures, note_of
from kavier_twin.daemon.warm_up import compiled, counts, make_ready
from kavier_twin.errors import UserError
from kavier_twin.scores.store import FILE_NAME, ScoreStore
from kavier_twin.serve.app import Twin
from kavier_twin.serve.assemble import spoiled
from kavier_twin.serve.http import AddressError, HttpServer
from kavier_twin.serve.models import SourceState, TwinView
from kavier_twin.telemetry import EngineSample, TelemetryRecord

log = logging.getLogger(__name__)

BATCH_RECORDS: Final = 500  # polled of a source and processed at a time
POLL_SECONDS: Final = 0.05  # between polls that found nothing
PUBLISH_SECONDS: Final = 0.5  # between views
DISCOVER_SECONDS: Final = 10.0  # that engines are given to tell their settings before the mirror begins
AFTER_SAMPLES_SECONDS: Final = 2.0  # of these, once they have been heard
STOP_SECONDS: Final = 5.0  # that each part is given to end
REJECTS_LOGGED_EVERY_SECONDS: Final = 30.0


class Daemon:
    """The twins of some pools and the feeds that they share, running between `start` and `stop`.

    With `http` None nothing is served. With `warm_up`, and no checkpoint to go on from, nothing is ready before the
    logs have been read up to the present. `prepare` makes the kernels ready, while all else waits but the HTTP server.
    `clock` gives unix seconds. Without `start`, whoever calls `ingest` and `publish` in turn moves the daemon on.
    Raises UserError for an address that cannot be listened on.
    """

    def __init__(
        self,
        pools: Sequence[PoolTwin],
        feeds: Sequence[Feed],
        *,
        http: HttpConfig | None = None,
        checkpoints: Checkpoints | None = None,
        stale_after_seconds: float = STALE_AFTER_SECONDS,
        warm_up: bool = False,
        prepare: Callable[[], None] | None = None,
        shapes: Mapping[str, ModelShape] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.failed = False
        self._clock = clock
        self._prepare = prepare
        self._freshness = Freshness(stale_after_seconds, clock)
        self._warming_up = warm_up
        self.pools = {pool.name: pool for pool in pools}
        self._feeds = tuple(feeds)
        self._engine_notes = {
            pool.name: EngineNotes(
                pool.name, alone=pool.metrics is not None, host_tier=pool.fleet.engine.host_tier is not None
            )
            for pool in pools
        }
        self._unmodelled = {
            pool.name: UnmodelledFeatures(
                (shapes or {}).get(pool.name), host_tier=pool.fleet.engine.host_tier is not None
            )
            for pool in pools
        }
        self._checkpoints = checkpoints
        self._early: list[tuple[str, TelemetryRecord]] = []  # polled while engines' settings were waited for
        self._drained = False
        self._published = -math.inf
        self._rejects = _RejectLog()
        self._ended: set[str] = set()
        self._stopping = Event()
        self._views: Mapping[str, TwinView] = {}
        self.publish()
        self.http = self._listen(http) if http else None
        self._thread = Thread(target=self._keep_ingesting, name="ingest", daemon=True)
        self._resumed = checkpoints is not None and checkpoints.restore(self.pools, self._sources)
        if self._resumed:
            self._warming_up = False
            self.publish()  # what it goes on from

    @classmethod
    def of(cls, settings: Settings, warm_up_seconds: float = 0.0) -> Daemon:
        """The daemon that a settings file describes. Raises UserError.

        Without a checkpoint it begins with the last `warm_up_seconds` of the logs, where any are given.
        """
        letters = DeadLetters(settings.dead_letters) if settings.dead_letters else None
        store = ScoreStore(settings.checkpoints.directory / FILE_NAME) if settings.checkpoints else None
        pools = []
        for name, pool in settings.by_pool.items():
            mirror = replace(pool.mirror.settings(name), prior=pool.fleet.prior, floor=pool.fleet.floor)
            entries = [entry for entry in settings.sources if entry.pool in (None, name)]
            pools.append(
                PoolTwin(
                    pool.fleet.settings(),
                    mirror,
                    pool.forecast,
                    calibrated=pool.fleet.calibrated,
                    score_store=store,
                    given=pool.fleet.engine_given,
                    from_metrics=all(isinstance(entry, LiveSource) for entry in entries),
                )
            )
        feeds = []
        for entry in settings.sources:
            try:
                source = open_source(entry, settings, letters, warm_up_seconds)
            except TraceError as error:
                raise UserError(str(error)) from None
            every_seconds = entry.interval_seconds if isinstance(entry, MetricsSource) else None
            feeds.append(Feed(source, entry.pool or "", every_seconds, checks_only=entry.type == "kv_events"))
        return cls(
            pools,
            feeds,
            http=settings.http,
            checkpoints=Checkpoints(**settings.checkpoints.model_dump()) if settings.checkpoints else None,
            stale_after_seconds=settings.stale_after_seconds,
            warm_up=warm_up_seconds > 0.0,
            prepare=lambda: make_ready(pool.fleet.engine for pool in pools),
            shapes={name: pool.fleet.hardware.shape for name, pool in settings.by_pool.items() if pool.fleet.hardware},
        )

    def _listen(self, http: HttpConfig) -> HttpServer:
        kept = KeptPolicies(self._checkpoints.directory) if self._checkpoints else None
        controls = {name: PoolControl(pool, kept) for name, pool in self.pools.items()}
        twin = Twin(lambda: self.views, controls)
        try:
            return HttpServer(twin, http.host, http.port, http.access, http.limits)
        except AddressError as error:
            raise UserError(
                f"{error.strerror}; stop what listens there, or choose another address "
                "(http.host and http.port in the settings file, --host and --port of the demo)"
            ) from None

    @property
    def views(self) -> Mapping[str, TwinView]:
        """The figures published last, by pool."""
        if not self.preparing:
            return self._views
        now, far, kernels = self._clock(), compiled(), counts()
        return {
            name: replace(view, unix_seconds=now, compiling=far, kernels=kernels) for name, view in self._views.items()
        }

    @property
    def view(self) -> TwinView:
        """Those of the first pool, which often is the only one."""
        return next(iter(self.views.values()))

    @property
    def preparing(self) -> bool:
        """Whether the kernels are being made ready."""
        return self._prepare is not None

    @property
    def drained(self) -> bool:
        """Whether every source has ended and all its records were processed."""
        return self._drained

    @property
    def _sources(self) -> list[Source]:
        return [feed.source for feed in self._feeds]

    def start(self) -> None:
        """Begin; returns at once."""
        if self.http:
            self.http.start()
            log.info("serving metrics and the status page at %s", self.http.url)
        self._thread.start()

    def stop(self) -> bool:
        """End all parts, each within a few seconds. Returns whether all did; one that did not ends with the process."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
        for source in self._sources:
            source.close()
        ends_by = time.monotonic() + STOP_SECONDS
        endings = [pool.stop() for pool in self.pools.values()]
        for ending in endings:
            ending.join(max(0.0, ends_by - time.monotonic()))
        if self.http:
            self.http.close()
        asked = any(pool.what_if.asked for pool in self.pools.values())  # a what-if is being simulated
        ended = not asked and not any(thread.is_alive() for thread in (self._thread, *endings))
        log.info("stopped" if ended else "stopped; a running computation was cancelled")
        return ended

    # --- ingesting ------------------------------------------------------------------------------------------------

    def _keep_ingesting(self) -> None:
        try:
            self._begin()
            if not self._resumed:
                self._wait_for_settings()
            while not self._stopping.is_set():
                if not self.ingest():
                    self._stopping.wait(POLL_SECONDS)
                if time.monotonic() - self._published >= PUBLISH_SECONDS:
                    self.publish()
                if self._checkpoints and self._checkpoints.due:
                    self._checkpoint(self._checkpoints)
            if self._checkpoints:
                self._checkpoint(self._checkpoints)
        except Exception:
            log.exception("the mirror failed; the daemon exits")
            self.failed = True

    def _begin(self) -> None:
        if self._prepare is not None:
            began = time.monotonic()
            self._prepare()
            self._prepare = None
            log.info("kernels ready after %.1f s", time.monotonic() - began)
        if self._stopping.is_set():
            return
        self.publish()
        for pool in self.pools.values():
            pool.start()
        for source in self._sources:
            log.info("reading %s", source.name)

    def _checkpoint(self, checkpoints: Checkpoints) -> None:
        checkpoints.write(checkpoints.take(self.pools.values(), self._sources))

    def _wait_for_settings(self) -> None:
        """Give the engines a moment to tell how they are set: a mirror is best begun so. It also adopts it later."""
        tellers = [feed for feed in self._feeds if tells(feed.source)]
        ends_by = time.monotonic() + DISCOVER_SECONDS
        while not self._stopping.is_set() and not all(told([feed.source]) for feed in tellers):
            if time.monotonic() > ends_by:
                log.warning("the engines have not reported their settings yet; the settings file applies until they do")
                break
            for feed in tellers:
                self._early += feed.poll(BATCH_RECORDS, self.pools)[0]
            if self._early:  # those that tell do so with their first samples
                ends_by = min(ends_by, time.monotonic() + AFTER_SAMPLES_SECONDS)
            self._stopping.wait(POLL_SECONDS)
        self._adopt()

    def _adopt(self) -> None:
        """Go on with the engines' own settings, also when one restarts with others."""
        for name, pool in self.pools.items():
            pool.adopt(told(feed.source for feed in self._feeds if feed.feeds(name)))

    def ingest(self) -> bool:
        """Take in what the sources have now. Returns whether there may be more at once."""
        records: dict[str, list[TelemetryRecord]] = {name: [] for name in self.pools}
        more = False
        for pool_name, record in self._early:
            records[pool_name].append(record)
        self._early = []
        for feed in self._feeds:
            polled, full = feed.poll(BATCH_RECORDS, self.pools)
            for pool_name, record in polled:
                records[pool_name].append(record)
                self._unmodelled[pool_name].take(record)
                if isinstance(record, EngineSample):
                    self._engine_notes[pool_name].take(record)
            more = more or full
        drained = True
        for name, pool in self.pools.items():
            ended = not records[name] and all(feed.source.exhausted for feed in self._feeds if feed.feeds(name))
            pool.ingest(records[name], more=more, ended=ended)
            drained = drained and ended
        self._drained = drained
        return more

    # --- publishing -----------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Take the figures of every pool as of now."""
        states = [feed.state for feed in self._feeds]
        self._rejects.tell(states)
        for state in states:
            if state.ended and state.name not in self._ended:
                self._ended.add(state.name)
                log.info("source %s has ended; its last figures are still served", state.name)
        self._adopt()
        stale = self._freshness.look(self._feeds, states)
        if self._warming_up and all(map(self._freshness.is_caught_up, self._feeds, states)):
            self._warming_up = False
            log.info("warm-up done: the logs were read up to the present")
        kept = self._checkpoints
        views = {}
        for name, pool in self.pools.items():
            mine = [number for number, feed in enumerate(self._feeds) if feed.feeds(name)]
            reasons = tuple(stale[number] for number in mine if stale[number])
            self._freshness.tell(name, reasons)
            view = pool.view(tuple(states[number] for number in mine))
            sources = [self._feeds[number].source for number in mine]
            contrary = contradictions(sources)
            notes = [f"Engine configuration: {line}." for line in (*contrary, *capacity_notes(sources))]
            engines = self._engine_notes[name].engines()
            features = self._unmodelled[name].found(self._engine_notes[name].samples(), discovered(sources))
            view = spoiled(view, features)
            notes += note_of(features) + self._engine_notes[name].notes() + unmatched_caches(view.caches, view.replicas)
            if view.power is not None:
                notes += [f"Source {states[n].name}: {line}." for n in mine for line in self._feeds[n].power_notes]
            views[name] = replace(
                view,
                notes=(*view.notes, *notes),
                engines=engines,
                engine_contradictions=len(contrary),
                kernels=counts(),
                stale=reasons,
                warming_up=self._warming_up,
                checkpoint_unix_seconds=kept.written_unix_seconds if kept else None,
                checkpoint_failures=kept.failures if kept else 0,
            )
        self._views = views
        self._published = time.monotonic()


class _RejectLog:
    """Tells of rejected input when it begins and now and then while it goes on."""

    def __init__(self) -> None:
        self._told: Mapping[str, Mapping[str, int]] = {}
        self._told_at = -math.inf

    def tell(self, states: Iterable[SourceState]) -> None:
        now = time.monotonic()
        rejected = {state.name: state.rejected for state in states if state.rejected}
        if rejected == self._told or now - self._told_at < REJECTS_LOGGED_EVERY_SECONDS:
            return
        for name, reasons in rejected.items():
            if reasons != self._told.get(name):
                told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
                log.warning("source %s: rejected input so far: %s", name, told)
        self._told, self._told_at = rejected, now


def open_source(entry: AnySource, settings: Settings, letters: DeadLetters | None, warm_up_seconds: float) -> Source:
    """The source that the settings describe. Raises TraceError."""
    pool = entry.pool or (next(iter(settings.by_pool)) if len(settings.by_pool) == 1 else UNNAMED_POOL)
    if isinstance(entry, LiveSource):
        fleet = settings.by_pool[pool].fleet
        return entry.open(pool, fleet.engine.model_dump(include=set(fleet.engine_given)))
    if isinstance(entry, TraceFile):
        return FollowFile(entry.path, entry.format, follow=entry.follow, name=entry.name, dead_letters=letters)
    kafka = import_module("connectors.kafka.source")  # needs an extra, which the settings' check found
    start = time.time() - warm_up_seconds if warm_up_seconds else None
    source: Source = kafka.KafkaSource(entry, pool=pool, start=start, letters=letters)
    return source
