"""Hands records to Kafka or a file from a thread of its own, so that neither can delay a request."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

from kavier_twin.tap.metrics import TapMetrics
from kavier_twin.telemetry import RequestFinished, RequestSeen

MOST_BYTES: Final = 64 << 20  # of records that wait: a minute or an hour of Kafka's absence, as traffic is
_MOST_UNDER_WAY: Final = 1_000  # records in the hands of Kafka's client
_DELIVERY_MS: Final = 600_000  # after which the client gives one up
_RETRY_SECONDS: Final = 1.0
_LATE_SECONDS: Final = 5.0  # without confirmation, after which a place counts as away

log = logging.getLogger(__name__)
# The client's own log shows what it sends, a password among it.
logging.getLogger("kafka").setLevel(logging.CRITICAL)


Done = Callable[[str | None], None]


class Sink(Protocol):
    """Where records go."""

    def write(self, key: bytes, value: bytes, done: Done) -> None:
        """Take a record. May block, and raises OSError while the place is away, after which it may be tried again.

        `done` is called once the place has the record, with None, or never will have it, with a reason; from any
        thread.
        """

    def close(self, seconds: float) -> None:
        """Let what was written arrive, for `seconds` at most."""


class FileSink:
    """Lines appended to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def write(self, key: bytes, value: bytes, done: Done) -> None:
        self._file.write(value + b"\n")
        self._file.flush()
        done(None)

    def close(self, seconds: float) -> None:
        self._file.close()


class KafkaSink:
    """A topic. Keyed by the request's id, so that all records of a request keep their order.

    `options` are kafka-python's.
    """

    def __init__(self, topic: str, options: Mapping[str, Any]) -> None:
        self._options = {
            **options,
            "linger_ms": 20,
            "max_block_ms": 2_000,
            "delivery_timeout_ms": _DELIVERY_MS,
            "compression_type": "gzip",
        }
        self._topic = topic
        self._producer: Any = None
        self._under_way = threading.Semaphore(_MOST_UNDER_WAY)

    def write(self, key: bytes, value: bytes, done: Done) -> None:
        from kafka import KafkaProducer  # an extra
        from kafka.errors import KafkaError, MessageSizeTooLargeError

        if not self._under_way.acquire(timeout=1.0):  # the client's own buffer has no limit
            raise OSError("Kafka does not confirm what it was sent")
        try:
            if self._producer is None:
                self._producer = KafkaProducer(**self._options)
            future = self._producer.send(self._topic, key=key, value=value)
        except MessageSizeTooLargeError:  # no use in trying again
            self._under_way.release()
            done("too-large")
            return
        except KafkaError as error:
            self._under_way.release()
            raise OSError(type(error).__name__) from error

        def over(reason: str | None) -> None:
            self._under_way.release()
            done(reason)

        future.add_callback(lambda _: over(None))
        future.add_errback(lambda _: over("kafka-failed"))

    def close(self, seconds: float) -> None:
        from kafka.errors import KafkaError

        if self._producer is None:
            return
        with suppress(KafkaError):
            self._producer.flush(timeout=seconds)
        with suppress(KafkaError):
            self._producer.close(timeout=1.0)


class Producer:
    """A bounded buffer before a sink, emptied by a thread. `put` never blocks and never raises.

    A record counts as buffered until the sink has it for certain.
    """

    def __init__(self, sink: Sink, metrics: TapMetrics, most_bytes: int = MOST_BYTES) -> None:
        self._sink = sink
        self._metrics = metrics
        self._most_bytes = most_bytes
        self._waiting: queue.SimpleQueue[tuple[str, bytes, bytes]] = queue.SimpleQueue()
        self._bytes = 0
        self._counting = threading.Lock()
        self._under_way: dict[int, float] = {}  # by number, since when on the monotonic clock; the oldest is the first
        self._written = 0
        self._confirmed_seconds = 0.0
        self._away_seconds: float | None = None
        self._failure: str | None = None  # of the last write
        self._left = 0  # records that the sink gave up at the end
        self._deadline_seconds: float | None = None  # on the monotonic clock, once it is to end
        self._thread = threading.Thread(target=self._run, name="tap-producer", daemon=True)
        self._thread.start()

    def put(self, record: RequestSeen | RequestFinished) -> None:
        """Take a record, or count it as dropped."""
        value = record.model_dump_json(exclude_none=True).encode()
        if self._bytes + len(value) > self._most_bytes:
            self._metrics.dropped.labels("buffer-full").inc()
            return
        self._count(len(value), 1)
        self._waiting.put((record.kind, record.id.encode(), value))

    def _count(self, more_bytes: int, more_records: int) -> None:
        with self._counting:
            self._bytes += more_bytes
            self._metrics.buffered.inc(more_records)

    def close(self, seconds: float) -> None:
        """Hand over what waits, for `seconds` at most; what is left then is counted as dropped."""
        self._deadline_seconds = time.monotonic() + seconds
        self._thread.join(seconds + 5.0)  # a write under way may still block
        self._sink.close(max(0.1, self._deadline_seconds - time.monotonic()))
        while not self._waiting.empty():
            _, _, value = self._waiting.get_nowait()
            self._count(-len(value), -1)
            self._left += 1
        left = self._left + len(self._under_way)
        if left:
            self._metrics.dropped.labels("ended").inc(left)
            log.warning("%d records were not handed on at the end", left)

    def _run(self) -> None:
        while not self._over():
            self._look()
            try:
                kind, key, value = self._waiting.get(timeout=0.1)
            except queue.Empty:
                if self._deadline_seconds is not None:
                    return
                continue
            while not self._write(kind, key, value):
                self._look()
                if self._over():
                    self._waiting.put((kind, key, value))  # to be counted
                    return
                time.sleep(_RETRY_SECONDS)

    def _write(self, kind: str, key: bytes, value: bytes) -> bool:
        """Returns whether the sink took it."""
        self._written += 1
        number = self._written

        def done(reason: str | None) -> None:
            with self._counting:
                self._under_way.pop(number, None)
            self._count(-len(value), -1)
            if reason is None:
                self._confirmed_seconds = time.monotonic()
                self._metrics.records.labels(kind).inc()
            elif self._deadline_seconds is not None:  # given up because the sink closes
                self._left += 1
            else:
                self._metrics.dropped.labels(reason).inc()

        with self._counting:
            self._under_way[number] = time.monotonic()
        try:
            self._sink.write(key, value, done)
        except OSError as error:
            with self._counting:
                self._under_way.pop(number, None)
            self._failure = str(error)
            return False
        self._failure = None
        return True

    def _look(self) -> None:
        """Log that the place went away, or is back: once each."""
        now = time.monotonic()
        with self._counting:
            oldest_seconds = next(iter(self._under_way.values()), now)
        late = now - oldest_seconds > _LATE_SECONDS
        if self._away_seconds is None:
            if late or self._failure is not None:
                self._away_seconds = now
                log.warning(
                    "records cannot be handed on, they wait: %s", self._failure or "what was sent is not confirmed"
                )
        elif not late and self._failure is None and self._confirmed_seconds > self._away_seconds:
            log.info("records are handed on again, after %.0f s", now - self._away_seconds)
            self._away_seconds = None

    def _over(self) -> bool:
        return self._deadline_seconds is not None and time.monotonic() > self._deadline_seconds
