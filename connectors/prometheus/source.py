"""A pool's engines and GPUs as a Prometheus server sees them."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from connectors.background import BackgroundSource, Backoff
from connectors.prometheus.api import PrometheusApi, Series
from connectors.prometheus.engine_config import EngineConfigs, from_cache_config
from connectors.prometheus.engines import engine_samples
from connectors.prometheus.gpus import gpu_samples, gpu_selector, of_pods
from connectors.prometheus.http import Access, FetchError, HttpClient
from connectors.prometheus.names import CACHE_CONFIG, engine_selector
from connectors.prometheus.readings import Reading
from kavier_twin.telemetry import EngineSample, GpuSample, TelemetryRecord

log = logging.getLogger(__name__)

LONGEST_BACKOFF_SECONDS: Final = 60.0
_WINDOW_SECONDS: Final = 300.0  # asked for at a time
_COMMIT_SECONDS: Final = (
    15.0  # after its time stamp, until a scrape is surely stored: Prometheus' scrape_timeout and more
)
_SKEW_TOLD_SECONDS: Final = 5.0
_FORGET_SECONDS: Final = 3_600.0  # a target not scraped for so long is gone

# What tells apart what was scraped: the labels that Prometheus attaches, and Ray's of a replica behind one address.
_TARGET_LABELS: Final = ("job", "instance", "namespace", "pod", "kubernetes_pod_name", "ReplicaId")
_POD_LABELS: Final = ("ReplicaId", "pod", "kubernetes_pod_name", "instance")

Target = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Selection:
    """Which series belong to the pool. `engines` are label values that all its vLLM series have.

    `gpus` are those of the DCGM exporter's; None: no GPU is asked for. GPUs are further restricted to those of the
    pool's pods.
    """

    engines: Mapping[str, str] = field(default_factory=dict)
    gpus: Mapping[str, str] | None = field(default_factory=dict)


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
        self._newest: dict[Target, float] = {}
        self._skew_told = False
        self._pods: dict[tuple[str, str], float] = {}  # (namespace, pod) -> time of its newest scrape

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
        return {"until": self._polled_until, "newest": dict(self._newest_polled)}

    def seek(self, positions: dict[str, Any]) -> None:
        """Go on from there, as far back as `max_backfill_seconds` allow."""
        if positions:
            self._until = self._polled_until = positions["until"]
            self._newest_polled = dict(positions["newest"])
            self._sought = dict(positions["newest"])

    def _fetch(self) -> None:
        backoff = Backoff(min(1.0, self._interval), LONGEST_BACKOFF_SECONDS)
        while not self._closing:
            try:
                self._catch_up()
                self._set_trouble("")
            except FetchError as error:
                self._reject(error.reason)
                self._set_trouble(str(error))
                self._pause(backoff.next())
            else:
                backoff.reset()
                self._pause(self._interval)

    def _catch_up(self) -> None:
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
            end = min(self._until + _WINDOW_SECONDS, now)
            self._take(self._until - _COMMIT_SECONDS, end)
            self._until = end
            with self._changed:
                self._windows.append((self._fetched, end))
        self._learn_configs()
        forget = now - _FORGET_SECONDS
        self._newest = {target: at for target, at in self._newest.items() if at > forget}
        self._pods = {pod: at for pod, at in self._pods.items() if at > forget}

    def _take(self, start_seconds: float, end_seconds: float) -> None:
        """Hand on the scrapes within a time, those not yet handed on, in order of time."""
        engines = self._api.stored(engine_selector(_matchers(self._selection.engines)), start_seconds, end_seconds)
        gpus: list[Series] = []
        if self._selection.gpus is not None:
            gpus = self._api.stored(gpu_selector(_matchers(self._selection.gpus)), start_seconds, end_seconds)
        samples: list[EngineSample | GpuSample] = []
        for target, at, readings in self._new_scrapes(engines):
            labels = dict(target)
            found = engine_samples(
                readings,
                self._reject,
                time_seconds=at,
                pool=self._pool,
                namespace=labels.get("namespace", ""),
                pod=_pod(labels),
            )
            if found:
                self._pods[labels.get("namespace", ""), labels.get("pod", "")] = at
            samples += found
        for _, at, readings in self._new_scrapes(gpus):
            samples += of_pods(gpu_samples(readings, self._reject, time_seconds=at, pool=self._pool), self._pods)
        for sample in sorted(samples, key=lambda sample: sample.time_seconds):
            if sample.time_seconds > self._sought.get(_whose(sample), -math.inf):
                self._offer(sample)
                self._fetched += 1

    def _new_scrapes(self, series: Iterable[Series]) -> Iterable[tuple[Target, float, list[Reading]]]:
        """Samples of one target with one time stamp are one scrape: Prometheus stamps them all alike."""
        scrapes: dict[tuple[float, Target], list[Reading]] = defaultdict(list)
        for labels, samples in series:
            target: Target = tuple((name, labels[name]) for name in _TARGET_LABELS if name in labels)
            known = self._newest.get(target)
            name = labels.get("__name__", "")
            for at, value in samples:
                if known is None or at > known:
                    scrapes[at, target].append(Reading(name, labels, value))
        for (at, target), readings in sorted(scrapes.items()):
            self._newest[target] = at
            yield target, at, readings

    def _learn_configs(self) -> None:
        """`cache_config_info` knows no model: it is the pool's if its pod is."""
        matchers = {name: value for name, value in self._selection.engines.items() if name != "model_name"}
        servers: dict[Target, list[dict[str, str]]] = defaultdict(list)
        for labels, _ in self._api.instant(f'{{__name__=~"vllm[:_]{CACHE_CONFIG[5:]}"{_matchers(matchers)}}}'):
            if (labels.get("namespace", ""), labels.get("pod", "")) in self._pods:
                servers[tuple((name, labels[name]) for name in _TARGET_LABELS if name in labels)].append(labels)
        for target, series in servers.items():
            for rank, config in from_cache_config(series).items():
                self.configs.learn(f"{_pod(dict(target))}, engine {rank or '0'}, {CACHE_CONFIG}", config)

    def _tell_of_skew(self) -> None:
        skewed = abs(self.clock_skew_seconds) > _SKEW_TOLD_SECONDS
        if skewed and not self._skew_told:
            log.warning(
                "source %s: the server's clock is %.0f s %s ours; times are the server's",
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


def _pod(labels: Mapping[str, str]) -> str:
    return next((labels[name] for name in _POD_LABELS if labels.get(name)), "")


def _matchers(values: Mapping[str, str]) -> str:
    """PromQL label matchers, each with a comma before it. JSON's escapes are PromQL's."""
    return "".join(f",{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items())
