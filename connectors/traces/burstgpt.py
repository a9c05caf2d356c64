"""BurstGPT's CSV traces.

Columns: `Timestamp` (s), `Model`, `Request tokens`, `Response tokens`, `Total tokens`, `Log Type`; since release 2
also `Session ID` (conversations only) and `Elapsed time` (s, from submission to the complete answer).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from connectors.traces.base import CsvReader, label, parse_decimal, parse_whole, request, since_start
from kavier_twin.telemetry import RequestRecord


class BurstGptReader(CsvReader):
    """Times count from the first request.

    A response of 0 tokens is how the trace marks a failure: such a request stays, with `finish_reason` "error". One
    with 0 request tokens, too, cannot be a request and is rejected.
    """

    name = "burstgpt"
    expected = "CSV with the columns Timestamp, Model, Request tokens, Response tokens"
    numbered = True
    needed = frozenset({"timestamp", "model", "request tokens", "response tokens"})
    relative_times = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._first: float | None = None

    def record(self, index: int, row: dict[str, str]) -> RequestRecord:
        time = since_start(parse_decimal(row["timestamp"], "timestamp"), "timestamp")
        first = time if self._first is None else self._first
        elapsed = row.get("elapsed time", "").strip()
        output_tokens = parse_whole(row["response tokens"], "response tokens")
        record = request(
            id=str(index),
            time_seconds=time - first,
            model=label(row["model"].strip(), "model"),
            session=label(row.get("session id", "").strip(), "session id"),
            prompt_tokens=parse_whole(row["request tokens"], "request tokens"),
            output_tokens=output_tokens,
            e2e_seconds=parse_decimal(elapsed, "elapsed time") if elapsed else None,
            finish_reason=None if output_tokens else "error",
        )
        self._first = first  # only once the line has proved good
        return record

    def save(self) -> dict[str, Any]:
        return {**super().save(), "first": self._first}

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self._first = saved["first"]
