"""Ends of requests completed with the hashes of their answers, as KV events tell them."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from effort import examples
from kavier_twin.mirror.answers import MOST_REQUESTS, REMEMBERED_SECONDS, Answers
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import KvBlocksRemoved, KvBlocksStored, KvEventBatch, RequestFinished, RequestSeen

BLOCK = 16


def seen(name: str, time: float, prompt: int, hashes: tuple[int, ...], pod: str | None = "a") -> RequestSeen:
    return RequestSeen(
        id=name, time_seconds=time, prompt_tokens=prompt, block_hashes=hashes, block_tokens=BLOCK, pod=pod
    )


def ended(name: str, time: float, output: int, e2e: float) -> RequestFinished:
    return RequestFinished(
        id=name, time_seconds=time, output_tokens=output, e2e_seconds=e2e, ttft_seconds=0.0, cached_tokens=0
    )


def stored(time: float, parent: int | None, *blocks: int, pod: str = "a", group: int = 0) -> KvEventBatch:
    event = KvBlocksStored(block_hashes=blocks, parent_hash=parent, block_tokens=BLOCK, group=group)
    return KvEventBatch(time_seconds=time, pod=pod, sequence=int(time * 1000), continues=True, events=(event,))


def test_a_chain_leads_through_the_answer() -> None:
    answers = Answers()
    answers.take(stored(1.0, None, 1, 2))
    answers.seen(seen("x", 0.9, 40, (1, 2)))
    answers.take(stored(1.2, 2, 3))
    answers.take(stored(1.9, 3, 4))
    assert answers.finished(ended("x", 2.0, 24, 1.1)).block_hashes == (1, 2, 3)  # its 64th token went through no step
    answers.seen(seen("x", 0.9, 40, (1, 2)))
    assert answers.finished(ended("x", 2.0, 25, 1.1)).block_hashes == (1, 2, 3, 4)
    answers.seen(seen("y", 0.9, 40, (1, 2)))
    assert answers.finished(ended("y", 2.0, 25, 1.1)).block_hashes == ()  # they are another's


def test_a_record_that_has_hashes_keeps_them() -> None:
    answers = Answers()
    answers.take(stored(1.0, 2, 3))
    answers.seen(seen("x", 0.9, 40, (1, 2)))
    whole = ended("x", 2.0, 24, 1.1).model_copy(update={"block_hashes": (1, 2, 9)})
    assert answers.finished(whole) is whole


def test_of_several_children_the_one_that_was_due() -> None:
    """Two prompts that begin alike end in the same full block; each fills its next one at a time of its own."""
    answers = Answers()
    for name, time, prompt in (("late", 0.0, 33), ("early", 0.0, 47)):
        answers.seen(seen(name, time, prompt, (1, 2)))
    answers.take(stored(0.0, None, 1, 2))
    answers.take(stored(0.1, 2, 30))  # after one token of 0.1 s
    answers.take(stored(1.5, 2, 31))  # after fifteen
    assert answers.finished(ended("late", 2.0, 21, 2.0)).block_hashes == (1, 2, 31)
    assert answers.finished(ended("early", 2.0, 21, 2.0)).block_hashes == (1, 2, 30)


def test_other_pods_groups_and_times_tell_nothing() -> None:
    answers = Answers()
    answers.seen(seen("x", 100.0, 40, (1, 2)))
    for batch in (stored(50.0, 2, 3), stored(100.5, 2, 3, pod="b"), stored(100.5, 2, 3, group=1), stored(200.0, 2, 3)):
        answers.take(batch)
    assert answers.finished(ended("x", 101.0, 24, 1.0)).block_hashes == ()


@examples(50)
@given(seed=st.integers(0, 2**32))
def test_in_any_order_the_same_hashes(seed: int) -> None:
    """Arrival, end and events of one request, whichever comes first."""
    rng = random.Random(seed)
    records = [
        seen("x", 1.0, 40, (1, 2)),
        ended("x", 3.0, 40, 2.0),
        stored(1.0, None, 1, 2),
        stored(1.4, 2, 3),
        stored(2.2, 3, 4),
    ]
    batches = [record for record in records if isinstance(record, KvEventBatch)]
    rng.shuffle(records)
    order = iter(batches)  # an engine's events keep their order
    records = [next(order) if isinstance(record, KvEventBatch) else record for record in records]
    answers, found = Answers(), []
    answers.take(stored(0.0, 8, 9))
    for record in records:
        if isinstance(record, KvEventBatch):
            found += answers.take(record)
        elif isinstance(record, RequestSeen):
            found += [one for one in [answers.seen(record)] if one is not None]
        else:
            found.append(answers.finished(record))
        restored = Answers()
        restored.restore(answers.save())
        answers = restored
    assert found[-1].block_hashes == (1, 2, 3, 4) or not any(map(bool, found[:-1]))
    assert max(len(one.block_hashes) for one in found) == 4


def test_memory_is_bounded() -> None:
    answers = Answers()
    for number in range(MOST_REQUESTS + 100):
        answers.seen(seen(str(number), 1.0, 20, (number,)))
        answers.take(stored(1.0 + number, number, number + 1))
        answers.finished(ended(f"unknown-{number}", 1.0, 5, 1.0))
    saved = answers.save()
    assert len(saved["prompts"]) <= MOST_REQUESTS
    assert len(saved["incomplete"]) <= MOST_REQUESTS
    assert len(saved["stored"]) <= REMEMBERED_SECONDS + 1


def test_the_next_turn_finds_the_answer_in_the_mirrored_cache() -> None:
    engine = EngineSettings(block_size=BLOCK, num_gpu_blocks=100, max_num_seqs=4, max_num_batched_tokens=512)
    fleet = FleetSettings(engine=engine, step_time=StepTime(fixed=0.01))

    def cached(*events: KvEventBatch) -> float:
        mirror = Mirror(MirrorSettings(), fleet, calibrated=True)
        mirror.ingest(stored(0.0, None, 99))
        mirror.ingest(seen("first", 1.0, 40, (1, 2)))
        for batch in events:
            mirror.ingest(batch)
        mirror.ingest(ended("first", 3.0, 40, 2.0))
        mirror.ingest(seen("second", 10.0, 100, (1, 2, 3, 4, 5, 6)))
        mirror.advance(15.0)
        live = mirror.fold.running["second"]
        return int(mirror.fleet.state.requests[live.replica, live.slot]["cached"])

    assert cached() == 2 * BLOCK
    assert cached(stored(1.4, 2, 3), stored(2.2, 3, 4)) == 4 * BLOCK
    removed = KvBlocksRemoved(block_hashes=(7,))
    other = KvEventBatch(time_seconds=2.3, pod="a", sequence=9, continues=True, events=(removed,))
    assert cached(stored(1.4, 2, 3), other) == 3 * BLOCK
