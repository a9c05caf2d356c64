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
from connectors.prometheus.engine_config import EngineConfigs, from_cache_config, from_models, from_server_info
from connectors.prometheus.engines import engine_samples
from connectors.prometheus.http import Access, FetchError, HttpClient
from connectors.prometheus.names import CACHE_CONFIG, canonical
from connectors.prometheus.readings import Reading, parse_exposition
from connectors.prometheus.source import LONGEST_BACKOFF_SECONDS

_MAX_AT_ONCE: Final = 16


@dataclass
class EngineTarget:
    """A vLLM server: the address of its `/metrics`, and the pod it runs in (default: host and port)."""

    url: str
    pod: str = ""
    _backoff: Backoff = field(default_factory=lambda: Backoff(1.0, LONGEST_BACKOFF_SECONDS))
    _due: float = 0.0
    _problem: str = ""
    _started: float | None = None  # of the process whose configuration was asked for

    def __post_init__(self) -> None:
        if not self.pod:
            self.pod = urllib3.util.parse_url(self.url).netloc or self.url


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
        configured: Mapping[str, object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(name)
        self.configs = EngineConfigs(configured or {})
        self._targets = tuple(targets)
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
        samples = engine_samples(readings, self._reject, time_seconds=at, pool=self._pool, namespace="", pod=target.pod)
        if not samples:
            raise FetchError("no-engine", f"{target.url} has no metric of vLLM; is it run with --disable-log-stats?")
        for sample in samples:
            self._offer(sample)
        self._learn_configs(target, readings, samples[0].started_seconds or 0.0)

    def _learn_configs(self, target: EngineTarget, readings: Sequence[Reading], started: float) -> None:
        info = [reading.labels for reading in readings if canonical(reading.name) == CACHE_CONFIG]
        for rank, config in from_cache_config(info).items():
            self.configs.learn(f"{target.pod}, engine {rank or '0'}, {CACHE_CONFIG}", config)
        if target._started == started:
            return
        target._started = started
        base = target.url.removesuffix("/metrics")
        for path, read in (("/v1/models", from_models), ("/server_info?config_format=json", from_server_info)):
            self.configs.learn(f"{target.pod}, {path.partition('?')[0]}", read(self._ask(base + path)))

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
