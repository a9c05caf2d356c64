"""The messages of several partitions put into one order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final

from kavier_twin.telemetry import TelemetryRecord

PATIENCE_SECONDS: Final = 10.0
"""For which a partition that has more to come, but nothing here, holds up the others."""


@dataclass(frozen=True, slots=True)
class Message:
    """One Kafka record: the offset after it, its time stamp, what it held, and what keeping it weighs."""

    next_offset: int
    timestamp_ms: int
    records: list[TelemetryRecord]
    weight_bytes: int


@dataclass(slots=True)
class _Lane:
    next_offset: int
    queue: deque[Message] = field(default_factory=deque)
    weight_bytes: int = 0
    at_end: bool = False
    empty_since: float = 0.0


class Merge:
    """A queue for each partition; messages are taken by their time stamps, over all partitions.

    Kafka orders a partition, not a topic: a twin that reads a day of a topic again would be through with one partition
    before it began the next, and find all of that late. So while a partition is empty here but not at its end, no
    other gives anything, for `PATIENCE_SECONDS` at most (its broker may be away). Not thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lanes: dict[str, _Lane] = {}
        self._heads: list[tuple[int, str]] = []  # a heap of the first message of each queue that has one

    def open(self, partition: str, next_offset: int) -> None:
        """Add a partition that will be read from `next_offset` on."""
        self._lanes[partition] = _Lane(next_offset, empty_since=self._clock())

    def put(self, partition: str, message: Message) -> None:
        """Add the next message of a partition."""
        lane = self._lanes[partition]
        if not lane.queue:
            heappush(self._heads, (message.timestamp_ms, partition))
        lane.queue.append(message)
        lane.weight_bytes += message.weight_bytes

    def skip(self, partition: str, next_offset: int) -> None:
        """The partition goes on at another offset: the position after what is queued now."""
        lane = self._lanes[partition]
        if lane.queue:
            last = lane.queue.pop()
            lane.queue.append(Message(next_offset, last.timestamp_ms, last.records, last.weight_bytes))
        else:
            lane.next_offset = next_offset

    def set_at_end(self, partition: str, at_end: bool) -> None:
        """Tell whether the partition had more when it was last asked."""
        self._lanes[partition].at_end = at_end

    def take(self, max_records: int) -> list[TelemetryRecord]:
        """The next records, at most `max_records`; a message of more than that is still given whole, alone."""
        records: list[TelemetryRecord] = []
        now = self._clock()
        held_up = self._held_up(now)
        while self._heads and not held_up:
            partition = self._heads[0][1]
            lane = self._lanes[partition]
            message = lane.queue[0]
            if records and message.records and len(records) + len(message.records) > max_records:
                break
            heappop(self._heads)
            lane.queue.popleft()
            lane.weight_bytes -= message.weight_bytes
            lane.next_offset = message.next_offset
            records += message.records
            if lane.queue:
                heappush(self._heads, (lane.queue[0].timestamp_ms, partition))
            else:
                lane.empty_since = now
                held_up = self._held_up(now)
        return records

    def positions(self) -> dict[str, int]:
        """By partition, the offset after the last message taken."""
        return {partition: lane.next_offset for partition, lane in self._lanes.items()}

    def weight_bytes(self, partition: str) -> int:
        """What the messages queued of one partition weigh."""
        return self._lanes[partition].weight_bytes

    def _held_up(self, now: float) -> bool:
        return any(
            not lane.queue and not lane.at_end and now - lane.empty_since < PATIENCE_SECONDS
            for lane in self._lanes.values()
        )
