"""Sources that have to wait for their records do so in a thread of their own."""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Mapping
from threading import Condition, Thread
from typing import Final

from kavier_twin.telemetry import TelemetryRecord

log = logging.getLogger(__name__)

MAX_BUFFERED_RECORDS: Final = 10_000
_CLOSE_SECONDS: Final = 2.0


class BackgroundSource(ABC):
    """A `Source` whose thread fetches while another thread polls. The thread starts with the first poll.

    At most `max_buffered` records wait to be polled; then the thread waits, so a twin that is busy slows down the
    fetching and not the other way round. `trouble` says in words what keeps the source from fetching now; it is empty
    while all is well. A new trouble, and the end of one, are logged once.
    """

    exhausted = False

    def __init__(self, name: str, *, max_buffered: int = MAX_BUFFERED_RECORDS) -> None:
        self.name = name
        self.last_record_seconds: float | None = None
        self.trouble = ""
        self._max_buffered = max_buffered
        self._buffer: deque[TelemetryRecord] = deque()
        self._changed = Condition()
        self._closing = False
        self._rejected: Counter[str] = Counter()
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        """At most `max_records` of the records fetched. Never waits."""
        with self._changed:
            if self._thread.ident is None and not self._closing:
                self._thread.start()
            records = [self._buffer.popleft() for _ in range(min(max_records, len(self._buffer)))]
            if records:
                self._changed.notify_all()
                newest = max(record.time_seconds for record in records)
                self.last_record_seconds = max(newest, self.last_record_seconds or newest)
        return records

    def rejected(self) -> Mapping[str, int]:
        with self._changed:
            return dict(self._rejected)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._buffer.clear()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_SECONDS)

    # --- for the thread -------------------------------------------------------------------------------------------

    @abstractmethod
    def _fetch(self) -> None:
        """Fetch until `_closing`, handing each record to `_offer`."""

    def _run(self) -> None:
        try:
            self._fetch()
        except Exception:
            self._set_trouble("the source failed; see the log")
            log.exception("source %s failed and stopped reading", self.name)

    def _offer(self, record: TelemetryRecord) -> None:
        """Add a record, once there is room. Dropped when the source is being closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or len(self._buffer) < self._max_buffered)
            if not self._closing:
                self._buffer.append(record)

    def _reject(self, reason: str, count: int = 1) -> None:
        with self._changed:
            self._rejected[reason] += count

    def _pause(self, seconds: float) -> None:
        """Wait, or less where the source is being closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=seconds)

    def _set_trouble(self, trouble: str) -> None:
        if trouble and trouble != self.trouble:
            log.warning("source %s: %s", self.name, trouble)
        elif self.trouble and not trouble:
            log.info("source %s: recovered", self.name)
        self.trouble = trouble


class Backoff:
    """Waiting times that double from one failure to the next, up to a limit, each cut at random by up to half.

    Without chance, clients that failed together would come back together.
    """

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._first, self._longest = first_seconds, longest_seconds
        self._failures = 0

    def next(self) -> float:
        """How long to wait after one more failure."""
        seconds = min(self._first * 2.0 ** min(self._failures, 60), self._longest)
        self._failures += 1
        return seconds * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """After a success."""
        self._failures = 0
