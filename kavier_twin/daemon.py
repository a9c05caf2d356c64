"""The daemon of one pool: sources into the mirror, forecasts from it, figures out of both.

Three activities share one mirror behind one lock: a thread that polls the sources and lets the mirror catch up, the
forecaster's scheduler that forks it now and then, and the HTTP server, which only reads the view published last.
"""

from __future__ import annotations

import heapq
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from threading import Event, Lock, Thread
from types import FrameType
from typing import Any, Final

from connectors.dead_letters import DeadLetters
from connectors.follow import FollowFile
from connectors.source import LogSource, Source
from connectors.traces import TraceError
from kavier_twin import __version__
from kavier_twin.checkpoints import Checkpoints, seekable
from kavier_twin.config import DEFAULT_HOST, DEFAULT_PORT, AnySource, Settings, TraceFile
from kavier_twin.errors import UserError
from kavier_twin.forecast.forecaster import Forecaster, ForecastSettings
from kavier_twin.forecast.result import Forecast
from kavier_twin.live_sources import LiveSource
from kavier_twin.serve import assemble
from kavier_twin.serve.http import AddressError, HttpServer
from kavier_twin.serve.view import Outlook, SourceState, TwinView
from kavier_twin.simulation.policies import PolicyError, apply_overrides, hypothetical_reasons, vllm_flags
from kavier_twin.simulation.settings import COEFFICIENTS, FleetSettings
from kavier_twin.telemetry import EngineSample, RequestFinished, RequestRecord, TelemetryRecord
from kavier_twin.twin.mirror import Mirror, MirrorSettings
from kavier_twin.twin.snapshot import Snapshot

log = logging.getLogger(__name__)

BATCH_RECORDS: Final = 500  # polled of a source and processed at a time
POLL_SECONDS: Final = 0.05  # between polls that found nothing
PUBLISH_SECONDS: Final = 0.5  # between views
STOP_SECONDS: Final = 5.0  # that each part is given to end
LIVE_WITHIN_SECONDS: Final = 300.0  # a stream whose newest record is this close to the wall clock is live
REJECTS_LOGGED_EVERY_SECONDS: Final = 30.0
SAMPLES_KEPT: Final = 1_000  # for each pod


class Daemon:
    """The twin of one pool, running between `start` and `stop`.

    `event_clock` tells the stream's time now where the source knows it (a replay). Otherwise a stream of unix times
    close to now is live, and time passes without records; any other stream's time follows its records. With
    `host` None nothing is served. Raises UserError for an address that cannot be listened on.
    """

    def __init__(
        self,
        fleet: FleetSettings,
        sources: Sequence[Source],
        *,
        mirror: MirrorSettings | None = None,
        forecast: ForecastSettings | None = None,
        calibrated: bool = False,
        host: str | None = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        event_clock: Callable[[], float] | None = None,
        notes: Iterable[str] = (),
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.failed = False
        self._mirror = Mirror(mirror or MirrorSettings(), fleet, calibrated=calibrated)
        self._checkpoints = checkpoints
        self._lock = Lock()
        self._forecast = forecast or ForecastSettings()
        self._forecaster = Forecaster(self._forecast)
        self._sources = tuple(sources)
        self._event_clock = event_clock
        self._notes = tuple(notes)
        self._policies = _flags(fleet, self._forecast)
        self._ends = _HeldEnds()
        self._reported = _EngineSamples()
        self._outlook: Outlook | None = None
        self._live = False
        self._drained = False
        self._behind = False
        self._last_record_unix = math.nan
        self._published = -math.inf
        self._rejects = _RejectLog()
        self._ended: set[str] = set()
        self._calibrated_on = 0
        self._stopping = Event()
        self._view = TwinView(pool=self._mirror.settings.pool, version=__version__, unix_seconds=time.time())
        self._publish()
        self.http = _listen(lambda: self._view, host, port) if host is not None else None
        self._thread = Thread(target=self._keep_ingesting, name="ingest", daemon=True)
        self._restore(fleet)

    @classmethod
    def of(cls, settings: Settings) -> Daemon:
        """The daemon that a settings file describes. Raises UserError."""
        letters = DeadLetters(settings.dead_letters) if settings.dead_letters else None
        engine = settings.fleet.settings().engine.model_dump()
        sources: list[Source] = []
        for entry in settings.sources:
            try:
                sources.append(_open(entry, settings.pool, letters, engine))
            except TraceError as error:
                raise UserError(str(error)) from None
        return cls(
            settings.fleet.settings(),
            sources,
            mirror=replace(
                settings.mirror.settings(settings.pool), prior=settings.fleet.prior, floor=settings.fleet.floor
            ),
            forecast=settings.forecast,
            calibrated=settings.fleet.calibrated,
            host=settings.http.host,
            port=settings.http.port,
            checkpoints=Checkpoints(**settings.checkpoints.model_dump()) if settings.checkpoints else None,
        )

    def _restore(self, fleet: FleetSettings) -> None:
        """Go on where the last run stood."""
        restored = self._checkpoints.restore(self._mirror.settings, fleet) if self._checkpoints else None
        if restored is None:
            return
        self._mirror = restored.mirror
        for end in restored.ends:
            self._ends.hold(end)
        for key, source in seekable(self._sources):
            source.seek(restored.positions.get(key, {}))
        self._publish()

    @property
    def view(self) -> TwinView:
        """The figures published last."""
        return self._view

    @property
    def drained(self) -> bool:
        """Whether every source has ended and all its records were processed."""
        return self._drained

    def start(self) -> None:
        """Begin; returns at once."""
        if self.http:
            self.http.start()
            log.info("serving metrics and the status page on %s", self.http.url)
        self._thread.start()
        self._forecaster.start(self._snapshot, self._take_forecast)
        for source in self._sources:
            log.info("reading %s", source.name)

    def stop(self) -> bool:
        """End all parts, each within a few seconds. Returns whether all did; one that did not ends with the process."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
        for source in self._sources:
            source.close()
        ending = Thread(target=self._forecaster.stop, name="stop-forecaster", daemon=True)
        ending.start()
        ending.join(STOP_SECONDS)
        if self.http:
            self.http.close()
        ended = not self._thread.is_alive() and not ending.is_alive()
        log.info("stopped" if ended else "stopped; a computation under way is cut off")
        return ended

    # --- ingesting ------------------------------------------------------------------------------------------------

    def _keep_ingesting(self) -> None:
        try:
            while not self._stopping.is_set():
                if not self._ingest():
                    self._stopping.wait(POLL_SECONDS)
                if time.monotonic() - self._published >= PUBLISH_SECONDS:
                    self._publish()
                if self._checkpoints and self._checkpoints.due:
                    self._checkpoint(self._checkpoints)
            if self._checkpoints:
                self._checkpoint(self._checkpoints)
        except Exception:
            log.exception("the mirror failed; the daemon ends")
            self.failed = True

    def _checkpoint(self, checkpoints: Checkpoints) -> None:
        with self._lock:
            saved = checkpoints.take(self._mirror, self._ends.until(math.inf), self._sources)
        checkpoints.write(saved)

    def _ingest(self) -> bool:
        """Take in what the sources have now. Returns whether there may be more at once."""
        records: list[TelemetryRecord] = []
        more = False
        for source in self._sources:
            polled = source.poll(BATCH_RECORDS)
            records += polled
            more = more or len(polled) >= BATCH_RECORDS
        if records:
            self._last_record_unix = time.time()
        self._drained = False if records else self._drained
        ended = all(source.exhausted for source in self._sources) and not records
        with self._lock:
            for record in records:
                self._take(record)
            newest = self._mirror.newest_seconds
            for held in self._ends.due(math.inf if ended else newest):
                self._mirror.ingest(held)
            # Nothing comes any more: what is buffered need not wait for the watermark.
            last = self._mirror.newest_seconds + self._mirror.settings.lateness_seconds
            self._mirror.advance(last if ended and math.isfinite(last) else None)
            self._drained = ended
            self._behind = more
            self._tell_of_calibration()
        return more

    def _take(self, record: TelemetryRecord) -> None:
        """Into the mirror; the end of a request told in one record with its arrival has to wait for its time."""
        if isinstance(record, RequestRecord):
            for held in self._ends.due(record.time_seconds):
                self._mirror.ingest(held)
            finished = record.finished()
            if finished is not None:
                self._ends.hold(finished)
            self._mirror.ingest(record.seen())
            return
        if isinstance(record, EngineSample):
            self._reported.add(record)
        self._mirror.ingest(record)

    def _present(self) -> Mirror:
        """The mirror as of now: of a stream whose time is a clock's, moved on to where no record has come yet."""
        now = None if self._behind else self._event_now()
        if now is None or now <= self._mirror.time_seconds:
            return self._mirror
        present = self._mirror.fork(self._ends.until(now))
        present.advance(now)
        return present

    def _event_now(self) -> float | None:
        if self._event_clock is not None:
            return self._event_clock()
        now = time.time()
        if not self._live and abs(now - self._mirror.newest_seconds) < LIVE_WITHIN_SECONDS:
            self._live = True
            log.info("the stream is live: its time is the wall clock's")
        return now if self._live else None

    def _tell_of_calibration(self) -> None:
        calibration = self._mirror.calibration
        if calibration is not None and calibration.requests != self._calibrated_on:
            self._calibrated_on = calibration.requests
            log.info(
                "step times fitted on %d requests: mean TTFT %.3f and mean end-to-end latency %.3f of those observed",
                calibration.requests,
                calibration.mean_ttft_ratio,
                calibration.mean_e2e_ratio,
            )

    # --- forecasting ----------------------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot | None:
        with self._lock:
            return self._present().snapshot()

    def _take_forecast(self, forecast: Forecast) -> None:
        if self._outlook is None:
            log.info("first forecast made in %.1f s", forecast.duration_seconds or 0.0)
        self._outlook = assemble.outlook(forecast, time.time(), self._policies)

    # --- publishing -----------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        states = tuple(map(_state, self._sources))
        self._rejects.tell(states)
        for state in states:
            if state.ended and state.name not in self._ended:
                self._ended.add(state.name)
                log.info("source %s has ended; its last figures stay served", state.name)
        with self._lock:
            self._view = self._seen(states)
        self._published = time.monotonic()

    def _seen(self, states: tuple[SourceState, ...]) -> TwinView:
        mirror = self._present()
        records, dropped = assemble.records(mirror, sum(sum(state.rejected.values()) for state in states))
        step_time = mirror.fleet.settings.step_time
        lag = max(0.0, mirror.newest_seconds - mirror.time_seconds) if math.isfinite(mirror.time_seconds) else math.nan
        view = TwinView(
            pool=mirror.settings.pool,
            version=__version__,
            unix_seconds=time.time(),
            event_seconds=mirror.time_seconds,
            lag_seconds=lag,
            buffered_records=mirror.buffered + len(self._ends),
            last_record_unix_seconds=self._last_record_unix,
            records=records,
            dropped=dropped,
            finished_requests=mirror.finished,
            calibrated=mirror.calibrated,
            calibrated_on_requests=mirror.calibration.requests if mirror.calibration else 0,
            pace_ratio=mirror.pace,
            frontend_seconds=mirror.frontend_seconds if mirror.calibration else math.nan,
            step_time={name: getattr(step_time, name) for name in COEFFICIENTS},
            exact_cache_ratio=mirror.fidelity.exact_cache_ratio(),
            beside=assemble.beside(mirror, self._reported.at(mirror.time_seconds)),
            sources=states,
            checkpoint_unix_seconds=self._checkpoints.written_unix_seconds if self._checkpoints else None,
            checkpoint_failures=self._checkpoints.failures if self._checkpoints else 0,
            forecasts={"succeeded": self._forecaster.cycles, "failed": self._forecaster.failures},
            outlook=self._outlook,
            currency=mirror.fleet.settings.footprint.currency if mirror.fleet.settings.footprint else "",
            notes=self._notes,
        )
        return assemble.judged(view, mirror, self._forecast.slos)


class StopSignals:
    """Within it, SIGTERM and Ctrl-C are remembered instead of ending the process; a second one ends it as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _take(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    @property
    def exit_status(self) -> int:
        """0 where a service manager ended the process as it should, 130 for Ctrl-C."""
        return 130 if self.received == signal.SIGINT else 0


class _HeldEnds:
    """Ends of requests whose record told arrival and end at once, until the stream has come so far."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str, RequestFinished]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def hold(self, finished: RequestFinished) -> None:
        heapq.heappush(self._heap, (finished.time_seconds, finished.id, finished))

    def due(self, until_seconds: float) -> list[RequestFinished]:
        found = []
        while self._heap and self._heap[0][0] <= until_seconds:
            found.append(heapq.heappop(self._heap)[2])
        return found

    def until(self, time_seconds: float) -> list[RequestFinished]:
        """Those up to a time; they stay held."""
        return [entry[2] for entry in self._heap if entry[0] <= time_seconds]


class _EngineSamples:
    """What the engines said of themselves lately, to be read at the time the mirror stands at."""

    def __init__(self) -> None:
        self._pods: dict[tuple[str, str, str], deque[EngineSample]] = {}

    def add(self, sample: EngineSample) -> None:
        self._pods.setdefault((sample.namespace, sample.pod, sample.engine), deque(maxlen=SAMPLES_KEPT)).append(sample)

    def at(self, time_seconds: float) -> tuple[float, float, float]:
        """Running and waiting requests of all pods, and mean KV usage; NaN where unknown."""
        newest = []
        for samples in self._pods.values():
            while len(samples) > 1 and samples[1].time_seconds <= time_seconds:
                samples.popleft()
            if samples and samples[0].time_seconds <= time_seconds:
                newest.append(samples[0])
        usage = [s.kv_cache_usage_ratio for s in newest if s.kv_cache_usage_ratio is not None]
        return (
            _sum([s.requests_running for s in newest]),
            _sum([s.requests_waiting for s in newest]),
            sum(usage) / len(usage) if usage else math.nan,
        )


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
                log.warning("source %s: input rejected so far: %s", name, told)
        self._told, self._told_at = rejected, now


def _open(entry: AnySource, pool: str, letters: DeadLetters | None, engine: Mapping[str, Any]) -> Source:
    """The source that the settings describe. Raises TraceError."""
    if isinstance(entry, LiveSource):
        return entry.open(pool, engine)
    if isinstance(entry, TraceFile):
        return FollowFile(entry.path, entry.format, follow=entry.follow, name=entry.name, dead_letters=letters)
    kafka = import_module("connectors.kafka.source")  # needs an extra, which the settings' check found
    source: Source = kafka.KafkaSource(entry, pool=pool, letters=letters)
    return source


def _state(source: Source) -> SourceState:
    log = source if isinstance(source, LogSource) else None
    return SourceState(
        source.name,
        source.exhausted,
        dict(source.rejected()),
        trouble=source.trouble,
        last_record_seconds=math.nan if source.last_record_seconds is None else source.last_record_seconds,
        lag_records=log.lag_records if log else math.nan,
        lost=dict(log.lost()) if log else {},
    )


def _listen(current: Callable[[], TwinView], host: str, port: int) -> HttpServer:
    try:
        return HttpServer(current, host, port)
    except AddressError as error:
        raise UserError(
            f"{error.strerror}; stop what listens there, or choose another address "
            "(http.host and http.port in the settings file, --host and --port of the demo)"
        ) from None


def _flags(fleet: FleetSettings, forecast: ForecastSettings) -> dict[str, tuple[tuple[str, ...], bool]]:
    """By policy: the flags that deploy it, and whether flags deploy all of it."""
    found = {}
    for policy in forecast.policies:
        try:
            changed = apply_overrides(fleet, policy.overrides)
        except PolicyError:
            continue
        found[policy.name] = (tuple(vllm_flags(fleet, changed)), not hypothetical_reasons(fleet, changed))
    return found


def _sum(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(sum(known)) if known else math.nan
