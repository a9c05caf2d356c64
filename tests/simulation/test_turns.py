"""Turns among an open load: none comes before the answer it waits for, and nothing overtakes one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effort import examples
from kavier_twin.simulation.closed_loop import simulate_sessions
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.lifecycle import Restart
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import EngineSettings, FleetSettings
from kavier_twin.simulation.state import FINISHED, Records
from kavier_twin.simulation.turns import Turns
from kavier_twin.simulation.workload import make_workload, take_rows
from simulation.test_closed_loop import STEP_TIME, Loop, loops

BIT_FOR_BIT = ("index", "replica", "status", "cached", "preemptions")
TIMES = ("arrival", "scheduled", "first_token", "finish")


class Sessions(NamedTuple):
    """A closed loop's fleet and requests, with a session of each, in the order of the workload."""

    loop: Loop
    session: npt.NDArray[np.int64]

    @property
    def turns(self) -> Turns:
        after = np.full(self.session.size, -1)
        last: dict[int, int] = {}
        for row, session in enumerate(self.session.tolist()):
            after[row] = last.get(session, -1)
            last[session] = row
        return Turns(after, self.loop.think, self.loop.frontend)

    def fleet(self, stepping: bool = False) -> Fleet:
        workload = self.loop.workload
        fleet = Fleet(self.loop.fleet, stepping=stepping)
        fleet.feed_sessions(workload._replace(delivered=workload.arrival + self.loop.frontend), self.turns)
        return fleet

    def run(self, stepping: bool = False) -> Records:
        fleet = self.fleet(stepping)
        fleet.run()
        assert fleet.idle
        return by_index(fleet.collect())


def by_index(outcomes: Records) -> Records:
    return outcomes[np.argsort(outcomes["index"], kind="stable")]


def alike(a: Records, b: Records) -> None:
    for name in BIT_FOR_BIT:
        assert np.array_equal(a[name], b[name]), name
    for name in TIMES:
        assert np.allclose(a[name], b[name], rtol=1e-9, atol=0.0), name


@st.composite
def sessions(draw: st.DrawFn) -> Sessions:
    loop = draw(loops())
    # An arrival at the very end of a batch is part of the next one or not by the rounding of that end.
    loop = loop._replace(think=loop.think + 1e-6)
    count = loop.workload.index.size
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Sessions(loop, rng.integers(0, draw(st.integers(1, count + 3)), count))


@given(given_sessions=sessions())
@examples(60)
def test_a_turn_comes_when_its_user_has_read_the_answer(given_sessions: Sessions) -> None:
    """And the arrivals that follow, as an open load, lead to the very same run: no replica overtook an end."""
    loop, turns = given_sessions.loop, given_sessions.turns
    outcomes = given_sessions.run()
    assert outcomes["index"].tolist() == list(range(turns.after.size))
    first, later = turns.after < 0, turns.after >= 0
    assert np.array_equal(outcomes["arrival"][first], loop.workload.arrival[first])
    assert np.array_equal(outcomes["arrival"][later], outcomes["finish"][turns.after[later]] + loop.think[later])
    order = np.lexsort((outcomes["index"], outcomes["arrival"]))
    arrivals = outcomes["arrival"][order]
    again = take_rows(loop.workload, order)._replace(arrival=arrivals, delivered=arrivals + loop.frontend)
    alike(outcomes, by_index(simulate(loop.fleet, again).collect()))


@given(given_sessions=sessions())
@examples(40)
def test_the_jump_is_the_reference(given_sessions: Sessions) -> None:
    alike(given_sessions.run(), given_sessions.run(stepping=True))


@given(given_sessions=sessions())
@examples(40)
def test_on_one_engine_it_is_the_other_simulation_of_sessions(given_sessions: Sessions) -> None:
    loop = given_sessions.loop
    loop = loop._replace(fleet=loop.fleet.model_copy(update={"replicas": 1}))
    one = Sessions(loop, given_sessions.session)
    expected = simulate_sessions(
        loop.fleet,
        loop.workload._replace(session=one.session),
        lambda row, end: end + loop.think[row],
        frontend_seconds=loop.frontend,
    )
    alike(one.run(), expected)


@given(given_sessions=sessions(), share=st.floats(0.01, 0.9), collects=st.booleans())
@examples(40)
def test_a_run_may_be_cut_forked_and_fed_with_turns_of_what_is_live(
    given_sessions: Sessions, share: float, collects: bool
) -> None:
    loop, turns = given_sessions.loop, given_sessions.turns
    whole = given_sessions.run()
    cut = share * float(whole["finish"].max())
    fleet = given_sessions.fleet()
    fleet.run(cut)
    early = [fleet.collect()] if collects else []
    untouched = [array.tobytes() for array in fleet.state]
    fork = fleet.fork()
    fork.run()
    assert [array.tobytes() for array in fleet.state] == untouched
    fleet.run()
    last = fleet.collect()
    assert fork.collect().tobytes() == last.tobytes()
    alike(by_index(np.concatenate([*early, last])), whole)

    # The same, the second half fed when the first is under way: its turns follow requests that are live.
    done = simulate_until(given_sessions, whole, cut)
    live = {request.index for request in done.live()}
    come = np.flatnonzero(whole["arrival"] + loop.frontend < cut)
    rest = np.flatnonzero(whole["arrival"] + loop.frontend >= cut)
    known = ~np.isin(turns.after[rest], [*rest, *live])
    after = np.where(known, -1, turns.after[rest])
    arrival = np.where(known, whole["arrival"][rest], np.inf)
    order = np.lexsort((rest, arrival))
    rest, after, arrival = rest[order], after[order], arrival[order]
    nominal = np.where(np.isfinite(arrival), arrival, cut)
    nominal = np.maximum.accumulate(np.where(np.isfinite(arrival), arrival, nominal.max(initial=cut)))
    workload = take_rows(loop.workload, rest)._replace(arrival=nominal, delivered=nominal + loop.frontend)
    done.feed_sessions(workload, Turns(after, loop.think[rest], loop.frontend))
    done.run()
    found = by_index(done.collect())
    assert set(found["index"].tolist()) == {*come.tolist(), *rest.tolist()}
    alike(found, whole)


def simulate_until(given_sessions: Sessions, whole: Records, cut: float) -> Fleet:
    """A fleet that got what came before `cut` as an open load."""
    loop = given_sessions.loop
    order = np.lexsort((whole["index"], whole["arrival"]))
    order = order[whole["arrival"][order] + loop.frontend < cut]
    arrivals = whole["arrival"][order]
    fleet = Fleet(loop.fleet)
    fleet.feed(take_rows(loop.workload, order)._replace(arrival=arrivals, delivered=arrivals + loop.frontend))
    fleet.run(cut)
    return fleet


def test_what_waits_for_a_request_that_was_lost_does_not_come() -> None:
    workload = make_workload([0.0, 1.0, 2.0], 100, 400)
    loop = Loop(sessions_fleet(), workload, 1, np.zeros(3), 0.0)
    fleet = Fleet(loop.fleet)
    fleet.feed_sessions(workload, Turns(np.array([-1, 0, 1]), np.zeros(3), 0.0))
    fleet.at(0.5, Fleet.crash, 0)
    fleet.run(1e4)
    assert fleet.collect()["index"].tolist() == [0]
    assert not (fleet.collect()["status"] == FINISHED).any()


def test_replicas_may_restart_meanwhile() -> None:
    """What begins again elsewhere is waited for there."""
    count = 300
    rng = np.random.default_rng(4)
    workload = make_workload(np.sort(rng.random(count)) * 10.0, 200, rng.integers(20, 400, count))
    given_sessions = Sessions(
        Loop(sessions_fleet(replicas=3), workload, 1, rng.exponential(0.5, count), 0.01), rng.integers(0, 60, count)
    )
    fleet = given_sessions.fleet()
    for replica in range(3):
        fleet.plan(Restart(2.0 + 6.0 * replica, [replica], 1, drain_seconds=1.0, startup_seconds=4.0))
    begun_again = 0
    for replica in range(3):
        fleet.run(2.999 + 6.0 * replica)  # just before it stops
        begun_again += int(fleet.state.replicas["running"][replica])
    assert begun_again > 10
    fleet.run()
    outcomes, turns = by_index(fleet.collect()), given_sessions.turns
    assert outcomes.size == count
    later = turns.after >= 0
    think = outcomes["arrival"][later] - outcomes["finish"][turns.after[later]]
    assert np.allclose(think, given_sessions.loop.think[later], rtol=0.0, atol=1e-9)


@pytest.mark.parametrize(
    ("after", "think", "what"),
    [([-1, 1], [0.0, 0.0], "before it"), ([-1, -1, 0, 0], [0.0] * 4, "one next turn"), ([-1, 0], [0.0, -1.0], "think")],
)
def test_refusals(after: list[int], think: list[float], what: str) -> None:
    workload = make_workload(np.arange(len(after)), 100, 10)
    with pytest.raises(ValueError, match=what):
        Fleet(sessions_fleet()).feed_sessions(workload, Turns(np.array(after), np.array(think), 0.0))


def sessions_fleet(replicas: int = 1) -> FleetSettings:
    return FleetSettings(engine=EngineSettings(num_gpu_blocks=2_000), step_time=STEP_TIME, replicas=replicas)
