"""Prometheus' HTTP API, as far as the twin asks (prometheus.io/docs/prometheus/latest/querying/api)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from connectors.prometheus.http import FetchError, HttpClient

log = logging.getLogger(__name__)
T = TypeVar("T")


class Series(NamedTuple):
    """A series and its samples, (unix time, value), oldest first."""

    labels: dict[str, str]
    samples: list[tuple[float, float]]


class PrometheusApi:
    """Queries of one server, which may be anything that speaks this API. All raise FetchError."""

    def __init__(self, url: str, http: HttpClient, timeout_seconds: float) -> None:
        base, _, query = url.partition("?")
        self._url, self._query = base.rstrip("/").removesuffix("/api/v1"), f"?{query}" if query else ""
        self._http = http
        self._timeout = f"{timeout_seconds:g}s"

    def now(self) -> float:
        """The server's own clock, by which it stamps its scrapes.

        VictoriaMetrics answers with a vector of one sample. Its time stamp is the clock; its value lags behind
        (`-search.latencyOffset`).
        """
        data = self._ask("query", query="time()")
        if isinstance(data, dict) and data.get("resultType") == "vector":
            return self._shaped(data, "vector", lambda rows: float(rows[0]["value"][0]))
        return self._shaped(data, "scalar", lambda result: float(result[0]))

    def instant(self, expression: str, time_seconds: float | None = None) -> list[Series]:
        """An instant query whose result is a vector: of each series the newest sample, at most 5 minutes old."""
        at = {} if time_seconds is None else {"time": f"{time_seconds:.3f}"}
        data = self._ask("query", query=expression, **at)
        return self._shaped(data, "vector", lambda rows: [_series(row, [row["value"]]) for row in rows])

    def stored(self, selector: str, start_seconds: float, end_seconds: float) -> list[Series]:
        """What is stored of the selected series from one time to another: the samples as they were scraped, and when.

        That is a range selector evaluated at the end of the range. `query_range` would put values on a grid instead,
        each up to 5 minutes older than it looks, and go on showing the last values of an engine that is gone.
        """
        milliseconds = max(1, round(1e3 * (end_seconds - start_seconds)))
        data = self._ask("query", query=f"{selector}[{milliseconds}ms]", time=f"{end_seconds:.3f}")
        return self._shaped(data, "matrix", lambda rows: [_series(row, row["values"]) for row in rows])

    def _ask(self, path: str, **fields: str) -> Any:
        """The `data` of a successful answer."""
        body = self._http.post(f"{self._url}/api/v1/{path}{self._query}", {**fields, "timeout": self._timeout})
        try:
            answer = json.loads(body)
            if answer["status"] != "success":
                raise FetchError("query-refused", str(answer.get("error", ""))[:300])
            for warning in answer.get("warnings", ()):
                log.debug("%s: %s", self._url, warning)
            return answer["data"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FetchError("bad-answer", f"{self._url} is no Prometheus API: {body[:100]!r}") from None

    def _shaped(self, data: Any, kind: str, read: Callable[[Any], T]) -> T:
        try:
            if data["resultType"] != kind:
                raise FetchError("bad-answer", f"a {data['resultType']} where a {kind} was asked for")
            return read(data["result"])
        except (ValueError, KeyError, TypeError, IndexError):
            raise FetchError("bad-answer", f"{self._url}: not the shape of a {kind}") from None


def matchers(labels: Mapping[str, str]) -> str:
    """PromQL label matchers, each with a comma before it. JSON's escapes are PromQL's."""
    return "".join(f",{name}={json.dumps(value, ensure_ascii=False)}" for name, value in labels.items())


def _series(row: Any, samples: Any) -> Series:
    labels = {str(name): str(value) for name, value in row["metric"].items()}
    return Series(labels, [(float(time), float(value)) for time, value in samples])
