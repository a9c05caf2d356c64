"""A source that a test fills by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from threading import Lock

from kavier_twin.telemetry import TelemetryRecord


class MemorySource:
    """A queue of records. Any thread may push while another polls."""

    trouble = ""

    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self.last_record_seconds: float | None = None
        self._records: deque[TelemetryRecord] = deque()
        self._lock = Lock()
        self._ended = False

    @property
    def exhausted(self) -> bool:
        with self._lock:
            return self._ended and not self._records

    def push(self, record: TelemetryRecord) -> None:
        """Add a record. Raises ValueError once the source has ended."""
        with self._lock:
            if self._ended:
                raise ValueError(f"source {self.name} has ended: it takes no more records")
            self._records.append(record)

    def end(self) -> None:
        """Say that no more records will be pushed."""
        with self._lock:
            self._ended = True

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        with self._lock:
            records = [self._records.popleft() for _ in range(min(max_records, len(self._records)))]
            times = [record.time_seconds for record in records]
            if self.last_record_seconds is not None:
                times.append(self.last_record_seconds)
            self.last_record_seconds = max(times, default=None)
            return records

    def rejected(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        with self._lock:
            self._ended = True
            self._records.clear()
