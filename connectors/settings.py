"""Settings of the sources that read a live fleet's metrics and cache events, and the sources themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from urllib3.util import parse_url

from connectors.prometheus.http import Access
from connectors.prometheus.scrape import EngineTarget, VllmMetricsSource
from connectors.prometheus.source import PrometheusSource, Selection
from connectors.secret import Name, SecretPlace, Settings
from connectors.source import Source
from connectors.traces import FORMATS
from kavier_twin.errors import SECRET_GIVEN, nearest

_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key"})

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def _checked_url(url: str) -> str:
    parts = parse_url(url)
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError("expected a URL like http://host:9090")
    if parts.auth:
        raise PydanticCustomError(
            SECRET_GIVEN, "remove user and password from the URL; use the settings user and password"
        )
    return url


Url = Annotated[str, AfterValidator(_checked_url)]


class LiveSource(Settings):
    """What all of them have. Relative paths count from the settings file."""

    name: Name | None = Field(default=None, examples=["main"])
    """Name of the source in metrics and logs. The default is derived from its address."""

    pool: Name | None = Field(default=None, examples=["chat"])
    """Pool of the source. Required if there are several pools."""

    def open(self, pool: str, engine: Mapping[str, object]) -> Source:
        """The source of a pool's records. `engine` is the twin's idea of an engine's settings."""
        raise NotImplementedError


class TraceFile(Settings):
    """A trace file; followed as it grows unless told otherwise. A relative path counts from the settings file."""

    type: Literal["trace_file"]
    """Kind of source."""

    path: Path = Field(examples=["requests.jsonl"])
    """The file."""

    format: str | None = Field(default=None, examples=["telemetry"])
    """Format of the file. By default it is detected."""

    follow: bool = True
    """Whether the file is followed as it grows."""

    name: Name | None = Field(default=None, examples=["gateway"])
    """Name of the source in metrics and logs. The default is its path."""

    pool: Name | None = Field(default=None, examples=["chat"])
    """Pool of records that name no pool."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        if value is not None and value not in FORMATS:
            raise ValueError(f"there is no format {value!r}{nearest(value, FORMATS)}; known: {', '.join(FORMATS)}")
        return value

    def problems(self) -> list[str]:
        if not self.follow and not self.path.exists():
            return [f"path: {self.path} does not exist; correct it, or set follow: true"]
        if not self.path.parent.is_dir():
            return [f"path: the directory {self.path.parent} does not exist; create it"]
        return []


class HttpSource(LiveSource):
    """How to reach and to convince a server. `ca_file` replaces the system's certificate authorities."""

    bearer_token: SecretPlace | None = Field(default=None, examples=[{"file": "/run/secrets/prometheus/token"}])
    """Bearer token for the server."""

    user: Name | None = Field(default=None, examples=["twin"])
    """User for HTTP basic authentication."""

    password: SecretPlace | None = Field(default=None, examples=[{"env": "PROMETHEUS_PASSWORD"}])
    """Password for HTTP basic authentication."""

    headers: dict[Name, str | SecretPlace] = Field(
        default={}, examples=[{"X-Scope-OrgID": "team-a", "X-Api-Key": {"env": "PROMETHEUS_KEY"}}]
    )
    """Headers of each request, such as the tenant of Mimir and Cortex. Give secrets as {env: NAME} or {file: PATH}."""

    ca_file: Path | None = Field(default=None, examples=["/etc/ssl/fleet-ca.pem"])
    """CA certificates (PEM) that replace the system's."""

    certificate_file: Path | None = Field(default=None, examples=["/run/secrets/twin/tls.crt"])
    """Client certificate (PEM)."""

    key_file: Path | None = Field(default=None, examples=["/run/secrets/twin/tls.key"])
    """Key of the client certificate (PEM)."""

    verify_tls: bool = True
    """Whether the server's certificate is checked."""

    timeout_seconds: Seconds = 10.0
    """Timeout of a request."""

    @field_validator("headers", mode="before")
    @classmethod
    def _number_of_a_tenant(cls, headers: Any) -> Any:
        """YAML reads a tenant such as 1 as a number."""
        if not isinstance(headers, Mapping):
            return headers
        return {name: str(value) if type(value) is int else value for name, value in headers.items()}

    @field_validator("headers")
    @classmethod
    def _header_names(cls, headers: dict[str, str | SecretPlace]) -> dict[str, str | SecretPlace]:
        for name, value in headers.items():
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
                raise ValueError(f"{name!r} is not a header name; expected name: value, as in X-Scope-OrgID: team-a")
            if isinstance(value, str) and name.lower() in _SECRET_HEADERS:
                raise PydanticCustomError(
                    SECRET_GIVEN,
                    "{name} is a secret: give {{env: NAME}} or {{file: PATH}}, or use bearer_token",
                    {"name": name},
                )
            if isinstance(value, str) and (not value.isprintable() or not value.isascii()):
                raise ValueError(f"the value of {name} is not valid in a header; correct it")
        return headers

    @model_validator(mode="after")
    def _one_way_in(self) -> Self:
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password belong together; give both or none")
        if self.user is not None and self.bearer_token is not None:
            raise ValueError("give either bearer_token or user and password")
        if (self.user or self.bearer_token) and any(name.lower() == "authorization" for name in self.headers):
            raise ValueError(
                "headers: Authorization follows from bearer_token, or from user and password; set one of them"
            )
        return self

    def access(self) -> Access:
        """As the connectors take it."""
        return Access(
            bearer_token=self.bearer_token,
            user=self.user,
            password=self.password,
            ca_file=self.ca_file,
            certificate_file=self.certificate_file,
            key_file=self.key_file,
            headers=self.headers,
            verify_tls=self.verify_tls,
            timeout_seconds=self.timeout_seconds,
        )


class MetricsSource(HttpSource):
    """Metrics, which are always there to be read."""

    interval_seconds: Seconds
    """Interval between queries."""

    metric_prefix: str = Field(default="", examples=["nim_"])
    """Prefix of metric names instead of `vllm:`, if a collector renamed them to something without `vllm`."""


class Prometheus(MetricsSource):
    """A Prometheus server. `engines` are label values of the pool's vLLM series, `gpus` of the GPU exporter's.

    `gpus: null` leaves GPUs out. `warm_up_seconds` of the past are read at start.
    """

    type: Literal["prometheus"]
    """Kind of source."""

    url: Url = Field(examples=["http://prometheus:9090"])
    """URL of a server with the Prometheus API, with the query parameters that it needs, as in `?namespace=chat`."""

    engines: dict[str, str] = Field(default={}, examples=[{"namespace": "chat"}])
    """Label values that select the pool's vLLM series."""

    gpus: dict[str, str] | None = Field(default={}, examples=[{"namespace": "chat"}])
    """Label values that select the pool's series of NVIDIA's or AMD's GPU exporter. Null disables GPU metrics."""

    interval_seconds: Seconds = 15.0
    """Interval between queries."""

    warm_up_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Length of the past that is read at the first start."""

    max_backfill_seconds: Seconds = 3_600.0
    """Maximum length of the past that is read after an interruption."""

    @field_validator("engines", "gpus")
    @classmethod
    def _label_names(cls, labels: dict[str, str] | None) -> dict[str, str] | None:
        for label in labels or ():
            if not (label.isascii() and label.isidentifier()):
                raise ValueError(f"{label!r} is not a label name; expected label: value, as in namespace: chat")
        return labels

    @model_validator(mode="after")
    def _reaches_back(self) -> Self:
        if self.warm_up_seconds > self.max_backfill_seconds:
            raise ValueError("warm_up_seconds is more than max_backfill_seconds; raise the latter")
        return self

    def open(self, pool: str, engine: Mapping[str, object]) -> Source:
        return PrometheusSource(
            self.url,
            self.access(),
            name=self.name or f"prometheus:{parse_url(self.url).netloc}",
            pool=pool,
            selection=Selection(self.engines, self.gpus, self.metric_prefix),
            interval_seconds=self.interval_seconds,
            warm_up_seconds=self.warm_up_seconds,
            max_backfill_seconds=self.max_backfill_seconds,
            configured=engine,
        )


class EngineAddress(Settings):
    """A vLLM server's `/metrics`, and the pod it runs in."""

    url: Url = Field(examples=["http://vllm-0:8000/metrics"])
    """URL of the engine's metrics."""

    pod: str = Field(default="", examples=["vllm-0"])
    """Pod of the engine, as in request records."""

    model: str = Field(default="", examples=["meta-llama/Llama-3.1-8B"])
    """Served model to read, if the page has several. The default is all."""


class VllmMetrics(MetricsSource):
    """The engines' own `/metrics`."""

    type: Literal["vllm_metrics"]
    """Kind of source."""

    engines: Annotated[tuple[EngineAddress, ...], Field(min_length=1)] = Field(
        examples=[[{"url": "http://vllm-0:8000/metrics", "pod": "vllm-0"}]]
    )
    """Engines to scrape."""

    interval_seconds: Seconds = 5.0
    """Interval between scrapes."""

    def open(self, pool: str, engine: Mapping[str, object]) -> Source:
        return VllmMetricsSource(
            [EngineTarget(address.url, address.pod, address.model) for address in self.engines],
            self.access(),
            name=self.name or "vllm_metrics",
            pool=pool,
            interval_seconds=self.interval_seconds,
            metric_prefix=self.metric_prefix,
            configured=engine,
        )


class KvEvents(LiveSource):
    """The KV-cache events of one engine; with `bind`, of all engines that connect to `endpoint`."""

    type: Literal["kv_events"]
    """Kind of source."""

    endpoint: str = Field(examples=["tcp://vllm-0:5557"])
    """ZeroMQ address of the event publisher."""

    replay_endpoint: str | None = Field(default=None, examples=["tcp://vllm-0:5558"])
    """ZeroMQ address for replaying missed events."""

    topic: str = Field(default="", examples=["kv@"])
    """Prefix of the topics to read. Empty reads all."""

    pod: str = Field(default="", examples=["vllm-0"])
    """The pod of the engine; unless given, what its topic (`kv@<pod>@<model>`) says, which comes first with `bind`."""

    bind: bool = False
    """Whether to listen at `endpoint` for engines that connect, instead of connecting to one."""

    @field_validator("endpoint", "replay_endpoint")
    @classmethod
    def _zmq_address(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not endpoint.startswith(("tcp://", "ipc://")):
            raise ValueError("expected an address like tcp://vllm-0:5557 or ipc:///path")
        return endpoint

    @model_validator(mode="after")
    def _whom_to_ask(self) -> Self:
        if self.bind and self.replay_endpoint is not None:
            raise ValueError("replay_endpoint is one engine's: leave it out with bind")
        if not self.bind and "*" in self.endpoint:
            raise ValueError("endpoint: name the engine's host in place of *, or set bind: true")
        return self

    def problems(self) -> list[str]:
        missing = [library for library in ("msgpack", "zmq") if find_spec(library) is None]
        if missing:
            return [f"type: kv_events needs {' and '.join(missing)}; pip install 'kavier-twin[kv-events]'"]
        return super().problems()

    def open(self, pool: str, engine: Mapping[str, object]) -> Source:
        from connectors.kv_events.source import KvEventsSource  # an extra

        return KvEventsSource(
            self.endpoint,
            replay_endpoint=self.replay_endpoint,
            topic=self.topic,
            pod=self.pod,
            bind=self.bind,
            name=self.name or f"kv_events:{self.endpoint.partition('://')[2]}",
            pool=pool,
        )
