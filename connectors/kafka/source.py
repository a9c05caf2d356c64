"""A Kafka topic as a source of telemetry."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from typing import Any, Final

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, LogTruncationError, OffsetOutOfRangeError

from connectors.background import BackgroundSource, Backoff
from connectors.dead_letters import Letters
from connectors.kafka.client import ANSWER_MS, GroupOffsets, LetterTopic, connection, make_consumer
from connectors.kafka.merge import Merge, Message
from connectors.kafka.messages import parse_value
from connectors.kafka.settings import KafkaSettings
from connectors.secret import SecretError
from connectors.traces.base import Malformed
from kavier_twin.telemetry import TelemetryRecord

log = logging.getLogger(__name__)

FETCH_MESSAGES: Final = 500  # taken of the client at a time
FETCH_MS: Final = 200  # waited for them
DISCOVER_SECONDS: Final = 30.0  # between looks for new partitions
CHECK_SECONDS: Final = 5.0  # between questions for the ends of the partitions, and between commits
LONGEST_BACKOFF_SECONDS: Final = 30.0
AHEAD_SECONDS: Final = 3_600.0  # that a record's time may be after Kafka's own: clocks that are not the same
_MESSAGE_BYTES: Final = 1_000  # a message's objects, beside what grows with its length
_OBJECT_BYTES: Final = 3  # of objects for a byte of JSON: a hash of 20 digits is an integer and its place in a tuple


class CannotConnect(Exception):
    """No broker lets us in. The message is for the operator."""


class KafkaSource(BackgroundSource):
    """Reads all partitions of the topics; positions are the reader's own, never a group's.

    A thread fetches and parses ahead, within `buffer_bytes`; partitions that are ahead of others have to wait. Records
    come by the time stamps of their messages (`Merge`). `positions` and `seek` are for a checkpoint: a source that was
    sought hands out what comes after those positions, each message whole and once. Partitions found later are read
    from their beginning. Trouble of any kind is retried with growing pauses and told in `trouble`; `lost` counts
    offsets that went by unread:

    - `expired`: the log begins after the position, as retention deletes without regard for who still reads.
    - `truncated`: the log ends before the position, as it was cut or made anew. Reading goes on with the first message
      that is not older than the last one read. A log made anew that is already longer again is not noticed.

    `start` (unix seconds) is where to begin without a position, in place of the settings' own. `api_version`
    is for brokers that announce another than they serve.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        pool: str = "default",
        start: float | None = None,
        letters: Letters | None = None,
        api_version: tuple[int, ...] | None = None,
        discover_seconds: float = DISCOVER_SECONDS,
    ) -> None:
        super().__init__(settings.name or f"kafka:{'+'.join(settings.topics)}")
        self.lag_records = math.nan
        self.trouble = "not connected yet"
        self._settings = settings
        self._pool = pool
        self._start = settings.start if start is None else start
        self._letters = letters
        self._api_version = api_version
        self._discover_seconds = discover_seconds
        self._merge = Merge()
        self._sought: dict[str, int] = {}
        self._lost: Counter[str] = Counter()
        self._offsets: dict[TopicPartition, int] = {}  # after the last message fetched
        self._timestamps: dict[TopicPartition, int] = {}  # of the last message fetched
        self._full: set[TopicPartition] = set()  # with no room left in the buffer
        self._looked_for: set[str] = set()  # topics, there or not
        self._missing = ""  # which are not, in words

    # --- for the twin ---------------------------------------------------------------------------------------------

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        """The next records there now, by Kafka's time; all of one message come together. Never waits."""
        with self._changed:
            if self._closing:
                return []
            if self._thread.ident is None:
                self._thread.start()
            records = self._merge.take(max_records)
            if records:
                newest = max(record.time_seconds for record in records)
                self.last_record_seconds = max(newest, self.last_record_seconds or newest)
        return records

    def positions(self) -> dict[str, int]:
        """By `topic:partition`, the offset after the last message handed out: what a checkpoint has to keep."""
        with self._changed:
            return self._sought | self._merge.positions()

    def seek(self, positions: Mapping[str, int]) -> None:
        """Begin at these positions. Raises RuntimeError after the first poll, ValueError for what is no position."""
        if self._thread.ident is not None:
            raise RuntimeError("seek before the first poll")
        for partition, offset in positions.items():
            topic, _, number = partition.rpartition(":")
            if not topic or not number.isdecimal() or isinstance(offset, bool) or offset < 0:
                raise ValueError(f"{partition!r}: {offset!r} is not a topic:partition with an offset")
        self._sought = dict(positions)

    def lost(self) -> Mapping[str, int]:
        """Offsets that went by unread, by reason."""
        with self._changed:
            return dict(self._lost)

    # --- the thread -----------------------------------------------------------------------------------------------

    def _fetch(self) -> None:
        backoff = Backoff(0.5, LONGEST_BACKOFF_SECONDS)
        while not self._closing:
            try:
                self._read(backoff)
            except (CannotConnect, KafkaError, SecretError) as error:
                self._set_trouble(str(error))
            except Exception:  # the client's own: a new one may do better
                log.exception("source %s: the Kafka client failed", self.name)
                self._set_trouble("the Kafka client failed; see the log")
            self._pause(backoff.next())

    def _read(self, backoff: Backoff) -> None:
        """Connect and read until closed. Raises what keeps it from going on with this connection."""
        settings = self._settings
        options = connection(settings, self._api_version)
        with ExitStack() as clients:
            consumer = clients.enter_context(closing(self._connect(options)))
            letters = self._letters
            if settings.dead_letter_topic:
                letters = clients.enter_context(closing(LetterTopic(settings.dead_letter_topic, options)))
            group = clients.enter_context(closing(GroupOffsets(settings.group, options))) if settings.group else None
            next_look = next_check = -math.inf
            while not self._closing:
                now = time.monotonic()
                if now >= next_look:
                    self._discover(consumer)
                    next_look = time.monotonic() + self._discover_seconds
                if now >= next_check:
                    if self._check(consumer):
                        backoff.reset()
                    if group:
                        group.commit(self._handed_out())
                    next_check = time.monotonic() + CHECK_SECONDS
                if not self._assign(consumer):
                    self._pause(FETCH_MS / 1000)
                    continue
                try:
                    fetched = consumer.poll(timeout_ms=FETCH_MS, max_records=FETCH_MESSAGES)
                except OffsetOutOfRangeError as error:
                    self._out_of_range(consumer, dict.fromkeys(error.args[0]))
                    continue
                except LogTruncationError as error:
                    self._out_of_range(consumer, {p: at and at.offset for p, at in error.divergent_offsets.items()})
                    continue
                for partition, messages in fetched.items():
                    self._take(partition, messages, letters)
                self._note_ends(consumer)
            if group:
                group.commit(self._handed_out())

    def _connect(self, options: Mapping[str, Any]) -> KafkaConsumer:
        try:
            return make_consumer(options, self._discover_seconds)
        except (KafkaError, OSError) as error:
            raise CannotConnect(
                f"cannot connect to {', '.join(self._settings.brokers)} ({error}); check brokers, tls and sasl"
            ) from None

    def _take(self, partition: TopicPartition, messages: Iterable[Any], letters: Letters | None) -> None:
        """Parse what was fetched of a partition and queue it."""
        parsed: list[Message] = []
        for message in messages:
            size = len(message.value or b"")
            records: list[TelemetryRecord] = []
            for found in parse_value(message.value, self._pool):
                if not isinstance(found, Malformed):
                    found = _not_ahead(found, message.timestamp)
                if not isinstance(found, Malformed):
                    records.append(found)
                    continue
                self._reject(found.reason)
                if letters:
                    where = {"topic": message.topic, "partition": message.partition, "offset": message.offset}
                    letters.write(where, found, size)
            weight = _MESSAGE_BYTES + _OBJECT_BYTES * size
            parsed.append(Message(message.offset + 1, message.timestamp, records, weight))
        if parsed:
            self._offsets[partition] = parsed[-1].next_offset
            self._timestamps[partition] = parsed[-1].timestamp_ms
            with self._changed:
                for message in parsed:
                    self._merge.put(_key(partition), message)

    def _assign(self, consumer: KafkaConsumer) -> bool:
        """Let the client read the partitions that there is room for: whether there are any.

        One that has used its share of the buffer is read again when half of that is free. It is taken from the client
        until then, as kafka-python 3.0 may never go on with a partition that was paused.
        """
        share = self._settings.buffer_bytes / max(1, len(self._offsets))
        for partition in self._offsets:
            with self._changed:
                weight = self._merge.weight_bytes(_key(partition))
            if weight >= share:
                self._full.add(partition)
            elif weight < share / 2:
                self._full.discard(partition)
        readable = self._offsets.keys() - self._full
        here = consumer.assignment()
        if readable and readable != here:
            consumer.assign(list(readable))
            for partition in readable - here:
                consumer.seek(partition, self._offsets[partition])
        return bool(readable)

    def _note_ends(self, consumer: KafkaConsumer) -> None:
        for partition in consumer.assignment():
            offset = self._offsets[partition]
            highwater = consumer.highwater(partition)
            at_end = highwater is not None and offset >= highwater
            if highwater is not None and not at_end:
                # The rest may be a transaction's markers, which make no message but move the client's position.
                at_end = (consumer.position(partition, timeout_ms=0) or 0) >= highwater
            with self._changed:
                self._merge.set_at_end(_key(partition), at_end)

    def _check(self, consumer: KafkaConsumer) -> bool:
        """Ask where the partitions end: how far behind the twin is, and whether the brokers answer at all."""
        try:
            ends = consumer.end_offsets(list(self._offsets), timeout_ms=ANSWER_MS // 4) if self._offsets else {}
        except KafkaError as error:
            self._set_trouble(f"no answer from the brokers ({error})")
            return False
        handed_out = self._handed_out()
        self.lag_records = float(sum(max(0, end - handed_out[partition]) for partition, end in ends.items()))
        self._set_trouble(self._missing)
        return True

    def _handed_out(self) -> dict[TopicPartition, int]:
        with self._changed:
            positions = self._merge.positions()
        return {partition: positions[_key(partition)] for partition in self._offsets}

    # --- where to read --------------------------------------------------------------------------------------------

    def _discover(self, consumer: KafkaConsumer) -> None:
        """Find partitions, and where to begin with new ones."""
        found: list[TopicPartition] = []
        for topic in self._settings.topics:
            numbers = consumer.partitions_for_topic(topic)
            found += [TopicPartition(topic, number) for number in sorted(numbers)]
        missing = set(self._settings.topics) - {partition.topic for partition in found}
        self._missing = f"no topic {', '.join(sorted(missing))}; create it, or correct topics" if missing else ""
        new = [partition for partition in found if partition not in self._offsets]
        for partition, offset in self._starts(consumer, new).items():
            self._offsets[partition] = offset
            with self._changed:
                self._merge.open(_key(partition), offset)
            log.info("source %s: reading %s from offset %d", self.name, _key(partition), offset)
        self._looked_for.update(self._settings.topics)

    def _starts(self, consumer: KafkaConsumer, new: list[TopicPartition]) -> dict[TopicPartition, int]:
        """The first offset to read of each new partition."""
        starts: dict[TopicPartition, int] = {}
        unknown = []
        for partition in new:
            if _key(partition) in self._sought:
                starts[partition] = self._sought[_key(partition)]
            else:
                unknown.append(partition)
        sought = {key.rpartition(":")[0] for key in self._sought}
        # All of what a partition holds that came after the twin had begun is new to it.
        late = [p for p in unknown if p.topic in self._looked_for or p.topic in sought]
        first = [p for p in unknown if p not in late]
        if self._start == "earliest":
            late, first = unknown, []
        if late:
            starts |= consumer.beginning_offsets(late, timeout_ms=ANSWER_MS)
        if first:
            ends = consumer.end_offsets(first, timeout_ms=ANSWER_MS)
            starts |= ends
            if isinstance(self._start, float | int):
                starts |= self._at_time(consumer, dict.fromkeys(first, int(self._start * 1000)))
        return starts

    def _at_time(self, consumer: KafkaConsumer, times_ms: dict[TopicPartition, int]) -> dict[TopicPartition, int]:
        """The offsets of the first messages not older, of the partitions that have one."""
        found = consumer.offsets_for_times(times_ms, timeout_ms=ANSWER_MS)
        return {partition: at.offset for partition, at in found.items() if at is not None and at.offset >= 0}

    def _out_of_range(self, consumer: KafkaConsumer, partitions: Mapping[TopicPartition, int | None]) -> None:
        """The log does not go on at the next offset of these: say what was lost, and go on where it does.

        With each the offset up to which the log is still the one that was read, where the broker said so.
        """
        for partition, cut_at in partitions.items():
            offset = self._offsets[partition]
            first = consumer.beginning_offsets([partition], timeout_ms=ANSWER_MS)[partition]
            end = consumer.end_offsets([partition], timeout_ms=ANSWER_MS)[partition] if cut_at is None else cut_at
            target = offset
            if offset < first:
                target = first
                self._lose(
                    "expired", first - offset, f"{_key(partition)}: offsets {offset} to {first - 1} no longer exist"
                )
            elif offset > end:
                target = min(end, self._after_cut(consumer, partition, first, end))
                told = (
                    f"{_key(partition)}: the log ends at {end}, but the position was {offset}; continuing at {target}"
                )
                self._lose("truncated", offset - end, told)
            self._offsets[partition] = target
            consumer.seek(partition, target)
            with self._changed:
                self._merge.skip(_key(partition), target)

    def _after_cut(self, consumer: KafkaConsumer, partition: TopicPartition, first: int, end: int) -> int:
        """Where to go on in a log that may be another one now, whose offsets say nothing: by the time last read."""
        newest = self._timestamps.get(partition)
        if newest is None:
            return first
        return self._at_time(consumer, {partition: newest}).get(partition, end)

    def _lose(self, reason: str, count: int, told: str) -> None:
        log.warning("source %s: %s", self.name, told)
        with self._changed:
            self._lost[reason] += count


def _key(partition: TopicPartition) -> str:
    return f"{partition.topic}:{partition.partition}"


def _not_ahead(record: TelemetryRecord, timestamp_ms: int) -> TelemetryRecord | Malformed:
    """The record, unless its time is far after Kafka's: in milliseconds, say, it would make all that comes late."""
    if 0 < timestamp_ms < (record.time_seconds - AHEAD_SECONDS) * 1000.0:
        return Malformed("future-time", "time_seconds is more than an hour after Kafka's time stamp")
    return record
