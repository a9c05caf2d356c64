from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from connectors.kafka.merge import PATIENCE_SECONDS, Merge, Message
from kavier_twin.telemetry import RequestSeen, TelemetryRecord


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def message(next_offset: int, timestamp_ms: int, records: int = 1) -> Message:
    held: list[TelemetryRecord] = [
        RequestSeen(id=f"{timestamp_ms}.{number}", time_seconds=timestamp_ms / 1000, prompt_tokens=1)
        for number in range(records)
    ]
    return Message(next_offset, timestamp_ms, held, 100)


def times_ms(records: list[TelemetryRecord]) -> list[int]:
    return [round(record.time_seconds * 1000) for record in records]


def test_the_oldest_first() -> None:
    merge = Merge()
    merge.open("a", 0)
    merge.open("b", 5)
    for offset, at in ((1, 10), (2, 40)):
        merge.put("a", message(offset, at))
    for offset, at in ((6, 20), (7, 30)):
        merge.put("b", message(offset, at))
    merge.set_at_end("a", True)
    merge.set_at_end("b", True)
    assert times_ms(merge.take(3)) == [10, 20, 30]
    assert merge.positions() == {"a": 1, "b": 7}
    assert (merge.weight_bytes("a"), merge.weight_bytes("b")) == (100, 0)
    assert times_ms(merge.take(3)) == [40]
    assert merge.take(3) == []


def test_a_partition_with_more_to_come_is_waited_for_but_not_for_ever() -> None:
    clock = Clock()
    merge = Merge(clock)
    merge.open("a", 0)
    merge.open("b", 0)
    merge.put("a", message(1, 10))
    merge.put("a", message(2, 30))
    assert merge.take(9) == []  # who knows what b has
    merge.put("b", message(1, 20))
    assert times_ms(merge.take(9)) == [10, 20]  # and now again
    clock.now = PATIENCE_SECONDS - 0.1
    assert merge.take(9) == []
    clock.now = PATIENCE_SECONDS
    assert times_ms(merge.take(9)) == [30]


def test_a_partition_at_its_end_is_not_waited_for() -> None:
    merge = Merge(Clock())
    merge.open("a", 0)
    merge.open("b", 0)
    merge.set_at_end("b", True)
    merge.put("a", message(1, 10))
    assert times_ms(merge.take(9)) == [10]


def test_a_message_is_whole() -> None:
    merge = Merge()
    merge.open("a", 0)
    merge.set_at_end("a", True)
    for offset, count in ((1, 2), (2, 5), (3, 0), (4, 1)):
        merge.put("a", message(offset, offset, count))
    assert len(merge.take(3)) == 2
    assert merge.positions() == {"a": 1}
    assert len(merge.take(3)) == 5
    assert merge.positions() == {"a": 3}  # a message without records goes with the one before it
    assert len(merge.take(3)) == 1


def test_a_position_moves_over_a_gap_only_when_what_was_before_it_is_taken() -> None:
    merge = Merge()
    merge.open("a", 0)
    merge.set_at_end("a", True)
    merge.put("a", message(1, 10))
    merge.skip("a", 50)
    assert merge.positions() == {"a": 0}
    assert times_ms(merge.take(9)) == [10]
    assert merge.positions() == {"a": 50}
    merge.skip("a", 60)
    assert merge.positions() == {"a": 60}


@given(
    lanes=st.lists(st.lists(st.integers(0, 50), max_size=8).map(sorted), min_size=1, max_size=4),
    batches=st.lists(st.integers(1, 5), max_size=20),
)
def test_however_it_is_taken_it_is_the_sorted_whole(lanes: list[list[int]], batches: list[int]) -> None:
    merge = Merge()
    for number, times in enumerate(lanes):
        merge.open(str(number), 0)
        merge.set_at_end(str(number), True)
        for offset, at in enumerate(times):
            merge.put(str(number), message(offset + 1, at))
    taken: list[TelemetryRecord] = []
    for batch in [*batches, 1000]:
        found = merge.take(batch)
        assert len(found) <= batch
        taken += found
        assert sum(merge.positions().values()) == len(taken)
    assert times_ms(taken) == sorted(at for times in lanes for at in times)
