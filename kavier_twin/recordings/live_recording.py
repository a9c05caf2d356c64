"""A live recording: what reached a twin beside real engines, each record with the time at which it arrived.

A folder holds any of these files, plain or `.gz`, one JSON object a line:

- `kafka_requests.jsonl`: `kafka_ms` (when the broker took the record, unix milliseconds) and `value` (the record),
- `metrics.jsonl`: `t` (when the page was read, unix seconds), `text` (the page), and `pod` unless meta.json names it,
- `kv_events.jsonl`: `recv` (unix seconds), `batch` (vLLM's event batch), and `topic`, `pod` and `seq`,
- `client.jsonl`: what the clients saw: `t` (when a request was sent), `ttft` and `e2e` in seconds,
- `meta.json`: `engine` (its settings), `pod`, and optionally `slos`, `from_unix` and `to_unix`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from connectors.kv_events.wire import WireError, batch_of
from connectors.prometheus.engine_config import EngineConfigs, from_cache_config
from connectors.prometheus.engines import engine_samples
from connectors.prometheus.names import CACHE_CONFIG, canonical
from connectors.prometheus.readings import parse_exposition
from connectors.traces.base import Malformed, decode, each_line, finite, json_object, required
from connectors.traces.telemetry import parse_record
from kavier_twin.errors import UserError
from kavier_twin.simulation.settings import EngineSettings
from kavier_twin.telemetry import KvEventBatch, TelemetryRecord

REQUESTS: Final = "requests"
METRICS: Final = "metrics"
KV_EVENTS: Final = "kv_events"
_FILES: Final = {REQUESTS: "kafka_requests.jsonl", METRICS: "metrics.jsonl", KV_EVENTS: "kv_events.jsonl"}
KINDS: Final = tuple(_FILES)
"""The kinds of source that a live recording can hold."""


@dataclass(frozen=True)
class ClientRequest:
    """One request as a client saw it. Unix seconds and seconds; None: it never came, or was not measured."""

    sent_seconds: float
    ttft_seconds: float | None
    e2e_seconds: float | None


@dataclass
class LiveRecording:
    """`arrivals` by kind of source: (unix seconds of arrival, record), in order of arrival."""

    folder: Path
    engine: EngineSettings
    arrivals: dict[str, list[tuple[float, TelemetryRecord]]]
    configs: EngineConfigs
    clients: Sequence[ClientRequest] = ()
    slos: Mapping[str, float] = field(default_factory=dict)
    rejected: dict[str, Counter[str]] = field(default_factory=dict)  # by kind of source and reason

    @property
    def start_seconds(self) -> float:
        """When the first record arrived (unix)."""
        return min(found[0][0] for found in self.arrivals.values() if found)

    @property
    def end_seconds(self) -> float:
        """When the last record arrived (unix)."""
        return max(found[-1][0] for found in self.arrivals.values() if found)


def read_live_recording(folder: Path, pool: str, without: Sequence[str] = ()) -> LiveRecording:
    """Read a folder, all kinds of source but those in `without`. Raises UserError."""
    meta = _meta(folder)
    pod = str(meta.get("pod", ""))
    configs = EngineConfigs({})
    rejected = {kind: Counter[str]() for kind in KINDS}

    def request(row: dict[str, Any]) -> list[tuple[float, TelemetryRecord]]:
        record = parse_record(json.dumps(required(row, "value")).encode())
        return [(finite(required(row, "kafka_ms"), "kafka_ms") / 1e3, record.model_copy(update={"pool": pool}))]

    def scrape(row: dict[str, Any]) -> list[tuple[float, TelemetryRecord]]:
        at, text = finite(required(row, "t"), "t"), required(row, "text")
        if not isinstance(text, str):
            raise Malformed("bad-value", "text is not text")
        try:
            readings = parse_exposition(text)
        except (ValueError, LookupError, TypeError, AttributeError):  # whatever the parser stumbles over
            raise Malformed("bad-answer", "not in Prometheus' text format") from None
        name = str(row.get("pod", pod))
        info = [reading.labels for reading in readings if canonical(reading.name) == CACHE_CONFIG]
        for rank, config in from_cache_config(info).items():
            configs.learn(f"{name}, engine {rank or '0'}, {CACHE_CONFIG}", config)

        def reject(reason: str) -> None:
            rejected[METRICS][reason] += 1

        samples = engine_samples(readings, reject, time_seconds=at, pool=pool, namespace="", pod=name)
        return [(at, sample) for sample in samples]

    sequences: dict[tuple[str, int], int] = {}

    def kv_batch(row: dict[str, Any]) -> list[tuple[float, TelemetryRecord]]:
        try:
            batch = batch_of(required(row, "batch"))
        except WireError as error:
            raise Malformed("bad-event", str(error)) from None
        publisher, sequence = (str(row.get("pod", pod)), batch.rank), int(row.get("seq", 0))
        record = KvEventBatch(
            time_seconds=batch.time_seconds,
            pool=pool,
            pod=publisher[0],
            engine=str(batch.rank),
            sequence=sequence,
            continues=sequences.get(publisher) == sequence - 1,
            events=batch.events,
        )
        sequences[publisher] = sequence
        return [(finite(required(row, "recv"), "recv"), record)]

    read: dict[str, Callable[[dict[str, Any]], list[tuple[float, TelemetryRecord]]]] = {
        REQUESTS: request,
        METRICS: scrape,
        KV_EVENTS: kv_batch,
    }
    arrivals = {}
    for kind, parse in read.items():
        path = _file(folder, _FILES[kind])
        if kind in without or path is None:
            continue
        found: list[tuple[float, TelemetryRecord]] = []
        _each_row(path, lambda row, parse=parse, found=found: found.extend(parse(row)), rejected[kind])  # type: ignore[misc]
        if found:
            arrivals[kind] = sorted(found, key=lambda arrival: arrival[0])
    if not arrivals:
        names = ", ".join(_FILES[kind] for kind in KINDS if kind not in without)
        raise UserError(f"{folder}: no record to play; expected at least one of {names} (plain or .gz)")
    return LiveRecording(folder, _engine(folder, meta), arrivals, configs, _clients(folder), _slos(meta), rejected)


def _meta(folder: Path) -> Mapping[str, Any]:
    path = folder / "meta.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the folder of a live recording") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); correct it there") from None
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: expected an object with engine and pod")
    return found


def _engine(folder: Path, meta: Mapping[str, Any]) -> EngineSettings:
    given = meta.get("engine", {})
    if not isinstance(given, Mapping):
        raise UserError(f"{folder / 'meta.json'}: engine: expected the engine's settings")
    try:
        return EngineSettings(**{name: given[name] for name in EngineSettings.model_fields if name in given})
    except ValueError as error:
        raise UserError(f"{folder / 'meta.json'}: engine: {error}") from None


def _slos(meta: Mapping[str, Any]) -> dict[str, float]:
    given = meta.get("slos", {})
    return {str(name): float(value) for name, value in given.items()} if isinstance(given, Mapping) else {}


def _clients(folder: Path) -> list[ClientRequest]:
    path = _file(folder, "client.jsonl")
    found: list[ClientRequest] = []

    def take(row: dict[str, Any]) -> None:
        ended = "end" not in row and row.get("status", 200) == 200
        e2e = row.get("e2e") if ended else None
        found.append(ClientRequest(finite(required(row, "t"), "t"), row.get("ttft"), e2e))

    if path is not None:
        _each_row(path, take, Counter())
    return found


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _each_row(path: Path, take: Callable[[dict[str, Any]], None], rejected: Counter[str]) -> None:
    def reject(_: int, what: Malformed) -> None:
        rejected[what.reason] += 1

    try:
        each_line(path, lambda _, line: take(json_object(decode(line))), reject)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
