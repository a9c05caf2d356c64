"""A pool's engines and GPUs as a Prometheus server sees them."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from connectors.background import BackgroundSource, Backoff
from connectors.prometheus.api import PrometheusApi, Series, matchers
from connectors.prometheus.engine_config import EngineConfigs, from_cache_config
from connectors.prometheus.engines import engine_samples
from connectors.prometheus.gpus import gpu_samples, gpu_selector, of_pods
from connectors.prometheus.http import Access, FetchError, HttpClient
from connectors.prometheus.lookaround import some, what_is_there
from connectors.prometheus.names import (
    CACHE_CONFIG,
    cache_config_selector,
    engine_selector,
    kubernetes_pod_of,
    namespace_of,
)
from connectors.prometheus.readings import Reading
from connectors.prometheus.servers import Server, Servers, readable, with_gauges
from kavier_twin.telemetry import EngineSample, GpuSample, TelemetryRecord

log = logging.getLogger(__name__)

LONGEST_BACKOFF_SECONDS: Final = 60.0
_WINDOW_SECONDS: Final = 300.0  # asked for at a time
_SHORTEST_WINDOW_SECONDS: Final = 1.0
_WIDEN_AFTER: Final = 50  # windows that the server did not refuse
_COMMIT_SECONDS: Final = (
    15.0  # after its time stamp, until a scrape is surely stored: Prometheus' scrape_timeout and more
)
_SKEW_TOLD_SECONDS: Final = 5.0
_FORGET_SECONDS: Final = 3_600.0  # a target not scraped for so long is gone

_SILENT_SECONDS: Final = 60.0  # without an engine, until it is looked for
# What tells pages of GPU exporters apart.
_GPU_PAGE: Final = ("exported_instance", "exported_job", "instance", "job")


@dataclass(frozen=True)
class Selection:
    """Which series belong to the pool. `engines` are label values that all its vLLM series have.

    `gpus` are those of the GPU exporter's; None: no GPU is asked for. GPUs are further restricted to those of the
    pool's pods; those that no pod is named for count where `gpus` chooses them. `metric_prefix` is one more that stands
    for `vllm:`.
    """

    engines: Mapping[str, str] = field(default_factory=dict)
    gpus: Mapping[str, str] | None = field(default_factory=dict)
    metric_prefix: str = ""


class PrometheusSource(BackgroundSource):
    """Every scrape of the pool's engines and GPUs that Prometheus has stored, once, with the time of the scrape.

    Goes on where it stopped when Prometheus, or the way to it, comes back, and reaches back at most
    `max_backfill_seconds`; at start, `warm_up_seconds`. All times are the server's clock. `configured` is what the
    settings say of an engine, which is compared with what the engines say (`EngineConfigs`).
    """

    def __init__(
        self,
        url: str,
        access: Access,
        *,
        name: str = "prometheus",
        pool: str = "default",
        selection: Selection | None = None,
        interval_seconds: float = 15.0,
        warm_up_seconds: float = 0.0,
        max_backfill_seconds: float = 3_600.0,
        configured: Mapping[str, object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(name)
        self.configs = EngineConfigs(configured or {})
        self.clock_skew_seconds = 0.0  # the server's clock less ours
        self._http = HttpClient(access)
        self._api = PrometheusApi(url, self._http, access.timeout_seconds)
        self._pool = pool
        self._selection = selection or Selection()
        self._interval = interval_seconds
        self._warm_up = warm_up_seconds
        self._max_backfill = max_backfill_seconds
        self._clock = clock
        self._until: float | None = None  # up to which everything stored was fetched
        self._fetched = self._polled = 0  # samples
        self._windows: deque[tuple[int, float]] = deque()  # samples fetched by the end of a window, and its end
        self._polled_until: float | None = None  # up to which everything was polled
        self._newest_polled: dict[str, float] = {}  # time by engine or GPU
        self._sought: dict[str, float] = {}  # what was polled before a restart
        self._window = _WINDOW_SECONDS
        self._windows_accepted = 0  # in a row
        self._servers = Servers(self._selection.metric_prefix)
        self._newest: dict[Server, float] = {}
        self._newest_gpus: dict[Server, float] = {}
        self._newest_engine_seconds = -math.inf
        self._skew_told = False
        self._pods: dict[tuple[str, str], float] = {}  # (namespace, pod) -> time of its newest scrape
        self._gpu_note = ""

    def close(self) -> None:
        super().close()
        self._http.close()

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        records = super().poll(max_records)
        self._newest_polled |= {_whose(record): record.time_seconds for record in records}
        self._polled += len(records)
        with self._changed:
            while self._windows and self._windows[0][0] <= self._polled:
                self._polled_until = self._windows.popleft()[1]
        return records

    def positions(self) -> dict[str, Any]:
        """The time up to which all was polled, and the newest sample polled of each engine and GPU."""
        if self._polled_until is None:
            return {}
        recent = self._polled_until - _FORGET_SECONDS
        self._newest_polled = {whose: at for whose, at in self._newest_polled.items() if at > recent}
        return {"until": self._polled_until, "newest": dict(self._newest_polled), "servers": self._servers.save()}

    def seek(self, positions: dict[str, Any]) -> None:
        """Go on from there, as far back as `max_backfill_seconds` allow."""
        if positions:
            self._until = self._polled_until = positions["until"]
            self._newest_polled = dict(positions["newest"])
            self._sought = dict(positions["newest"])
            self._servers.restore(positions.get("servers", ()))

    def power_notes(self) -> list[str]:
        """Why no GPU's power is read; empty where it is, or is not asked for."""
        return [self._gpu_note] if self._gpu_note else []

    def _fetch(self) -> None:
        backoff = Backoff(min(1.0, self._interval), LONGEST_BACKOFF_SECONDS)
        while not self._closing:
            try:
                self._set_trouble(self._catch_up())
            except FetchError as error:
                self._reject(error.reason)
                self._set_trouble(str(error))
                self._pause(backoff.next())
            else:
                backoff.reset()
                self._pause(self._interval)

    def _catch_up(self) -> str:
        """Fetch all that is new. Returns why that is nothing of an engine; empty where it is something."""
        asked_at = self._clock()
        now = self._api.now()
        self.clock_skew_seconds = now - (asked_at + self._clock()) / 2.0
        self._tell_of_skew()
        if self._until is None:
            self._until = now - max(self._warm_up, self._interval)
        if self._until < now - self._max_backfill:
            self._reject("beyond-backfill")
            self._until = now - self._max_backfill
        while self._until < now and not self._closing:
            end = min(self._until + self._window, now)
            try:
                self._take(self._until - _COMMIT_SECONDS, end)
            except FetchError as error:
                self._ask_for_less(error, end - self._until)
                continue
            self._until = end
            with self._changed:
                self._windows.append((self._fetched, end))
            self._windows_accepted += 1
            if self._windows_accepted >= _WIDEN_AFTER:  # what was refused once may have been of a busy minute
                self._window, self._windows_accepted = min(2.0 * self._window, _WINDOW_SECONDS), 0
        self._learn_configs()
        forget = now - _FORGET_SECONDS
        for newest in (self._newest, self._newest_gpus):
            for server in [server for server, at in newest.items() if at < forget]:
                del newest[server]
        self._servers.forget(forget)
        self._pods = {pod: at for pod, at in self._pods.items() if at > forget}
        if self._newest_engine_seconds > now - max(_SILENT_SECONDS, 2.0 * self._interval):
            return ""
        return what_is_there(self._api, self._selection.engines, self._selection.metric_prefix)

    def _ask_for_less(self, error: FetchError, seconds: float) -> None:
        """Go on with shorter ranges where the server refused one of so many seconds; otherwise raise."""
        if not error.asks_for_less and error.reason != "timeout":
            raise error
        if seconds <= _SHORTEST_WINDOW_SECONDS:
            raise FetchError(
                error.reason,
                f"{str(error).partition(': ')[2]}; even for ranges of {seconds + _COMMIT_SECONDS:.0f} s: raise the "
                "server's limit, or select fewer series by engines",
            )
        self._window, self._windows_accepted = max(_SHORTEST_WINDOW_SECONDS, 0.5 * seconds), 0
        if error.reason == "timeout":
            raise error  # it may as well be away
        log.info(
            "source %s: queries are limited to ranges of %.0f s because the server refuses longer ones",
            self.name,
            self._window,
        )

    def _take(self, start_seconds: float, end_seconds: float) -> None:
        """Hand on the scrapes within a time, those not yet handed on, in order of time."""
        chosen = self._selection
        engines = self._api.stored(
            engine_selector(matchers(chosen.engines), chosen.metric_prefix), start_seconds, end_seconds
        )
        gpus: list[Series] = []
        if chosen.gpus is not None:
            gpus = self._api.stored(gpu_selector(matchers(chosen.gpus)), start_seconds, end_seconds)
        samples: list[EngineSample | GpuSample] = []
        for server, at, readings in self._new_scrapes(self._of_servers(engines), self._newest):
            named = self._servers.named(server, at)
            found = engine_samples(
                readings,
                self._reject,
                time_seconds=at,
                pool=self._pool,
                namespace=named.namespace,
                pod=named.pod,
                spot=named.spot,
                prefix=chosen.metric_prefix,
            )
            if found:
                labels = dict(server)
                self._pods[namespace_of(labels), kubernetes_pod_of(labels)] = at
                self._newest_engine_seconds = max(self._newest_engine_seconds, at)
            samples += found
        if samples:
            self._set_trouble("")  # before anybody has them
        samples += self._of_gpus(gpus)
        for sample in sorted(samples, key=lambda sample: sample.time_seconds):
            if sample.time_seconds > self._sought.get(_whose(sample), -math.inf):
                self._offer(sample)
                self._fetched += 1

    def _of_servers(self, engines: Iterable[Series]) -> list[tuple[Server, Series]]:
        """Each series with its server."""
        named = [Series(readable(labels), samples) for labels, samples in engines]
        self._servers.learn((series.labels.get("__name__", ""), series.labels) for series in named)
        groups: dict[Server, list[Series]] = defaultdict(list)
        for series in named:
            groups[self._servers.server_of(series.labels)].append(series)
        names = {
            server: [Reading(one.labels.get("__name__", ""), one.labels, 0.0) for one in group]
            for server, group in groups.items()
        }
        kept = with_gauges(names, self._selection.metric_prefix)
        return [(server, one) for server, group in groups.items() if server in kept for one in group]

    def _of_gpus(self, gpus: Sequence[Series]) -> list[GpuSample]:
        """Samples of the GPUs that the pool's pods use."""
        if not gpus and not self._newest_gpus and self._selection.gpus is not None:
            self._gpu_note = (
                "no GPU series of NVIDIA's dcgm-exporter or AMD's device-metrics-exporter"
                f"{_asked(self._selection.gpus)}, so power is not observed; correct gpus, or set gpus: null"
            )
        labelled = [(tuple((n, labels[n]) for n in _GPU_PAGE if n in labels), Series(labels, v)) for labels, v in gpus]
        found: list[GpuSample] = []
        strangers: list[GpuSample] = []
        for _, at, readings in self._new_scrapes(labelled, self._newest_gpus):
            samples = gpu_samples(readings, self._reject, time_seconds=at, pool=self._pool)
            mine = of_pods(samples, self._pods)
            if self._selection.gpus:
                mine += [sample for sample in samples if not sample.pod and sample not in mine]
            found += mine
            strangers += samples
        if found:
            self._gpu_note = ""
        elif strangers:
            named = sorted({sample.pod for sample in strangers} - {""})
            self._gpu_note = (
                f"{len({sample.gpu for sample in strangers})} GPUs are found, but none that a pod of the pool uses: "
                + (f"they name {some(named)}" if named else "they name no pod")
                + f"; the engines' pods are {some(sorted({pod for _, pod in self._pods} - {''})) or 'not named'}. "
                "Make the GPU exporter name pods (dcgm-exporter: --kubernetes), or choose the pool's GPUs by gpus"
            )
        return found

    def _new_scrapes(
        self, series: Iterable[tuple[Server, Series]], newest: dict[Server, float]
    ) -> Iterable[tuple[Server, float, list[Reading]]]:
        """Samples of one server with one time stamp are one scrape: Prometheus stamps them all alike."""
        scrapes: dict[tuple[float, Server], list[Reading]] = defaultdict(list)
        for server, (labels, samples) in series:
            known = newest.get(server)
            name = labels.get("__name__", "")
            for at, value in samples:
                if known is None or at > known:
                    scrapes[at, server].append(Reading(name, labels, value))
        for (at, server), readings in sorted(scrapes.items(), key=lambda scrape: scrape[0]):
            newest[server] = at
            yield server, at, readings

    def _learn_configs(self) -> None:
        """`cache_config_info` knows no model: it is the pool's if its server is."""
        wanted = {name: value for name, value in self._selection.engines.items() if name not in ("model_name", "model")}
        servers: dict[Server, list[dict[str, str]]] = defaultdict(list)
        for given, _ in self._api.instant(cache_config_selector(matchers(wanted), self._selection.metric_prefix)):
            labels = readable(given)
            server = self._servers.server_of(labels)
            if server in self._newest:
                servers[server].append(labels)
        for server, series in servers.items():
            named = self._servers.named(server, self._newest[server])
            where = f"{named.pod}:{named.spot}" if named.spot else named.pod
            for rank, config in from_cache_config(series).items():
                self.configs.learn(f"{where}, engine {rank or '0'}, {CACHE_CONFIG}", config)

    def _tell_of_skew(self) -> None:
        skewed = abs(self.clock_skew_seconds) > _SKEW_TOLD_SECONDS
        if skewed and not self._skew_told:
            log.warning(
                "source %s: the server's clock is %.0f s %s this host's; the server's clock is used",
                self.name,
                abs(self.clock_skew_seconds),
                "ahead of" if self.clock_skew_seconds > 0.0 else "behind",
            )
        self._skew_told = skewed


def _whose(record: TelemetryRecord) -> str:
    """What a sample is of."""
    if isinstance(record, GpuSample):
        return f"gpu {record.host} {record.gpu} {record.mig_instance}"
    assert isinstance(record, EngineSample)
    return f"engine {record.namespace} {record.pod} {record.engine} {record.model}"


def _asked(labels: Mapping[str, str]) -> str:
    return f" with {matchers(labels).removeprefix(',')}" if labels else ""
