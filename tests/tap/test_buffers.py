"""What waits is bounded, and what does not fit is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from kavier_twin.tap import bodies, producer
from kavier_twin.tap.bodies import Bodies, BodyCopy
from kavier_twin.tap.metrics import TapMetrics
from kavier_twin.tap.producer import Done, Producer
from kavier_twin.telemetry import RequestSeen


class Away:
    """A place that takes nothing until it is back."""

    def __init__(self) -> None:
        self.back = threading.Event()
        self.taken: list[bytes] = []

    def write(self, key: bytes, value: bytes, done: Done) -> None:
        if not self.back.is_set():
            raise OSError("away")
        self.taken.append(key)
        done(None)

    def close(self, seconds: float) -> None:
        pass


def seen(number: int) -> RequestSeen:
    return RequestSeen(id=str(number), time_seconds=1.0, prompt_tokens=5)


def value(metrics: TapMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"kavier_twin_tap_{name}", labels)


def test_records_wait_in_order_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer, "_RETRY_SECONDS", 0.01)
    place, metrics = Away(), TapMetrics()
    size = len(seen(1).model_dump_json(exclude_none=True))
    records = Producer(place, metrics, most_bytes=5 * size)
    for number in range(8):
        records.put(seen(number))
    assert value(metrics, "dropped_total", reason="buffer-full") == 3
    assert value(metrics, "buffered_records") == 5
    place.back.set()
    records.close(10.0)
    assert place.taken == [b"0", b"1", b"2", b"3", b"4"]
    assert value(metrics, "records_total", kind="request_seen") == 5
    assert value(metrics, "buffered_records") == 0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Silent:
    """A place that takes what it is given, and confirms it when told to."""

    def __init__(self) -> None:
        self.unconfirmed: list[Done] = []

    def write(self, key: bytes, value: bytes, done: Done) -> None:
        self.unconfirmed.append(done)

    def confirm(self, reason: str | None = None) -> None:
        while self.unconfirmed:
            self.unconfirmed.pop(0)(reason)

    def close(self, seconds: float) -> None:
        pass


@pytest.mark.parametrize("place", [Away(), Silent()], ids=["refusing", "silent"])
def test_a_place_that_is_away_is_told_once_and_its_return_once(
    place: Away | Silent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it takes nothing, or takes all and confirms nothing, as a Kafka client does."""
    caplog.set_level("INFO")
    monkeypatch.setattr(producer, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(producer, "_LATE_SECONDS", 0.05)
    metrics = TapMetrics()
    records = Producer(place, metrics)
    for number in range(4):
        records.put(seen(number))
    until(lambda: "cannot be handed on" in caplog.text)
    assert value(metrics, "buffered_records") == 4
    assert not value(metrics, "records_total", kind="request_seen")
    for number in range(4, 8):
        records.put(seen(number))
    if isinstance(place, Away):
        place.back.set()
    else:
        until(lambda: len(place.unconfirmed) == 8)
        place.confirm()
    until(lambda: "handed on again" in caplog.text)
    until(lambda: value(metrics, "buffered_records") == 0)
    assert value(metrics, "records_total", kind="request_seen") == 8
    assert caplog.text.count("cannot be handed on") == caplog.text.count("handed on again") == 1
    records.close(1.0)


def test_what_a_place_gives_up_is_dropped_and_no_return(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(producer, "_LATE_SECONDS", 0.05)
    place, metrics = Silent(), TapMetrics()
    records = Producer(place, metrics)
    records.put(seen(1))
    until(lambda: "cannot be handed on" in caplog.text)
    place.confirm("kafka-failed")
    records.put(seen(2))
    until(lambda: "handed on again" in caplog.text or len(place.unconfirmed) == 1)
    assert "handed on again" not in caplog.text
    assert value(metrics, "dropped_total", reason="kafka-failed") == 1
    records.close(0.1)
    assert value(metrics, "dropped_total", reason="ended") == 1


def test_what_is_left_at_the_end_is_counted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(producer, "_RETRY_SECONDS", 0.01)
    metrics = TapMetrics()
    records = Producer(Away(), metrics)
    for number in range(3):
        records.put(seen(number))
    records.close(0.1)
    assert value(metrics, "dropped_total", reason="ended") == 3
    assert value(metrics, "buffered_records") == 0
    assert "3 records were not handed on at the end" in caplog.text


def test_copies_of_bodies_are_bounded_each_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MOST_BYTES", 10)
    monkeypatch.setattr(bodies, "MOST_BYTES_TOGETHER", 15)
    together = Bodies()
    large, one, two, three = (BodyCopy(together) for _ in range(4))
    large.add(b"x" * 6)
    large.add(b"x" * 5)
    assert (large.dropped, together.bytes) == ("body", 0)
    one.add(b"x" * 10)
    two.add(b"x" * 6)
    two.add(b"x")
    assert (one.dropped, two.dropped, together.bytes) == (None, "too-busy", 10)
    assert one.take() == b"x" * 10
    assert (one.take(), together.bytes) == (b"", 0)
    three.add(b"x" * 10)
    assert three.dropped is None
