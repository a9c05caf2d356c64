"""A recording replayed as if it happened now, on a clock that may run faster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from kavier_twin.telemetry import EngineSample, RequestFinished, RequestRecord, RequestSeen, TelemetryRecord

_ORDER: Final = {"request_seen": 0, "request_finished": 1, "engine_sample": 2}


class ReplaySource:
    """Hands out a recording's events when their time comes: arrivals, ends, and what the engine said of itself.

    Nothing is known before its time: a request's arrival comes without its output, its end comes when it ended. The
    clock starts with `start`, or the first poll.
    """

    trouble = ""

    def __init__(
        self,
        records: Iterable[RequestRecord],
        samples: Iterable[EngineSample] = (),
        *,
        speed: float = 1.0,
        name: str = "replay",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not (math.isfinite(speed) and speed > 0.0):
            raise ValueError(f"speed {speed}: expected a number above 0")
        self.name = name
        self.speed = speed
        self.last_record_seconds: float | None = None
        self._clock = clock
        self._started: float | None = None
        self._next = 0
        self._events = _in_order(records, samples)

    @property
    def start_seconds(self) -> float:
        """Event time of the first event."""
        return self._events[0].time_seconds if self._events else 0.0

    @property
    def end_seconds(self) -> float:
        """Event time of the last event."""
        return self._events[-1].time_seconds if self._events else 0.0

    @property
    def event_seconds(self) -> float:
        """Event time now: it stands at the end once that is reached."""
        elapsed = 0.0 if self._started is None else (self._clock() - self._started) * self.speed
        return min(self.start_seconds + elapsed, self.end_seconds)

    @property
    def exhausted(self) -> bool:
        """Whether every event was handed out."""
        return self._next >= len(self._events)

    def start(self) -> None:
        """Let the clock run."""
        if self._started is None:
            self._started = self._clock()

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        """At most `max_records` events whose time has come."""
        self.start()
        now = self.event_seconds
        first = self._next
        while (
            self._next < len(self._events)
            and self._next - first < max_records
            and self._events[self._next].time_seconds <= now
        ):
            self._next += 1
        due = self._events[first : self._next]
        if due:
            self.last_record_seconds = due[-1].time_seconds
        return due

    def rejected(self) -> Mapping[str, int]:
        """Nothing is ever rejected."""
        return {}

    def close(self) -> None:
        """Hand out nothing more."""
        self._next = len(self._events)


def _in_order(records: Iterable[RequestRecord], samples: Iterable[EngineSample]) -> list[TelemetryRecord]:
    events: list[RequestSeen | RequestFinished | EngineSample] = list(samples)
    for record in records:
        events.append(record.seen())
        finished = record.finished()
        if finished is not None:
            events.append(finished)
    events.sort(key=lambda event: (event.time_seconds, _ORDER[event.kind]))
    return list(events)
