"""The engines' own `/metrics`, where no Prometheus server is at hand or its interval is too coarse."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import urllib3

from connectors.background import BackgroundSource, Backoff
from connectors.prometheus.engine_config import (
    EngineConfig,
    EngineConfigs,
    from_cache_config,
    from_models,
    from_server_info,
)
from connectors.prometheus.engines import engine_samples
from connectors.prometheus.http import Access, FetchError, HttpClient
from connectors.prometheus.lookaround import names_seen, prefix_hint
from connectors.prometheus.names import CACHE_CONFIG, STARTED, canonical, model_of
from connectors.prometheus.readings import Reading, parse_exposition
from connectors.prometheus.servers import Servers, by_server
from connectors.prometheus.source import LONGEST_BACKOFF_SECONDS
from kavier_twin.telemetry import EngineSample

_MAX_AT_ONCE: Final = 16
_LONGEST_VERSION: Final = 64


@dataclass
class EngineTarget:
    """A vLLM server: the address of its `/metrics`, and the pod it runs in (default: host and port).

    `model` chooses one of the models that the page tells of. `spot` tells servers of one pod apart.
    """

    url: str
    pod: str = ""
    model: str = ""
    spot: str = ""
    _backoff: Backoff = field(default_factory=lambda: Backoff(1.0, LONGEST_BACKOFF_SECONDS))
    _due: float = 0.0
    _problem: str = ""
    _started: float | None = None  # of the process whose configuration was asked for

    def __post_init__(self) -> None:
        parts = urllib3.util.parse_url(self.url)
        if parts.path in (None, "", "/"):
            self.url = parts._replace(path="/metrics").url
        if not self.pod:
            self.pod = parts.netloc or self.url
        self._servers = Servers()
        self._version: str | None = None

    @property
    def base(self) -> str:
        """Where the server's other pages are: NIM has `/v1/metrics`."""
        path = (urllib3.util.parse_url(self.url).path or "").rstrip("/")
        path = path.removesuffix("/metrics").removesuffix("/v1")
        return urllib3.util.parse_url(self.url)._replace(path=path, query=None).url


def told_apart(targets: Sequence[EngineTarget]) -> tuple[EngineTarget, ...]:
    """The same, those in one pod with what tells them apart: the port, or host and port."""
    first: dict[str, EngineTarget] = {}
    for target in targets:
        other = first.setdefault(target.pod, target)
        if other is not target and not target.spot:
            mine, its = (urllib3.util.parse_url(one.url) for one in (target, other))
            target.spot = str(mine.port) if mine.port != its.port else mine.netloc or target.url
    return tuple(targets)


class VllmMetricsSource(BackgroundSource):
    """Scrapes vLLM servers every `interval_seconds`, several at once.

    One that does not answer holds the others up by no more than `access.timeout_seconds`, and is then asked less often.

    Samples bear our clock's time of the answer. A server's configuration is asked for when it is first reached, and
    again when its process is another one; a server that does not tell is not asked twice.
    """

    def __init__(
        self,
        targets: Sequence[EngineTarget],
        access: Access,
        *,
        name: str = "vllm",
        pool: str = "default",
        interval_seconds: float = 5.0,
        metric_prefix: str = "",
        configured: Mapping[str, object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(name)
        self.configs = EngineConfigs(configured or {})
        self._targets = told_apart(targets)
        self._prefix = metric_prefix
        self._http = HttpClient(access, servers=len(self._targets))
        self._pool = pool
        self._interval = interval_seconds
        self._clock = clock

    def close(self) -> None:
        super().close()
        self._http.close()

    def _fetch(self) -> None:
        with ThreadPoolExecutor(min(len(self._targets), _MAX_AT_ONCE), f"{self.name}-scrape") as threads:
            while not self._closing:
                began = time.monotonic()
                list(threads.map(self._visit, [target for target in self._targets if target._due <= began]))
                self._set_trouble(self._problems())
                self._pause(max(0.0, self._interval - (time.monotonic() - began)))

    def _visit(self, target: EngineTarget) -> None:
        if self._closing:
            return
        try:
            self._scrape(target)
            target._backoff.reset()
            target._problem = ""
        except FetchError as error:
            self._reject(error.reason)
            target._problem = str(error)
            target._due = time.monotonic() + target._backoff.next()

    def _scrape(self, target: EngineTarget) -> None:
        page = self._http.get(target.url)
        at = self._clock()
        try:
            readings = parse_exposition(page.decode())
        except (ValueError, LookupError, TypeError, AttributeError):  # whatever the parser stumbles over
            raise FetchError("bad-answer", f"{target.url} is not in Prometheus' text format") from None
        started = next((reading.value for reading in readings if reading.name == STARTED[0]), 0.0)
        samples = self._samples(target, readings, at)
        if not samples:
            raise FetchError("no-engine", f"{target.url} {self._what_is_wrong(target, readings)}")
        if target._started != started:
            self._ask_for_config(target)
            target._started = started
        for sample in samples:
            self._offer(sample.model_copy(update={"vllm_version": target._version}))
        self._learn_configs(target, readings)

    def _samples(self, target: EngineTarget, readings: Sequence[Reading], at: float) -> list[EngineSample]:
        """A sample of each engine; the page may be one on which a collector shows several servers."""
        servers = target._servers
        found: list[EngineSample] = []
        for server, its in sorted(by_server(readings, servers, self._prefix).items(), key=lambda item: item[0]):
            named = servers.named(server, at, pod=target.pod)
            if target.model:
                its = [reading for reading in its if model_of(reading.labels) in ("", target.model)]
            found += engine_samples(
                its,
                self._reject,
                time_seconds=at,
                pool=self._pool,
                namespace="",
                pod=target.pod,
                spot="@".join(filter(None, (target.spot, named.spot))),
                prefix=self._prefix,
            )
        return [sample for sample in found if not target.model or sample.model == target.model]

    def _what_is_wrong(self, target: EngineTarget, readings: Sequence[Reading]) -> str:
        """With a page that has no engine."""
        names = {reading.name for reading in readings}
        models = sorted({model for reading in readings if (model := model_of(reading.labels))})
        if target.model and models:
            return f"has no engine with the model {target.model}; correct model: there are {', '.join(models)}"
        hint = prefix_hint(names) or "is vLLM run with --disable-log-stats?"
        return f"has no metric of vLLM{f' but {seen}' if (seen := names_seen(names)) else ''}; {hint}"

    def _learn_configs(self, target: EngineTarget, readings: Sequence[Reading]) -> None:
        info = [reading.labels for reading in readings if canonical(reading.name, self._prefix) == CACHE_CONFIG]
        for rank, config in from_cache_config(info).items():
            self.configs.learn(f"{_place(target)}, engine {rank or '0'}, {CACHE_CONFIG}", config)

    def _ask_for_config(self, target: EngineTarget) -> None:
        version = self._ask(target.base + "/version")
        told = version.get("version") if isinstance(version, dict) else None
        target._version = str(told)[:_LONGEST_VERSION] if told else None
        self.configs.learn(f"{_place(target)}, /version", EngineConfig(vllm_version=target._version))
        for path, read in (("/v1/models", from_models), ("/server_info?config_format=json", from_server_info)):
            self.configs.learn(f"{_place(target)}, {path.partition('?')[0]}", read(self._ask(target.base + path)))

    def _ask(self, url: str) -> Any:
        """The JSON answer; None where the server does not give one, as most do not give /server_info."""
        try:
            return json.loads(self._http.get(url))
        except (FetchError, ValueError):
            return None

    def _problems(self) -> str:
        failing = [f"{target.pod}: {target._problem}" for target in self._targets if target._problem]
        if not failing:
            return ""
        return f"{len(failing)} of {len(self._targets)} servers not scraped: " + "; ".join(failing[:3])


def _place(target: EngineTarget) -> str:
    return f"{target.pod}:{target.spot}" if target.spot else target.pod
