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

log = logging.getLogger(__name__)
# The client's own log shows what it sends, a password among it.
logging.getLogger("kafka").setLevel(logging.CRITICAL)


class Sink(Protocol):
    """Where records go. `write` may block, and raises OSError while the place is away."""

    def write(self, key: bytes, value: bytes) -> None: ...

    def close(self, seconds: float) -> int:
        """Let what was written arrive, for `seconds` at most. Returns how many records did not."""


class FileSink:
    """Lines appended to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def write(self, key: bytes, value: bytes) -> None:
        self._file.write(value + b"\n")
        self._file.flush()

    def close(self, seconds: float) -> int:
        self._file.close()
        return 0


class KafkaSink:
    """A topic. Keyed by the request's id, so that both halves of a request keep their order.

    `options` are kafka-python's. `failed` is called, with a reason, for each record that Kafka did not take in the end.
    """

    def __init__(self, topic: str, failed: Callable[[str], None], options: Mapping[str, Any]) -> None:
        self._options = {
            **options,
            "linger_ms": 20,
            "max_block_ms": 2_000,
            "delivery_timeout_ms": _DELIVERY_MS,
            "compression_type": "gzip",
        }
        self._topic = topic
        self._failed = failed
        self._producer: Any = None
        self._under_way = threading.Semaphore(_MOST_UNDER_WAY)
        self._unconfirmed = 0
        self._counting = threading.Lock()

    def write(self, key: bytes, value: bytes) -> None:
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
            self._failed("too-large")
            return
        except KafkaError as error:
            self._under_way.release()
            raise OSError(type(error).__name__) from error
        with self._counting:
            self._unconfirmed += 1
        future.add_callback(lambda _: self._over())
        future.add_errback(lambda _: self._over("kafka-failed"))

    def close(self, seconds: float) -> int:
        from kafka.errors import KafkaError

        if self._producer is None:
            return 0
        with suppress(KafkaError):
            self._producer.flush(timeout=seconds)
        left = self._unconfirmed
        with suppress(KafkaError):
            self._producer.close(timeout=1.0)
        return left

    def _over(self, failure: str | None = None) -> None:
        """Kafka has a record, or never will."""
        with self._counting:
            self._unconfirmed -= 1
        self._under_way.release()
        if failure is not None:
            self._failed(failure)


class Producer:
    """A bounded buffer before a sink, emptied by a thread. `put` never blocks and never raises."""

    def __init__(self, sink: Sink, metrics: TapMetrics, most_bytes: int = MOST_BYTES) -> None:
        self._sink = sink
        self._metrics = metrics
        self._most_bytes = most_bytes
        self._waiting: queue.SimpleQueue[tuple[str, bytes, bytes]] = queue.SimpleQueue()
        self._bytes = 0
        self._given_up = 0
        self._counting = threading.Lock()
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
        left = self._given_up
        while not self._waiting.empty():
            _, _, value = self._waiting.get_nowait()
            self._metrics.dropped.labels("ended").inc()
            self._count(-len(value), -1)
            left += 1
        left += self._sink.close(max(0.1, self._deadline_seconds - time.monotonic()))
        if left:
            log.warning("%d records were not handed on at the end", left)

    def _run(self) -> None:
        away = False
        while not self._over():
            try:
                kind, key, value = self._waiting.get(timeout=0.1)
            except queue.Empty:
                if self._deadline_seconds is not None:
                    return
                continue
            while True:
                try:
                    self._sink.write(key, value)
                except OSError as error:
                    if not away:
                        log.warning("records cannot be handed on, they wait: %s", error)
                    away = True
                    if self._over():
                        self._metrics.dropped.labels("ended").inc()
                        self._count(-len(value), -1)
                        self._given_up += 1
                        return
                    time.sleep(_RETRY_SECONDS)
                    continue
                break
            if away:
                log.info("records are handed on again")
            away = False
            self._metrics.records.labels(kind).inc()
            self._count(-len(value), -1)

    def _over(self) -> bool:
        return self._deadline_seconds is not None and time.monotonic() > self._deadline_seconds
