"""Pods that come, go, restart and are drained, in the mirror."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effort import examples
from kavier_twin.mirror import mirror_state
from kavier_twin.mirror.checkpoint_file import CheckpointError, Saved
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.mirror.replicas import replicas
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import EngineSample, RequestFinished, RequestSeen, TelemetryRecord

ENGINE = EngineSettings(block_size=16, num_gpu_blocks=3000, max_num_seqs=16, max_num_batched_tokens=1024)
FLEET = FleetSettings(engine=ENGINE, step_time=StepTime(fixed=0.01), replicas=2)
SETTINGS = MirrorSettings(ordering_seconds=2.0, pod_silent_seconds=60.0)
LONG = 40  # requests that the others must get before a pod counts as silent, for two pods


def seen(number: int, time_seconds: float, pod: str | None, **more: object) -> RequestSeen:
    hashes = {"block_hashes": tuple(range(1, 5)), "block_tokens": 16}
    return RequestSeen(id=f"r{number}", time_seconds=time_seconds, prompt_tokens=70, pod=pod, **(hashes | more))


def finished(number: int, time_seconds: float, tokens: int = 5) -> RequestFinished:
    return RequestFinished(id=f"r{number}", time_seconds=time_seconds, output_tokens=tokens)


def requests(first: int, count: int, start_seconds: float, pods: Iterable[str | None]) -> list[TelemetryRecord]:
    """One request a second, each of half a second, to the pods in turn."""
    names = list(pods)
    found: list[TelemetryRecord] = []
    for at in range(count):
        time_seconds = start_seconds + at
        found += [
            seen(first + at, time_seconds, names[at % len(names)]),
            finished(first + at, time_seconds + 0.5),
        ]
    return found


# Requests of this pool may run for minutes: none is given up for it.
A_LONG_ONE = [seen(90, 9.6, "a"), finished(90, 9.9, 20_000)]


def sample(pod: str, time_seconds: float, started: float | None, tokens: float = 0.0, rank: str = "0") -> EngineSample:
    return EngineSample(time_seconds=time_seconds, pod=pod, engine=rank, started_seconds=started, prompt_tokens=tokens)


def fed(records: Iterable[TelemetryRecord], mirror: Mirror | None = None, until: float | None = None) -> Mirror:
    mirror = mirror or Mirror(SETTINGS, FLEET)
    for record in records:
        mirror.ingest(record)
        mirror.advance()
    mirror.advance(until)
    return mirror


def alive(mirror: Mirror) -> list[int]:
    return mirror.fleet.state.replicas["alive"].tolist()


def received(mirror: Mirror) -> list[int]:
    return mirror.fleet.state.replicas["received"].tolist()


def test_the_first_pods_take_the_configured_places_and_more_join() -> None:
    mirror = fed(requests(0, 30, 0.0, ["b", "a", "c"]))
    assert mirror.pods.names() == {0: "b", 1: "a", 2: "c"}
    assert max(received(mirror)) - min(received(mirror)) <= 1
    assert [replica.pod for replica in replicas(mirror)] == ["b", "a", "c"]
    assert mirror.fleet.settings.replicas == 3  # what policies count from
    snapshot = mirror.snapshot()
    assert snapshot is not None
    assert snapshot.fleet.state.replicas.size == 3


def test_requests_run_where_the_record_says() -> None:
    mirror = fed(requests(0, 20, 0.0, ["a", "a", "a", "b"]))
    assert received(mirror) == [14, 4]  # the last two wait for the watermark; the router would have made it even


def test_a_silent_pod_leaves_while_others_speak() -> None:
    mirror = fed(requests(0, 20, 0.0, ["a", "b"]))
    fed(requests(100, 55, 20.0, ["a"]), mirror)
    assert alive(mirror) == [1, 1]  # not for so long
    fed(requests(200, 20, 80.0, ["a"]), mirror)
    assert alive(mirror) == [1, 0]
    assert mirror.pods.replica_of("b") is None
    assert mirror.fleet.settings.replicas == 1
    fed(requests(300, 4, 101.0, ["a", "c"]), mirror)  # the next one takes the place, with a cold cache
    assert alive(mirror) == [1, 1]
    assert mirror.pods.names() == {0: "a", 1: "c"}


def test_no_pod_leaves_because_nothing_came() -> None:
    """A broker that was away, or a night: silence of all says nothing of one."""
    mirror = fed(requests(0, 20, 0.0, ["a", "b"]))
    fed(requests(100, 10, 5_000.0, ["a"]), mirror)
    assert alive(mirror) == [1, 1]


def test_a_configured_replica_that_no_pod_claims_leaves() -> None:
    assert alive(fed(requests(0, 80, 0.0, ["a"]))) == [1, 0]
    assert alive(fed(requests(0, 80, 0.0, [None]))) == [1, 1]


def test_a_drained_pod_stays_until_its_requests_are_done() -> None:
    mirror = fed([*requests(0, 10, 0.0, ["a", "b"]), *A_LONG_ONE, seen(50, 10.0, "b")])
    fed(requests(100, 90, 11.0, ["a"]), mirror)
    assert mirror.fleet.state.replicas["accepting"].tolist() == [1, 0]
    assert alive(mirror) == [1, 1]
    fed([finished(50, 110.0), *requests(300, 10, 111.0, ["a"])], mirror)
    assert mirror.ingested["unknown_request"] == 0
    assert alive(mirror) == [1, 0]


def test_a_pod_that_speaks_again_before_it_is_gone_keeps_its_cache() -> None:
    mirror = fed([*requests(0, 10, 0.0, ["a", "b"]), *A_LONG_ONE, seen(50, 10.0, "b")])
    fed(requests(100, 90, 11.0, ["a"]), mirror)
    hits = int(mirror.fleet.state.replicas["hit_tokens"][1])
    fed(requests(300, 10, 111.0, ["b"]), mirror)
    assert mirror.fleet.state.replicas["accepting"].tolist() == [1, 1]
    assert mirror.fleet.state.replicas["hit_tokens"][1] >= hits + 7 * 64


@pytest.mark.parametrize("started", [True, False], ids=["process start", "counter reset"])
def test_a_restart_clears_the_cache_and_ends_what_ran(started: bool) -> None:
    """What reached the new process goes on there."""
    before = [sample("a", float(at), 0.0 if started else None, 10.0 * at) for at in range(0, 30, 5)]
    after = [sample("a", float(at), 32.0 if started else None, 1.0) for at in range(45, 65, 5)]
    stream = requests(0, 20, 0.0, ["a"])
    mirror = fed(sorted([*before, *stream, seen(50, 24.0, "a")], key=lambda record: record.time_seconds))
    hits = int(mirror.fleet.state.replicas["hit_tokens"][0])
    assert hits > 0
    later = [seen(60, 44.0, "a"), *after, finished(60, 76.0)]
    fed(later, mirror)
    fed([seen(61, 80.0, "a"), finished(61, 80.5), seen(62, 90.0, "b")], mirror)
    assert mirror.ingested["replica_restarted"] == 1  # r50
    assert mirror.load() == (0, 0, 0.0)
    fed([finished(50, 95.0), seen(63, 99.0, "b")], mirror)
    assert (mirror.ingested["not_simulated"], mirror.ingested["unknown_request"]) == (1, 0)


def test_the_cache_is_cold_after_a_restart() -> None:
    hits = []
    for process_start in (0.0, 20.0):
        mirror = fed([*requests(0, 10, 0.0, ["a"]), sample("a", 9.0, 0.0), sample("a", 30.0, process_start)])
        fed([seen(50, 70.0, "a"), finished(50, 71.0), seen(51, 80.0, "b")], mirror)
        hits.append(int(mirror.fleet.state.replicas["hit_tokens"][0]))
    assert hits[0] == hits[1] + 64


def test_data_parallel_ranks_are_replicas_of_one_pod() -> None:
    mirror = fed([*requests(0, 3, 0.0, ["a"]), sample("a", 2.0, 0.0, rank="0"), sample("a", 2.0, 0.0, rank="1")])
    fed(requests(10, 40, 40.0, ["a"]), mirror)
    assert mirror.pods.names() == {0: "a", 1: "a"}
    assert (mirror.pods.replica_of("a", "0"), mirror.pods.replica_of("a", "1")) == (0, 1)
    fed([seen(100 + at, 90.0 + at / 10, "a") for at in range(10)], mirror)
    fed([seen(200, 93.0, "a")], mirror)
    assert sorted(mirror.fleet.state.replicas["running"].tolist()) == [4, 5]


def test_a_rank_whose_place_was_given_away_does_not_come_back_to_it() -> None:
    """One rank of a silent pod is idle and leaves, the other still serves when the pod speaks again."""
    ranks = [sample("b", 2.0, 0.0, rank="0"), sample("b", 2.0, 0.0, rank="1")]
    mirror = fed([*requests(0, 4, 0.0, ["a"]), *ranks, *A_LONG_ONE, *requests(10, 30, 40.0, ["a", "b"])])
    fed([seen(50, 72.0, "b"), *requests(100, 130, 73.0, ["a"])], mirror)
    assert sorted(alive(mirror)) == [0, 1, 1]
    fed(requests(300, 4, 203.0, ["c"]), mirror)
    assert sorted(mirror.pods.names().values()) == ["a", "b", "c"]
    fed([*requests(400, 4, 208.0, ["b"]), sample("b", 210.0, 0.0, rank="0"), sample("b", 210.0, 0.0, rank="1")], mirror)
    fed(requests(500, 40, 212.0, ["a", "b", "c"]), mirror)
    assert sorted(mirror.pods.names().values()) == ["a", "b", "b", "c"]
    assert mirror.fleet.state.replicas["accepting"].tolist() == [1, 1, 1, 1]
    assert mirror.pods.replica_of("b", "0") != mirror.pods.replica_of("b", "1")


def test_more_pods_than_can_be_mirrored_are_counted() -> None:
    mirror = Mirror(MirrorSettings(most_replicas=3), FLEET)
    fed(requests(0, 50, 0.0, [f"pod-{number}" for number in range(10)]), mirror)
    assert mirror.fleet.state.replicas.size == 3
    assert mirror.ingested["too_many_pods"] > 20
    assert mirror.finished > 45


def test_a_request_that_outgrows_the_cache_leaves_no_trace() -> None:
    """Its slot is another's by the time its end is told."""
    small = FLEET.model_copy(update={"engine": ENGINE.model_copy(update={"num_gpu_blocks": 100})})
    long_one = [seen(90, 9.6, "a"), finished(90, 9.9, 1_400)]
    mirror = fed([*requests(0, 10, 0.0, ["a"]), *long_one, seen(50, 10.0, "a")], Mirror(SETTINGS, small))
    fed(requests(100, 60, 11.0, ["a"]), mirror)
    fed([seen(60, 71.0, "a"), finished(50, 71.2), seen(61, 74.0, "a")], mirror)
    assert mirror.ingested["not_simulated"] == 1
    assert mirror.load()[0] == 1
    fed([finished(60, 75.0), seen(62, 80.0, "a")], mirror)
    assert mirror.ingested["unknown_request"] == 0
    assert int(mirror.fleet.state.fleet["live"][0]) == 1


def test_a_request_that_is_no_longer_recent_still_ends() -> None:
    mirror = Mirror(MirrorSettings(recent_requests=5), FLEET)
    fed([seen(50, 0.0, "a"), *requests(100, 20, 1.0, ["a"]), finished(50, 22.0), seen(51, 30.0, "b")], mirror)
    assert mirror.finished == 21
    assert mirror.load()[0] == 0


def test_samples_do_not_pile_up_while_no_request_comes() -> None:
    mirror = Mirror(SETTINGS, FLEET)
    for at in range(5_000):
        mirror.ingest(sample("a", float(at), 0.0))
        mirror.advance(float(at))
    assert len(mirror.timeline.entries) < 1_000


# --- a function of the log ----------------------------------------------------------------------------------------


def story(seed: int) -> list[TelemetryRecord]:
    """Three pods, of which one goes, one restarts and one comes, told by stream and metrics, in order of time."""
    rng = random.Random(seed)
    records: list[TelemetryRecord] = []
    for at in range(300):
        time_seconds = at * 0.7
        pods = ["a", "b"] if time_seconds < 60.0 else ["a", "c"]
        records.append(seen(at, time_seconds, rng.choice([*pods, None]), block_hashes=(rng.randrange(9), 50 + at)))
        if rng.random() < 0.95:
            seconds = rng.uniform(0.1, 20.0)
            records.append(finished(at, time_seconds + seconds, int(seconds / 0.01)))
    records.append(seen(999, 94.5, "a"))  # under way when its pod begins anew
    records += [seen(998, 5.3, "a"), finished(998, 25.0, 20_000)]  # lest such a one be given up
    for at in range(0, 200, 5):
        started = 0.0 if at < 100 else 95.0
        records.append(sample("a", float(at), started, at if at < 100 else at - 95.0))
    return sorted(records, key=lambda record: record.time_seconds)


def digest(mirror: Mirror) -> tuple[object, ...]:
    arrays = tuple(array.tobytes() for array in mirror.fleet.state)
    return arrays, mirror.pods.save(), mirror.finished


@examples(10)
@given(seed=st.integers(0, 2**32), duplicates=st.integers(0, 40))
def test_order_within_the_lateness_and_duplicates_change_nothing(seed: int, duplicates: int) -> None:
    records = story(5)
    rng = random.Random(seed)

    def arrives(record: TelemetryRecord) -> float:
        late = 20.0 if isinstance(record, EngineSample) else 1.9  # metrics come later than requests
        return record.time_seconds + rng.uniform(0.0, late)

    shuffled = sorted(records, key=arrives)
    for _ in range(duplicates):
        at = rng.randrange(len(shuffled))
        shuffled.insert(at + 1, shuffled[at])
    plain, other = fed(records, until=400.0), fed(shuffled, until=400.0)
    assert digest(other) == digest(plain)
    assert plain.ingested["replica_restarted"] > 0
    assert plain.pods.names() == {0: "a", 1: "c"} or 2 in plain.pods.names()


def test_a_checkpoint_goes_on_as_if_nothing_had_been() -> None:
    records = story(6)
    for cut in (100, 300, 500):
        first = fed(records[:cut])
        saved = mirror_state.save(first)
        arrays = {name: array.copy() for name, array in saved.arrays.items()}
        again = mirror_state.restore(Saved(saved.document, arrays), SETTINGS, FLEET)
        assert digest(fed(records[cut:], again)) == digest(fed(records))
    with pytest.raises(CheckpointError, match="settings of the fleet have changed"):
        mirror_state.restore(Saved(saved.document, arrays), SETTINGS, FLEET.model_copy(update={"replicas": 3}))
