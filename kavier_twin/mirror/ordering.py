"""Event time: putting records in order behind a watermark, each once.

The watermark trails the newest event time by the allowed lateness. Records become due when it passes them, in an order
that depends on their content alone, so that duplicates and any reordering within the lateness change nothing.

One absurd time must not make everything after it late: a record that is `MAX_JUMP_SECONDS` ahead of all others waits
until `CONFIRMED_BY` in a row are. If one with a time like those before comes first, it is refused as `future_time`.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from copy import copy
from typing import Any, Final

from kavier_twin.mirror.pods import PodSeen
from kavier_twin.telemetry import RequestFinished, RequestSeen

REMEMBERED_IDS: Final = 200_000  # how many record identities are kept to recognise duplicates
MAX_SIGHTINGS: Final = 10_000  # of pods, that wait while no request comes; the oldest are dropped
MAX_JUMP_SECONDS: Final = 600.0
CONFIRMED_BY: Final = 3

Request = RequestSeen | RequestFinished
Event = Request | PodSeen


class OrderedStream:
    """A bounded re-ordering buffer over request events."""

    def __init__(self, lateness_seconds: float, remembered_ids: int = REMEMBERED_IDS) -> None:
        self._lateness_seconds = lateness_seconds
        self._remembered_ids = remembered_ids
        self._heap: list[tuple[float, int, str, Request]] = []
        self._sightings: list[PodSeen] = []  # a heap
        self._ahead: list[tuple[Request, bool]] = []  # far ahead of all others and not confirmed; whether foretold
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()
        self.newest_seconds = -math.inf
        self._floor_seconds = -math.inf

    @property
    def watermark_seconds(self) -> float:
        """Event time up to which everything is taken to have arrived."""
        return max(self.newest_seconds - self._lateness_seconds, self._floor_seconds)

    @property
    def last_seconds(self) -> float:
        """Event time of the last event that is known of, an end that was foretold included."""
        known = [entry[0] for entry in self._heap] + [event.time_seconds for event, _ in self._ahead]
        return max([self.newest_seconds, *known])

    @property
    def buffered(self) -> int:
        """Records not yet due."""
        return len(self._heap) + len(self._ahead)

    def offer(self, event: Request, *, foretold: bool = False) -> tuple[str, ...]:
        """Take a record in. Returns what became of it and of those that waited for it to tell: one word for each.

        The words are "accepted", "duplicate", "late" and "future_time". A record that is `foretold`, the end in one
        record with its arrival, does not tell how far the stream has come.
        """
        identity = (event.kind, event.id)
        if identity in self._known:
            return ("duplicate",)
        late = event.time_seconds < self.watermark_seconds
        if late and isinstance(event, RequestSeen):
            return ("late",)
        self._known[identity] = None
        if len(self._known) > self._remembered_ids:
            self._known.popitem(last=False)
        if late:  # an end, handed out all the same: without it the request would run on for ever
            heapq.heappush(self._heap, _entry(event))
            return ("late",)
        if foretold:
            waits = any(event.id == other.id for other, _ in self._ahead)
        else:
            waits = event.time_seconds > self.newest_seconds + MAX_JUMP_SECONDS > -math.inf
        if waits:
            self._ahead.append((event, foretold))
            told = sum(not foretold for _, foretold in self._ahead)
            return self.confirm() if told >= CONFIRMED_BY else ()
        refused = () if foretold else ("future_time",) * len(self._ahead)
        if refused:
            self._ahead.clear()
        self._accept(event, foretold=foretold)
        return (*refused, "accepted")

    def confirm(self, until_seconds: float = math.inf) -> tuple[str, ...]:
        """Those that wait far ahead of all others are right, as far as they lie before this time."""
        right = [entry for entry in self._ahead if entry[0].time_seconds <= until_seconds]
        self._ahead = [entry for entry in self._ahead if entry[0].time_seconds > until_seconds]
        for event, foretold in right:
            self._accept(event, foretold=foretold)
        return ("accepted",) * len(right)

    def _accept(self, event: Request, *, foretold: bool) -> None:
        heapq.heappush(self._heap, _entry(event))
        if not foretold:
            self.newest_seconds = max(self.newest_seconds, event.time_seconds)

    def offer_sighting(self, seen: PodSeen) -> None:
        """Take in what metrics say of a pod. It does not move the watermark; what comes behind it is void."""
        if seen.time_seconds >= self.watermark_seconds:
            push = heapq.heappush if len(self._sightings) < MAX_SIGHTINGS else heapq.heappushpop
            push(self._sightings, seen)

    def fork(self) -> OrderedStream:
        """A copy that hands out what is buffered; nothing may be offered to it."""
        twin = copy(self)
        twin._heap, twin._sightings, twin._ahead = self._heap.copy(), self._sightings.copy(), self._ahead.copy()
        return twin

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "buffered": [_saved(entry[3]) for entry in sorted(self._heap)],
            "ahead": [[_saved(event), foretold] for event, foretold in self._ahead],
            "sightings": sorted(self._sightings),
            "known": list(self._known),
            "newest_seconds": self.newest_seconds,
            "floor_seconds": self._floor_seconds,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        self._heap = [_entry(_restored(event)) for event in saved["buffered"]]  # sorted, which is a heap
        self._ahead = [(_restored(event), foretold) for event, foretold in saved["ahead"]]
        self._sightings = [PodSeen(*seen) for seen in saved["sightings"]]
        self._known = OrderedDict((tuple(identity), None) for identity in saved["known"])
        self.newest_seconds = saved["newest_seconds"]
        self._floor_seconds = saved["floor_seconds"]

    def raise_floor(self, time_seconds: float) -> None:
        """Time passed without records: nothing older than this is waited for."""
        self._floor_seconds = max(self._floor_seconds, time_seconds)

    def due(self) -> list[Event]:
        """Records the watermark has passed, in event-time order."""
        events: list[Event] = []
        watermark = self.watermark_seconds
        while self._heap and self._heap[0][0] <= watermark:
            while self._sightings and self._sightings[0].time_seconds <= self._heap[0][0]:
                events.append(heapq.heappop(self._sightings))
            events.append(heapq.heappop(self._heap)[3])
        while self._sightings and self._sightings[0].time_seconds <= watermark:
            events.append(heapq.heappop(self._sightings))
        return events


def _entry(event: Request) -> tuple[float, int, str, Request]:
    # At equal times a request is seen before it finishes.
    return event.time_seconds, 0 if isinstance(event, RequestSeen) else 1, event.id, event


def _saved(event: Request) -> list[Any]:
    return [event.kind, event.model_dump(mode="json", exclude_defaults=True)]


def _restored(saved: list[Any]) -> Request:
    kind, event = saved
    return RequestSeen.model_validate(event) if kind == "request_seen" else RequestFinished.model_validate(event)
