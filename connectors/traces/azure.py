"""Azure's LLM inference traces of 2023 and 2024: `TIMESTAMP,ContextTokens,GeneratedTokens`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from connectors.traces.base import CsvReader, Malformed, parse_whole, request
from kavier_twin.telemetry import RequestRecord


class AzureReader(CsvReader):
    """Times are the calendar's (2023 without a zone, 2024 with one; to the microsecond); they count from the first."""

    name = "azure"
    expected = "CSV with the header TIMESTAMP,ContextTokens,GeneratedTokens"
    numbered = True
    needed = frozenset({"timestamp", "contexttokens", "generatedtokens"})
    relative_times = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._first: datetime | None = None

    def record(self, index: int, row: dict[str, str]) -> RequestRecord:
        try:
            time = datetime.fromisoformat(row["timestamp"].strip())
        except ValueError:
            raise Malformed("bad-value", "timestamp is not a date and time") from None
        if time.tzinfo is None:
            time = time.replace(tzinfo=UTC)
        first = self._first or time
        record = request(
            id=str(index),
            time_seconds=(time - first).total_seconds(),
            prompt_tokens=parse_whole(row["contexttokens"], "contexttokens"),
            output_tokens=parse_whole(row["generatedtokens"], "generatedtokens"),
        )
        self._first = first  # only once the line has proved good
        return record

    def save(self) -> dict[str, Any]:
        return {**super().save(), "first": self._first and self._first.isoformat()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self._first = saved["first"] and datetime.fromisoformat(saved["first"])
