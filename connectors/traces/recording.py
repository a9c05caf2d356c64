"""Recordings of a real vLLM server: `requests.jsonl` beside `meta.json`, and files of what the server said of itself.

Each function takes the recording's directory, or the file itself. A malformed line is left out, and the number of
those is logged. All raise TraceError where the file cannot be read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from connectors.traces.base import (
    JsonReader,
    Malformed,
    TraceError,
    decode,
    each_line,
    finite,
    hashes,
    json_object,
    label,
    request,
    required,
    setting_block_tokens,
    since_start,
)
from kavier_twin.telemetry import RequestRecord

log = logging.getLogger(__name__)


class RecordingReader(JsonReader):
    """Times are the client's clock, in seconds since the start of the recording."""

    name = "recording"
    expected = 'JSON lines {"id", "arrival", "prompt_tokens", "output_tokens", "token_times"} beside a meta.json'
    marks = frozenset({"id", "arrival", "prompt_tokens", "output_tokens", "token_times"})
    trace_file = "requests.jsonl"
    settings_file = "meta.json"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.hash_block_tokens = setting_block_tokens(self.settings, "block_tokens", path.parent / self.settings_file)
        self.hashes_cover_output = True

    def record(self, index: int, row: dict[str, Any]) -> RequestRecord:
        arrival = since_start(required(row, "arrival"), "arrival")
        times = _times(row)
        return request(
            id=_id(row),
            time_seconds=arrival,
            session=label(row.get("session"), "session"),
            prompt_tokens=required(row, "prompt_tokens"),
            output_tokens=required(row, "output_tokens"),
            block_hashes=hashes(row.get("hash_ids")),
            block_tokens=self.hash_block_tokens,
            hashes_cover_output=True,
            cached_tokens=row.get("cached_tokens"),
            ttft_seconds=times[0] - arrival if times else None,
            e2e_seconds=times[-1] - arrival if times else None,
        )


def read_steps(path: str | Path) -> list[dict[str, Any]]:
    """The engine's own log, one dict a step (steps.jsonl.gz)."""
    steps: list[dict[str, Any]] = []
    _each_object(path, "steps.jsonl", steps.append)
    return steps


def read_metrics(path: str | Path) -> list[tuple[float, str]]:
    """The scrapes of /metrics: unix time and text (metrics.jsonl.gz)."""
    scrapes: list[tuple[float, str]] = []

    def take(row: dict[str, Any]) -> None:
        time, text = finite(required(row, "t"), "t"), required(row, "text")
        if not isinstance(text, str):
            raise Malformed("bad-value", "text is not text")
        scrapes.append((time, text))

    _each_object(path, "metrics.jsonl", take)
    return scrapes


def read_kv_events(path: str | Path) -> list[dict[str, Any]]:
    """vLLM's KV-cache events as received: `recv` (unix time), `seq`, `batch` (kv_events.jsonl.gz)."""
    events: list[dict[str, Any]] = []
    _each_object(path, "kv_events.jsonl", events.append)
    return events


def _id(row: dict[str, Any]) -> str:
    id = label(required(row, "id"), "id")
    if id is None:
        raise Malformed("missing-field", "id")
    return id


def _times(row: dict[str, Any]) -> list[float]:
    times = required(row, "token_times")
    if not isinstance(times, list):
        raise Malformed("bad-value", "token_times is not a list")
    return [finite(time, "token_times") for time in times]


def _each_object(path: str | Path, name: str, take: Callable[[dict[str, Any]], None]) -> None:
    path = Path(path)
    if path.is_dir():
        path = path / name if (path / name).is_file() else path / f"{name}.gz"
    rejected: list[int] = []
    try:
        each_line(path, lambda _, line: take(json_object(decode(line))), lambda line, _: rejected.append(line))
    except OSError as error:
        raise TraceError(
            f"{path}: cannot be read ({error.strerror or error}); expected a recording's {name}, plain or .gz"
        ) from None
    if rejected:
        log.warning("%s: %d malformed lines left out, the first is line %d", path, len(rejected), rejected[0])
