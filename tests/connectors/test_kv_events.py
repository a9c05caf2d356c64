"""KV-cache events over real ZeroMQ sockets, sent as vLLM sends them."""

from __future__ import annotations

import json
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from connectors.kv_events.source import KvEventsSource
from connectors.kv_events.wire import REMOVED, STORED, WireError, decode_batch
from connectors.traces.recording import read_kv_events
from kavier_twin.mirror.fidelity.kv_cache_view import KvCacheView
from kavier_twin.telemetry import KvBlocksRemoved, KvBlocksStored, KvCacheCleared, KvEventBatch
from kv_publisher import Publisher
from waiting import PATIENCE_SECONDS, wait_until

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"


def stored(*hashes: Any, **more: Any) -> dict[str, Any]:
    return {"type": "BlockStored", "block_hashes": list(hashes), "parent_block_hash": None, "block_size": 16, **more}


def removed(*hashes: Any, **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), **more}


def positional(event: dict[str, Any]) -> list[Any]:
    """The event as older engines send it."""
    names = STORED if event["type"] == "BlockStored" else REMOVED
    return [event["type"], *(event.get(name) for name in names)]


def payload(time: float, *events: Any, rank: int | None = 0) -> bytes:
    return bytes(msgpack.packb([time, list(events), rank]))


@pytest.fixture
def publish() -> Iterator[Callable[..., Publisher]]:
    made: list[Publisher] = []

    def make(**settings: Any) -> Publisher:
        made.append(Publisher(**settings))
        return made[-1]

    yield make
    for publisher in made:
        publisher.close()


@pytest.fixture
def subscribe() -> Iterator[Callable[..., KvEventsSource]]:
    made: list[KvEventsSource] = []

    def make(publisher: Publisher, *, replay: bool = True, **settings: Any) -> KvEventsSource:
        source = KvEventsSource(
            publisher.endpoint, replay_endpoint=publisher.replay if replay else None, pod="vllm-0", **settings
        )
        made.append(source)
        source.poll(0)
        publisher.wait_for_subscriber()
        return source

    yield make
    for source in made:
        source.close()


def collect(source: KvEventsSource, count: int, seconds: float = PATIENCE_SECONDS) -> list[KvEventBatch]:
    """The next `count` batches; fewer only where they do not come in time."""
    found: list[KvEventBatch] = []
    deadline = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < deadline:
        records = source.poll(count - len(found))
        assert all(isinstance(record, KvEventBatch) for record in records)
        found += records  # type: ignore[arg-type]
        if not records:
            time.sleep(0.01)
    return found


def view_of(batches: list[KvEventBatch]) -> KvCacheView:
    view = KvCacheView()
    for batch in batches:
        view.apply(batch)
    return view


def told(batches: list[KvEventBatch]) -> list[tuple[int, bool]]:
    return [(batch.sequence, batch.continues) for batch in batches]


def some(count: int, first: int = 0, at: float = 100.0) -> list[bytes]:
    return [payload(at + number, stored(number)) for number in range(first, first + count)]


# --- the wire --------------------------------------------------------------------------------------------------------


EVENTS = [
    stored(1, 2**64 - 1, parent_block_hash=7, medium="CPU", group_idx=2, token_ids=[5], lora_id=None, new_key="x"),
    stored(3),
    removed(1, medium="CPU", group_idx=2),
    {"type": "AllBlocksCleared"},
]


@pytest.mark.parametrize("as_sent", [lambda event: event, positional], ids=["maps", "arrays"])
def test_both_wire_formats_tell_the_same(as_sent: Callable[[dict[str, Any]], Any]) -> None:
    batch = decode_batch(payload(12.5, *map(as_sent, EVENTS), rank=3))
    assert (batch.time_seconds, batch.rank, batch.unknown) == (12.5, 3, 0)
    assert batch.events == (
        KvBlocksStored(block_hashes=(1, 2**64 - 1), parent_hash=7, block_tokens=16, medium="CPU", group=2),
        KvBlocksStored(block_hashes=(3,), block_tokens=16),
        KvBlocksRemoved(block_hashes=(1,), medium="CPU", group=2),
        KvCacheCleared(),
    )


def test_the_shortest_arrays_of_old_engines_and_what_is_not_known() -> None:
    batch = decode_batch(
        payload(1.0, ["BlockStored", [-1], None, [], 16, None], ["BlockRemoved", [5]], ["New", 1], rank=None)
    )
    assert batch.events == (
        KvBlocksStored(block_hashes=(2**64 - 1,), block_tokens=16),
        KvBlocksRemoved(block_hashes=(5,)),
    )
    assert (batch.rank, batch.unknown) == (0, 1)


def test_a_hash_as_bytes_is_the_number_that_vllm_publishes_by_default() -> None:
    whole = bytes(range(32))  # a sha256
    number = int.from_bytes(whole[-8:], "big")
    assert decode_batch(payload(1.0, stored(whole))).events == decode_batch(payload(1.0, stored(number))).events


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=9)
        | st.binary(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["type", "block_hashes", "medium", "block_size", "group_idx"]), inner, max_size=5
            )
            | st.just(["BlockStored"])
            | st.just({"type": "BlockStored"})
        ),
        max_leaves=12,
    ).map(msgpack.packb)
)
def test_any_bytes_are_a_batch_or_an_error(data: bytes) -> None:
    try:
        batch = decode_batch(data)
    except WireError:
        return
    KvEventBatch(time_seconds=batch.time_seconds, sequence=0, continues=True, events=batch.events)


# --- the view --------------------------------------------------------------------------------------------------------


def batch_of(sequence: int, *events: Any, continues: bool = True) -> KvEventBatch:
    return KvEventBatch(
        time_seconds=1.0, sequence=sequence, continues=continues, events=decode_batch(payload(1.0, *events)).events
    )


def test_copies_are_counted_for_each_group_and_medium() -> None:
    view = KvCacheView()
    view.apply(batch_of(0, stored(1, 2), stored(1), stored(1, medium="CPU"), stored(1, group_idx=1), continues=False))
    assert (view.blocks(), view.blocks("CPU"), view.blocks(group=1)) == ({1, 2}, {1}, {1})
    assert view.copies() == 4
    view.apply(batch_of(1, removed(1), removed(9)))
    assert view.blocks() == {1, 2}
    view.apply(batch_of(2, removed(1)))
    assert (view.blocks(), view.blocks("CPU"), view.blocks(group=1)) == ({2}, {1}, {1})
    view.apply(batch_of(3, {"type": "AllBlocksCleared"}, stored(5)))
    assert (view.blocks(), view.blocks("CPU")) == ({5}, {1})


def lru_engine(requests: int, capacity: int, *, reports: str = "") -> Iterator[tuple[KvEventBatch, set[int]]]:
    """What an engine with an LRU cache publishes at each admission, and what it then holds.

    Ten requests in a row share their first four blocks. `reports`: how those found in the cache are told as well,
    "apart" in an event of their own as vLLM does under `kv_cache_report_mode` "full", or "together" with the new ones.
    """
    cached: OrderedDict[int, None] = OrderedDict()
    for number in range(requests):
        shared = [1_000 * (number // 10) + place + 1 for place in range(4)]
        own = [10**9 + 100 * number + place for place in range(4)]
        found = shared if number % 10 else []
        new = [block for block in (*shared, *own) if block not in found]
        for block in found:
            del cached[block]
        evicted = [cached.popitem(last=False)[0] for _ in range(len(cached) + len(found) + len(new) - capacity)]
        cached |= dict.fromkeys(reversed(shared + own))
        events = [removed(*evicted)] if evicted else []
        if found and reports == "apart":
            events.append(stored(*found))
        together = found if reports == "together" else []
        events.append(stored(*together, *new, parent_block_hash=None if together or not found else found[-1]))
        yield batch_of(number, *events, continues=number > 0), set(cached)


@pytest.mark.parametrize("reports", ["", "apart"])
def test_blocks_that_are_reported_again_are_no_copies(reports: str) -> None:
    view = KvCacheView()
    for batch, cached in lru_engine(400, 99, reports=reports):
        view.apply(batch)
        assert view.blocks() == cached
        assert view.copies() == len(cached)
    assert KvCacheView.restored(json.loads(json.dumps(view.save()))).blocks() == view.blocks()


def test_more_blocks_than_the_engine_has_cannot_be_copies() -> None:
    """Whatever form reports have: once they are more than the engine holds, stored again means reported again."""
    view = KvCacheView()
    batches = list(lru_engine(400, 99, reports="together"))
    for batch, _ in batches[:200]:
        view.apply(batch)
        view.bound(100)
    for batch, cached in batches[200:]:
        view.apply(batch)
        view.bound(100)
        assert view.blocks() >= cached
    # What was counted twice before stays until the engine stores it anew.
    assert len(view.blocks() - batches[-1][1]) <= 40


def test_a_copy_of_a_prompts_last_block_stays_a_copy_beside_reports() -> None:
    """A prompt that is cached whole computes its last block again, behind those before it."""
    view = KvCacheView()
    view.apply(batch_of(0, stored(1, 2, 3), stored(1, 2), stored(3, parent_block_hash=2), continues=False))
    assert view.copies() == 4
    view.apply(batch_of(1, removed(3)))
    assert view.blocks() == {1, 2, 3}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60), st.data())
def test_after_a_loss_the_view_never_holds_more_than_the_cache(changes: list[tuple[bool, int]], data: Any) -> None:
    """Whatever is lost: what the view holds is in the cache."""
    copies: list[int] = []
    batches = []
    for is_stored, block in changes:
        if is_stored:
            copies.append(block)
        elif block in copies:
            copies.remove(block)
        else:
            continue
        batches.append(batch_of(len(batches), stored(block) if is_stored else removed(block)))
    lost = data.draw(st.integers(0, len(batches)))
    until = data.draw(st.integers(lost, len(batches)))
    kept = batches[:lost] + batches[until:]
    view = view_of(
        [
            batch.model_copy(update={"continues": number > 0 and kept[number - 1].sequence + 1 == batch.sequence})
            for number, batch in enumerate(kept)
        ]
    )
    if lost < until < len(batches):
        assert view.blocks() <= set(copies)
        assert not view.exact
    elif lost == until:
        assert view.blocks() == set(copies)


# --- the source ------------------------------------------------------------------------------------------------------


def test_batches_come_once_and_in_order(publish: Any, subscribe: Any) -> None:
    publisher = publish()
    source = subscribe(publisher)
    publisher.send(*some(20))
    batches = collect(source, 20)
    assert told(batches) == [(0, False), *((number, True) for number in range(1, 20))]
    assert {(batch.pod, batch.engine) for batch in batches} == {("vllm-0", "0")}
    assert source.last_record_seconds == 119.0
    assert source.rejected() == {}
    assert source.trouble == ""


def test_a_late_start_is_filled_by_replay(publish: Any, subscribe: Any) -> None:
    publisher = publish()
    publisher.send(*some(10))
    source = subscribe(publisher)
    assert [batch.sequence for batch in collect(source, 10)] == list(range(10))  # although the engine is silent now
    publisher.send(*some(3, first=10))
    batches = collect(source, 3)
    assert told(batches) == [(10, True), (11, True), (12, True)]


def test_lost_batches_are_filled_by_replay(publish: Any, subscribe: Any) -> None:
    publisher = publish(lose=(3, 4, 8))
    source = subscribe(publisher)
    publisher.send(*some(10))
    batches = collect(source, 10)
    assert told(batches) == [(0, False), *((number, True) for number in range(1, 10))]
    assert source.rejected() == {}
    assert view_of(batches).exact


def test_what_cannot_be_had_is_told(publish: Any, subscribe: Any) -> None:
    publisher = publish(lose=(3, 4))
    source = subscribe(publisher, replay=False)
    publisher.send(*some(8))
    batches = collect(source, 6)
    assert told(batches) == [(0, False), (1, True), (2, True), (5, False), (6, True), (7, True)]
    assert source.rejected() == {"missed-batch": 2}
    view = view_of(batches)
    assert (view.exact, view.blocks()) == (False, {5, 6, 7})


def test_a_replay_buffer_that_is_too_short_fills_what_it_has(publish: Any, subscribe: Any) -> None:
    publisher = publish(keep=4)
    publisher.send(*some(10))
    source = subscribe(publisher)
    assert told(collect(source, 4)) == [(6, False), (7, True), (8, True), (9, True)]
    assert source.rejected() == {"missed-batch": 6}


def test_what_a_replay_has_brought_is_not_asked_for_again(publish: Any, subscribe: Any) -> None:
    publisher = publish()
    source = subscribe(publisher)
    publisher.send(*some(5))
    collect(source, 5)
    wait_until(lambda: len(publisher.replays) > 0)  # that of the first connection
    asked = len(publisher.replays)
    publisher.send_again()
    publisher.send(payload(200.0, stored(9)))
    assert told(collect(source, 1)) == [(5, True)]
    assert len(publisher.replays) == asked


@pytest.mark.parametrize("batches_after", [2, 5, 6, 9])
def test_an_engine_that_begins_anew(publish: Any, subscribe: Any, batches_after: int) -> None:
    """Also where the new process has published as many batches as the old one, or more, before we are back."""
    old = publish()
    source = subscribe(old)
    old.send(*some(6))
    collect(source, 6)
    old.close()
    wait_until(lambda: "lost" in source.trouble)
    new = publish(endpoint=old.endpoint, replay=old.replay, before=tuple(some(batches_after, first=100, at=1_000.0)))
    new.wait_for_subscriber()
    batches = collect(source, batches_after)
    assert told(batches) == [(0, False), *((number, True) for number in range(1, batches_after))]
    assert source.rejected() == {}
    assert source.trouble == ""
    view = view_of(batches)
    assert (view.exact, view.blocks()) == (True, set(range(100, 100 + batches_after)))


def test_without_replay_a_reconnect_is_a_loss(publish: Any, subscribe: Any) -> None:
    """The first batch that is seen of the new process may have the very number that was expected of the old one."""
    old = publish()
    source = subscribe(old, replay=False)
    old.send(*some(6))
    collect(source, 6)
    old.close()
    new = publish(endpoint=old.endpoint, replay=old.replay, lose=tuple(range(6)))
    new.wait_for_subscriber()
    new.send(*some(7, at=1_000.0))
    assert told(collect(source, 1)) == [(6, False)]


def test_a_damaged_batch_is_missing_and_counted(publish: Any, subscribe: Any) -> None:
    publisher = publish()
    source = subscribe(publisher, replay=False)
    publisher.send(*some(2), b"\xc1", *some(2, first=3))
    assert told(collect(source, 4)) == [(0, False), (1, True), (3, False), (4, True)]
    assert source.rejected() == {"bad-event": 1, "missed-batch": 1}


def test_engines_that_connect_to_us_are_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        source = KvEventsSource(endpoint, bind=True)
        source.poll(0)
        wait_until(lambda: "in use" in source.trouble)  # it tries again
    with zmq.Context() as context:
        engines = {}
        for pod in ("a", "b"):
            engines[pod] = context.socket(zmq.XPUB)
            engines[pod].linger = 0
            engines[pod].connect(endpoint)
            assert engines[pod].poll(5_000)
        for sequence in range(3):
            for pod, engine in engines.items():
                topic = f"kv@{pod}@model".encode()
                engine.send_multipart([topic, sequence.to_bytes(8, "big"), payload(10.0 + sequence, stored(sequence))])
        batches = collect(source, 6)
        for pod, engine in engines.items():
            assert told([batch for batch in batches if batch.pod == pod]) == [(0, False), (1, True), (2, True)]
            engine.close()
    source.close()


@pytest.mark.parametrize(
    ("topic", "given", "bind", "pod"),
    [
        ("kv@vllm-3@m", "", False, "vllm-3"),
        ("kv@vllm-3@m", "vllm-0", False, "vllm-0"),  # the settings hold
        ("kv@10.42.0.7:8000@Qwen/Qwen3-32B", "vllm-0", False, "vllm-0"),
        ("kv@10.42.0.7:8000@Qwen/Qwen3-32B", "", False, "10.42.0.7:8000"),
        ("kv@chat/vllm-3@m", "", False, "vllm-3"),
        ("kv-events", "vllm-0", False, "vllm-0"),
        ("kv@vllm-3@m", "vllm-0", True, "vllm-3"),  # one of many that connect
        ("kv@10.42.0.7@m", "vllm-0", True, "vllm-0"),
        ("kv@[fd00::7]:8000@m", "vllm-0", True, "vllm-0"),
        ("kv@fd00::7@m", "vllm-0", True, "vllm-0"),
    ],
)
def test_whose_events_they_are(topic: str, given: str, bind: bool, pod: str) -> None:
    source = KvEventsSource("tcp://127.0.0.1:1", pod=given, bind=bind)
    assert source._pod_of(topic.encode()) == pod


def test_closing_ends_the_thread_and_the_records(publish: Any, subscribe: Any) -> None:
    publisher = publish()
    source = subscribe(publisher)
    publisher.send(*some(5))
    collect(source, 1)
    source.close()
    source.close()
    assert source.poll(10) == []
    assert not source._thread.is_alive()


@pytest.mark.parametrize("as_sent", [lambda event: event, positional], ids=["maps", "arrays"])
def test_a_recording_published_again(publish: Any, subscribe: Any, as_sent: Callable[[dict[str, Any]], Any]) -> None:
    """The second half with losses: the view is the recorded engine's cache, block for block."""
    recorded = [row["batch"] for row in read_kv_events(RECORDING)]
    copies: list[int] = []
    for _, events, _ in recorded:
        for event in events:
            if event["type"] == "BlockStored":
                copies += event["block_hashes"]
            else:
                for block in event["block_hashes"]:
                    copies.remove(block)
    half = len(recorded) // 2
    publisher = publish(lose=tuple(range(half + 7, len(recorded) - 1, 50)))
    batches = [payload(at, *map(as_sent, events), rank=rank) for at, events, rank in recorded]
    publisher.send(*batches[:half])
    source = subscribe(publisher)
    publisher.send(*batches[half:])
    found = collect(source, len(recorded))
    assert [batch.sequence for batch in found] == list(range(len(recorded)))
    view = view_of(found)
    assert (view.exact, view.blocks(), view.copies()) == (True, set(copies), len(copies))
    assert view.copies() < 400  # the engine's blocks, of which one is vLLM's null block
    assert source.rejected() == {}


def test_going_on_after_a_restart(publish: Any, subscribe: Any) -> None:
    """Nothing twice, nothing lost, whatever was fetched and not handed out; a new engine is told from the old."""
    publisher = publish()
    first = subscribe(publisher)
    publisher.send(*some(8))
    assert told(collect(first, 5)) == [(0, False), *((number, True) for number in range(1, 5))]
    positions = json.loads(json.dumps(first.positions()))
    first.close()
    publisher.send(*some(3, first=8, at=108.0))
    second = KvEventsSource(publisher.endpoint, replay_endpoint=publisher.replay)
    second.seek(positions)
    try:
        assert told(collect(second, 6)) == [(number, True) for number in range(5, 11)]
    finally:
        second.close()
    anew = publish()
    anew.send(*some(9, at=1_000.0))
    third = KvEventsSource(anew.endpoint, replay_endpoint=anew.replay)
    third.seek(positions)
    try:
        assert told(collect(third, 9)) == [(0, False), *((number, True) for number in range(1, 9))]
    finally:
        third.close()
