"""A fixed number of users: the loop is closed, exact over several replicas, and its jump is the reference."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effort import examples
from kavier_twin.simulation.closed_loop import simulate_closed_loop, simulate_sessions
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.state import Records
from kavier_twin.simulation.workload import Workload, make_workload, take_rows

STEP_TIME = StepTime(
    fixed=0.0083,
    per_prefill_token=2.71e-5,
    per_decode_sequence=2.3e-5,
    per_context_token=6.5e-7,
    per_prefill_attention=8.8e-10,
    linear_layers=((1.0, 0.001), (64.0, 0.0013), (512.0, 0.004)),
)


class Loop(NamedTuple):
    fleet: FleetSettings
    workload: Workload
    users: int
    think: np.ndarray
    frontend: float

    def run(self, stepping: bool = False) -> Records:
        fleet = simulate_closed_loop(
            self.fleet, self.workload, self.users, self.think, frontend_seconds=self.frontend, stepping=stepping
        )
        outcomes = fleet.collect()
        assert fleet.idle
        return outcomes[np.argsort(outcomes["index"], kind="stable")]


@st.composite
def loops(draw: st.DrawFn) -> Loop:
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    engine = EngineSettings(
        block_size=draw(st.sampled_from([4, 16])),
        num_gpu_blocks=draw(st.integers(60, 200)),
        max_num_seqs=draw(st.integers(1, 12)),
        max_num_batched_tokens=draw(st.sampled_from([64, 512])),
        async_scheduling=draw(st.booleans()),
        prefix_caching=draw(st.booleans()),
    )
    fleet = FleetSettings(
        engine=engine,
        step_time=STEP_TIME,
        replicas=draw(st.integers(1, 4)),
        router=draw(st.sampled_from(["round_robin", "least_loaded", "session_affinity", "prefix_aware"])),
    )
    prompt = rng.integers(1, 120, count)
    blocks = prompt // engine.block_size
    starts = np.concatenate([[0], np.cumsum(blocks)])
    workload = make_workload(
        np.sort(rng.random(count)) * draw(st.sampled_from([0.0, 0.3])),
        prompt,
        rng.integers(1, 60, count),
        chain=rng.integers(1, 4, int(starts[-1]), dtype=np.uint64),
        chain_starts=starts,
        hash_tokens=engine.block_size,
        covered=blocks * engine.block_size,
    )
    think = rng.exponential(draw(st.sampled_from([0.0, 0.05, 2.0])), count)
    return Loop(fleet, workload, draw(st.integers(1, 14)), think, draw(st.sampled_from([0.0, 0.004])))


@given(loop=loops())
@examples(60)
def test_the_jump_is_the_reference(loop: Loop) -> None:
    jumped, stepped = loop.run(), loop.run(stepping=True)
    for name in ("index", "replica", "status", "cached", "preemptions"):
        assert np.array_equal(jumped[name], stepped[name]), name
    for name in ("arrival", "scheduled", "first_token", "finish"):
        assert np.allclose(jumped[name], stepped[name], rtol=1e-9, atol=0.0), name


@given(loop=loops())
@examples(60)
def test_no_replica_overtakes_an_end(loop: Loop) -> None:
    """The arrivals that the loop made, given as an open load, lead to the very same run.

    Users think a moment at least: of an arrival at the very time of an end, the last digit would say which is first.
    """
    loop = loop._replace(think=loop.think + 1e-6)
    outcomes = loop.run()
    order = np.lexsort((outcomes["index"], outcomes["arrival"]))
    arrivals = outcomes["arrival"][order]
    again = take_rows(loop.workload, order)._replace(arrival=arrivals, delivered=arrivals + loop.frontend)
    replayed = simulate(loop.fleet, again).collect()
    replayed = replayed[np.argsort(replayed["index"], kind="stable")]
    for name in ("replica", "cached", "preemptions"):
        assert np.array_equal(outcomes[name], replayed[name]), name
    for name in ("scheduled", "first_token", "finish"):
        assert np.allclose(outcomes[name], replayed[name], rtol=1e-9, atol=0.0), name


@given(loop=loops())
@examples(60)
def test_users_wait_and_think(loop: Loop) -> None:
    """Every request but the users' first comes one think time after an end, and as long as there are any, all users
    are busy or thinking."""
    given_arrivals = loop.workload.arrival.copy()
    outcomes = loop.run()
    assert np.array_equal(loop.workload.arrival, given_arrivals)  # the caller's arrays are his own
    assert (outcomes["status"] == 0).all()
    count, users = outcomes.size, min(loop.users, outcomes.size)
    assert np.array_equal(outcomes["arrival"][:users], given_arrivals[:users])
    ends = np.sort(outcomes["finish"])
    assert np.allclose(outcomes["arrival"][users:] - loop.think[users:], ends[: count - users], rtol=1e-12)
    times = np.concatenate([outcomes["arrival"], outcomes["finish"]])
    steps = np.concatenate([np.ones(count), -np.ones(count)])
    live = np.cumsum(steps[np.lexsort((steps, times))])  # of ends and arrivals at one time, ends come first
    assert live.max() <= users


def test_without_thinking_all_users_are_always_waiting() -> None:
    count, users = 60, 7
    workload = make_workload(np.zeros(count), 64, np.random.default_rng(3).integers(5, 50, count))
    fleet = FleetSettings(engine=EngineSettings(num_gpu_blocks=500), step_time=STEP_TIME)
    outcomes = Loop(fleet, workload, users, np.zeros(count), 0.0).run()
    for time in np.linspace(0.001, float(outcomes["arrival"].max()), 200):
        assert ((outcomes["arrival"] <= time) & (outcomes["finish"] > time)).sum() == users


@pytest.mark.parametrize(
    ("users", "think", "prompt", "what"),
    [
        (0, 0.0, 10, "0 users"),
        (1, -1.0, 10, "think"),
        (1, np.inf, 10, "think"),
        (1, 0.0, 5000, "never be served"),
        (1, 0.0, 800, "never be served"),
    ],
)
def test_refusals(users: int, think: float, prompt: int, what: str) -> None:
    engine = EngineSettings(num_gpu_blocks=50, max_model_len=4096)
    with pytest.raises(ValueError, match=what):
        simulate_closed_loop(
            FleetSettings(engine=engine, step_time=STEP_TIME), make_workload([0.0], prompt, 5), users, think
        )


@given(loop=loops(), sessions=st.integers(1, 12))
@examples(40)
def test_the_turns_of_a_session_wait_for_each_other(loop: Loop, sessions: int) -> None:
    """Turns come one think time after the end of the last, and the arrivals that follow lead to the same run."""
    count = loop.workload.index.size
    workload = loop.workload._replace(session=np.arange(count) % sessions)
    settings = loop.fleet.model_copy(update={"replicas": 1})
    outcomes = simulate_sessions(
        settings, workload, lambda row, end: end + loop.think[row], frontend_seconds=loop.frontend
    )
    assert outcomes["index"].tolist() == list(range(count))
    assert np.array_equal(outcomes["arrival"][:sessions], workload.arrival[:sessions])
    assert np.array_equal(outcomes["arrival"][sessions:], outcomes["finish"][:-sessions] + loop.think[sessions:])
    order = np.lexsort((outcomes["index"], outcomes["arrival"]))
    arrivals = outcomes["arrival"][order]
    again = take_rows(workload, order)._replace(arrival=arrivals, delivered=arrivals + loop.frontend)
    replayed = simulate(settings, again).collect()
    replayed = replayed[np.argsort(replayed["index"], kind="stable")]
    assert np.array_equal(outcomes["cached"], replayed["cached"])
    for name in ("scheduled", "first_token", "finish"):
        assert np.allclose(outcomes[name], replayed[name], rtol=1e-9, atol=0.0), name
