"""Event time: putting records in order behind a watermark, each once.

The watermark trails the newest event time by the allowed lateness. Records become due when it passes them, in an order
that depends on their content alone, so that duplicates and any reordering within the lateness change nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable
from copy import copy
from typing import Any, Final

from kavier_twin.telemetry import RequestFinished, RequestSeen

REMEMBERED_IDS: Final = 200_000  # how many record identities are kept to recognise duplicates

Event = RequestSeen | RequestFinished


class OrderedStream:
    """A bounded re-ordering buffer over request events."""

    def __init__(self, lateness_seconds: float, remembered_ids: int = REMEMBERED_IDS) -> None:
        self._lateness_seconds = lateness_seconds
        self._remembered_ids = remembered_ids
        self._heap: list[tuple[float, int, str, Event]] = []
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()
        self.newest_seconds = -math.inf
        self._floor_seconds = -math.inf

    @property
    def watermark_seconds(self) -> float:
        """Event time up to which everything is taken to have arrived."""
        return max(self.newest_seconds - self._lateness_seconds, self._floor_seconds)

    @property
    def buffered(self) -> int:
        """Records not yet due."""
        return len(self._heap)

    def offer(self, event: Event) -> str:
        """Take a record in. Returns what became of it: "accepted", "duplicate" or "late"."""
        identity = (event.kind, event.id)
        if identity in self._known:
            return "duplicate"
        if event.time_seconds < self.watermark_seconds:
            return "late"
        self._known[identity] = None
        if len(self._known) > self._remembered_ids:
            self._known.popitem(last=False)
        heapq.heappush(self._heap, _entry(event))
        self.newest_seconds = max(self.newest_seconds, event.time_seconds)
        return "accepted"

    def fork(self, more: Iterable[Event] = ()) -> OrderedStream:
        """A copy that hands out what is buffered and `more`; nothing may be offered to it."""
        twin = copy(self)
        twin._heap = self._heap.copy()
        added = set()  # each once here too: of one id and time, the heap could not tell which comes first
        for event in more:
            identity = (event.kind, event.id)
            if identity not in self._known and identity not in added:
                added.add(identity)
                heapq.heappush(twin._heap, _entry(event))
        return twin

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "buffered": [entry[3].model_dump(mode="json", exclude_defaults=True) for entry in sorted(self._heap)],
            "kinds": [entry[3].kind for entry in sorted(self._heap)],
            "known": list(self._known),
            "newest_seconds": self.newest_seconds,
            "floor_seconds": self._floor_seconds,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        models: dict[str, type[RequestSeen] | type[RequestFinished]] = {
            "request_seen": RequestSeen,
            "request_finished": RequestFinished,
        }
        events = [models[kind].model_validate(e) for kind, e in zip(saved["kinds"], saved["buffered"], strict=True)]
        self._heap = [_entry(event) for event in events]  # sorted, which is a heap
        self._known = OrderedDict((tuple(identity), None) for identity in saved["known"])
        self.newest_seconds = saved["newest_seconds"]
        self._floor_seconds = saved["floor_seconds"]

    def raise_floor(self, time_seconds: float) -> None:
        """Time passed without records: nothing older than this is waited for."""
        self._floor_seconds = max(self._floor_seconds, time_seconds)

    def due(self) -> list[Event]:
        """Records the watermark has passed, in event-time order."""
        events = []
        while self._heap and self._heap[0][0] <= self.watermark_seconds:
            events.append(heapq.heappop(self._heap)[3])
        return events


def _entry(event: Event) -> tuple[float, int, str, Event]:
    # At equal times a request is seen before it finishes.
    return event.time_seconds, 0 if isinstance(event, RequestSeen) else 1, event.id, event
