"""Why prompt tokens were missed: the pass beside brute force over all requests before."""

from __future__ import annotations

import math
from collections import Counter
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kavier_twin.reuse.misses import Reason
from kavier_twin.reuse.simulated import watch_run
from kavier_twin.reuse.watch import Content, ReuseWatch
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.workload import Workload, make_workload

BLOCK = 4
CAPACITY = 9


class Served(NamedTuple):
    """A request of a small trace."""

    start: float
    end: float
    replica: int
    keys: list[int]
    prompt: int
    output: int
    cached: int


def chain_of(contents: list[int]) -> list[int]:
    return make_workload([0.0], 1, 1, chain=contents, chain_starts=[0, len(contents)]).chain.tolist()  # type: ignore[no-any-return]


@st.composite
def traces(draw: st.DrawFn) -> list[Served]:
    count = draw(st.integers(1, 25))
    times = draw(st.permutations(range(2 * count)))
    made = []
    for number in range(count):
        start, end = sorted(times[2 * number : 2 * number + 2])
        contents = draw(st.lists(st.integers(1, 2), min_size=0, max_size=5))
        prompt = len(contents) * BLOCK + draw(st.integers(0, BLOCK - 1))
        prompt = max(prompt, 1)
        cached = draw(st.integers(0, 6)) * BLOCK
        output = draw(st.integers(1, 9))
        made.append(Served(start, end, draw(st.integers(0, 2)), chain_of(contents), prompt, output, cached))
    return sorted(made)


class PlainReplica:
    """All blocks of one replica one by one: those in use, and the others from least to most recently used."""

    def __init__(self) -> None:
        self.order: list[int | str] = []
        self.holder: dict[int, int] = {}  # newest one
        self.private: dict[int, int] = {}  # blocks of running requests

    def admit(self, number: int, one: Served) -> None:
        for key in one.keys:
            self.order = [other for other in self.order if other != key]
            self.holder[key] = number
        self.private[number] = max(0, -(-(one.prompt + one.output // 2) // BLOCK) - len(one.keys))

    def end(self, number: int, one: Served) -> None:
        del self.private[number]
        self.order += [f"{number}/{block}" for block in range((one.prompt + one.output - 1) // BLOCK - len(one.keys))]
        for key in reversed(one.keys):
            if self.holder.get(key, number) == number:
                self.holder.pop(key, None)
                self.order = [*(other for other in self.order if other != key), key]

    def state(self, key: int) -> str:
        if key in self.holder:
            return "in use"
        if key not in self.order:
            return "unknown"
        above = len(self.holder) + sum(self.private.values()) + len(self.order) - self.order.index(key)
        return "cached" if above <= CAPACITY else "evicted"


def brute_force(trace: list[Served]) -> Counter[Reason]:
    """Every missed token by itself."""
    replicas: dict[int, PlainReplica] = {}
    missed: Counter[Reason] = Counter()
    events = [(one.start, 1, at) for at, one in enumerate(trace)] + [(one.end, 0, at) for at, one in enumerate(trace)]
    for _, starts, at in sorted(events):
        one = trace[at]
        own = replicas.setdefault(one.replica, PlainReplica())
        if not starts:
            own.end(at, one)
            continue
        keys = one.keys[: (one.prompt - 1) // BLOCK]
        reasons = [{"in use": Reason.COMPUTING, "unknown": None}.get(own.state(key), Reason.EVICTED) for key in keys]
        for unknown, run in groupby(list(enumerate(reasons)), lambda place: place[1] is None):
            places = [place for place, _ in run]
            if unknown:
                others = [other for number, other in replicas.items() if number != one.replica]
                for block, reason in zip(places, elsewhere(others, [keys[at] for at in places]), strict=True):
                    reasons[block] = reason
        for token in range(min(one.cached, one.prompt), one.prompt):
            block = token // BLOCK
            if block >= (one.prompt - 1) // BLOCK:
                missed[Reason.PARTIAL_BLOCK] += 1
            else:
                missed[reasons[block] or Reason.FIRST_SEEN if block < len(keys) else Reason.FIRST_SEEN] += 1
        own.admit(at, one)
    return missed


def elsewhere(others: list[PlainReplica], keys: list[int]) -> list[Reason]:
    """As the replica with most of the blocks tells."""
    meaning = {"unknown": Reason.FIRST_SEEN, "evicted": Reason.EVICTED}
    knowing = [other for other in others if other.state(keys[0]) != "unknown"]
    told = [[meaning.get(other.state(key), Reason.OTHER_REPLICA) for key in keys] for other in knowing]
    nothing = [Reason.FIRST_SEEN] * len(keys)
    return max(told, key=lambda reasons: reasons.count(Reason.OTHER_REPLICA), default=nothing)


@settings(deadline=None)
@given(traces())
def test_reasons_are_those_of_brute_force_and_sum_to_all_that_was_missed(trace: list[Served]) -> None:
    watch = ReuseWatch(BLOCK, CAPACITY + 1, window_seconds=math.inf, most_blocks=10**9)
    events = [(one.start, 1, at) for at, one in enumerate(trace)] + [(one.end, 0, at) for at, one in enumerate(trace)]
    for time, starts, at in sorted(events):
        one = trace[at]
        content = Content(np.array(one.keys, np.uint64), BLOCK, BLOCK * len(one.keys))
        if starts:
            watch.admitted(at, time, one.replica, one.prompt, content, one.output)
        else:
            watch.ended(at, time, one.cached, one.output, content)
    total = watch.misses.total
    assert total.prompt == sum(one.prompt for one in trace) == total.hit + sum(total.missed.values())
    assert +total.missed == brute_force(trace)
    assert total.missed[Reason.EVICTED] == sum(watch.misses.evicted_by_age)
    apart = [*watch.misses.applications.values(), watch.misses.other_applications]
    assert sum(one.prompt for one in apart) == total.prompt
    assert sum((one.missed for one in apart), Counter()) == +total.missed


def fleet(**engine: object) -> FleetSettings:
    return FleetSettings(
        replicas=2,
        router="round_robin",
        engine=EngineSettings(**{"num_gpu_blocks": 60, "max_model_len": 4_096, **engine}),  # type: ignore[arg-type]
        step_time=StepTime(fixed=0.01, per_prefill_token=1e-4),
    )


def shared_prefixes(requests: int) -> Workload:
    rng = np.random.default_rng(4)
    contents = [[group, group + 10, *rng.integers(100, 10**6, 4)] for group in rng.integers(1, 9, requests)]
    return make_workload(
        np.cumsum(rng.exponential(0.3, requests)),
        100,
        20,
        chain=np.concatenate(contents),
        chain_starts=np.arange(requests + 1) * 6,
        hash_tokens=16,
        covered=96,
    )


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_simulated_run_is_explained_to_the_token(prefix_caching: bool) -> None:
    settings, workload = fleet(prefix_caching=prefix_caching), shared_prefixes(300)
    outcomes = simulate(settings, workload).collect()
    watch = ReuseWatch(16, 60, prefix_caching=prefix_caching, window_seconds=math.inf)
    watch_run(watch, workload, outcomes)
    total = watch.misses.total
    assert (total.requests, total.prompt, total.hit) == (300, 30_000, int(outcomes["cached"].sum()))
    assert sum(total.missed.values()) == total.prompt - total.hit
    expected = {Reason.FIRST_SEEN, Reason.EVICTED, Reason.OTHER_REPLICA, Reason.PARTIAL_BLOCK}
    assert set(+total.missed) == (expected if prefix_caching else {Reason.CACHING_OFF})
    assert len(watch.misses.applications) == 8


def test_what_a_restart_lost_is_told_apart_from_what_was_evicted() -> None:
    watch = ReuseWatch(BLOCK, 101, window_seconds=math.inf)
    content = Content(np.array(chain_of([1, 2, 3]), np.uint64), BLOCK, 12)
    watch.admitted("before", 0.0, 0, 13, content, 1)
    watch.ended("before", 1.0, 0, 1, content)
    watch.admitted("cut off", 2.0, 0, 13, content, 1)
    watch.restarted(0, 3.0)
    watch.admitted("after", 4.0, 0, 13, content, 1)
    watch.ended("cut off", 5.0, 12, 1, content)
    watch.ended("after", 5.0, 0, 1, content)
    assert watch.misses.total.requests == 2
    assert +watch.misses.total.missed == Counter({Reason.FIRST_SEEN: 12, Reason.LOST: 12, Reason.PARTIAL_BLOCK: 2})
