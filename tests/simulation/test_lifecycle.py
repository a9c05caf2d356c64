"""Control processes: what they do, and that a fleet taken up again in their midst goes on as if nothing had been."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effort import examples
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.kpis import Counters
from kavier_twin.simulation.lifecycle import Plan, Replacement, Restart, Sampling
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.workload import make_workload
from simulation.invariants import check_state
from simulation.scenarios import Scenario, policies, scenarios

STEPS = 12  # of the grid on which things happen, so that many happen at once


class Event(NamedTuple):
    kind: str
    step: int
    replica: int
    steps: int
    at_a_time: int
    overrides: dict[str, Any]


class Eventful(NamedTuple):
    scenario: Scenario
    events: tuple[Event, ...]
    cuts: tuple[int, ...]

    @property
    def grid_seconds(self) -> float:
        return (self.scenario.rows[-1].arrival + 1.0) / STEPS

    def fleet(self) -> Fleet:
        """The fleet with all that is to come; at every cut it looks at itself, so that all runs are cut alike."""
        fleet = Fleet(self.scenario.fleet)
        fleet.feed(self.scenario.workload())
        grid, everyone = self.grid_seconds, range(self.scenario.fleet.replicas)
        for kind, step, replica, steps, at_a_time, overrides in self.events:
            time, seconds = step * grid, steps * grid
            match kind:
                case "restart":
                    fleet.plan(Restart(time, everyone, at_a_time, seconds, grid))
                case "replace":
                    fleet.plan(Replacement(time, everyone, seconds))
                case "sample":
                    fleet.plan(Sampling(time, seconds))
                case "add":
                    fleet.at(time, Fleet.add)
                case "apply":
                    fleet.at(time, Fleet.apply, overrides)
                case _:
                    fleet.at(time, if_there, kind, replica)
        for cut in self.cuts:
            fleet.at(cut * grid, Fleet.sample)
        return fleet


def if_there(fleet: Fleet, what: str, replica: int) -> None:
    """Something happens to a replica that another process may have ended already."""
    if fleet.has(replica):
        getattr(fleet, what)(replica)


@st.composite
def eventful(draw: st.DrawFn) -> Eventful:
    step, steps, replica = st.integers(0, STEPS), st.integers(1, STEPS // 3), st.integers(0, 3)
    kinds = st.sampled_from(["restart", "restart", "replace", "crash", "let_go", "stop", "add", "apply", "sample"])
    event = st.builds(Event, kinds, step, replica, steps, st.integers(1, 3), policies())
    return Eventful(
        draw(scenarios(most=20)),
        tuple(draw(st.lists(event, min_size=1, max_size=5))),
        tuple(sorted(draw(st.lists(step, min_size=1, max_size=4)))),
    )


def digest(fleet: Fleet) -> list[bytes]:
    """All that a fleet is and did."""
    samples = [
        np.hstack((*ticks, *reading)).tobytes() for *ticks, reading in zip(*vars(fleet.samples).values(), strict=True)
    ]
    return [*samples, fleet.collect().tobytes(), *(array.tobytes() for array in fleet.state)]


def revived(fleet: Fleet) -> Fleet:
    """As another process would receive it."""
    return pickle.loads(pickle.dumps(fleet))


@pytest.mark.parametrize("again", [Fleet.fork, revived])
@examples(60)
@given(eventful())
def test_taken_up_at_any_moment_it_ends_with_the_same_bytes(again: Callable[[Fleet], Fleet], given_: Eventful) -> None:
    end = 2 * STEPS * given_.grid_seconds
    whole, pieces = given_.fleet(), given_.fleet()
    whole.run(end)
    for cut in given_.cuts:
        pieces.run(cut * given_.grid_seconds)
        check_state(pieces.state)
        before, pieces = pieces, again(pieces)
        before.run(end)  # leaves no trace in its copy
    pieces.run(end)
    assert digest(pieces) == digest(whole)


@examples(60)
@given(eventful())
def test_what_is_counted_never_becomes_less(given_: Eventful) -> None:
    """Whatever happens to replicas: KPIs and energy of a stretch are differences of these counts."""
    fleet = given_.fleet()
    before = counted(fleet)
    for step in range(2 * STEPS):
        fleet.run(step * given_.grid_seconds)
        after = counted(fleet)
        assert (after >= before - 1e-9).all()
        before = after


def counted(fleet: Fleet) -> npt.NDArray[np.float64]:
    """All cumulative counts of a fleet."""
    counters = vars(Counters.of(fleet.state, fleet.now_seconds))
    time, work, busy, alive, _ = counters.pop("reading")
    del counters["replicas"], counters["usable_blocks"]
    return np.hstack([time, work, busy, alive, *counters.values()])


@pytest.mark.parametrize("change", [Fleet.begin_anew, Fleet.stop, Fleet.dismiss])
def test_a_replica_that_begins_anew_was_there_before(change: Callable[..., Any]) -> None:
    """The mirror gives the place of a pod that left to the next one, and a pod that restarts keeps its own."""
    fleet = Fleet(FleetSettings(replicas=2, engine=EngineSettings(num_gpu_blocks=100), step_time=StepTime(fixed=0.02)))
    fleet.feed(make_workload([0.0] * 4, 100, 40))
    fleet.run(100.0)
    before = counted(fleet)
    if change is Fleet.begin_anew:
        fleet.begin_anew(0, ())
    else:
        change(fleet, 0)
        fleet.admit()
    assert counted(fleet) == pytest.approx(before)


def test_plans_that_meet_act_in_the_order_in_which_they_began_to_wait() -> None:
    """Whether a run starts at 0.1 or at 0.3 s must not decide which of two times that nearly meet comes first."""
    order: list[str] = []

    class Meeting(Plan):
        def process(self, fleet: Any, clock: Any) -> Any:
            yield from clock.reach(self)
            order.append(f"{self.next_seconds:.17g}")

    for start in (0.0, 0.1, 0.2):
        fleet = Fleet(FleetSettings(replicas=1, engine=EngineSettings(num_gpu_blocks=10), step_time=StepTime(fixed=1)))
        fleet.run(start)
        for time in (0.1 + 0.2, 0.3, 0.7 + 0.1, 0.8):
            fleet.plan(Meeting(time))
        fleet.run()
        assert order == ["0.29999999999999999", "0.30000000000000004", "0.79999999999999993", "0.80000000000000004"]
        order.clear()


def test_a_replica_that_failed_during_a_rolling_restart_does_not_come_back() -> None:
    engine = EngineSettings(num_gpu_blocks=1000, max_num_seqs=8)
    fleet = Fleet(FleetSettings(replicas=3, engine=engine, step_time=StepTime(fixed=0.02)))
    fleet.feed(make_workload([0.0] * 9, 100, 400))
    fleet.plan(Restart(1.0, range(3), 1, drain_seconds=1.0, startup_seconds=5.0))
    fleet.at(4.0, Fleet.crash, 0)
    fleet.at(13.5, Fleet.crash, 2)
    fleet.run(8.0)
    assert fleet.state.replicas["accepting"].tolist() == [0, 0, 1]
    fleet.run()
    assert fleet.state.replicas["accepting"].tolist() == [0, 1, 0]
    assert fleet.collect()["status"].max() == 0


@pytest.mark.parametrize("end", [Fleet.stop, Fleet.crash])
def test_one_that_leaves_was_there_until_it_lost_its_requests(end: Callable[..., Any]) -> None:
    """Drained and stopped before its requests ended, it counts to the moment when it stopped."""
    fleet = Fleet(FleetSettings(replicas=2, engine=EngineSettings(num_gpu_blocks=100), step_time=StepTime(fixed=0.02)))
    fleet.feed(make_workload([0.0] * 4, 100, 40))
    fleet.run(0.1)
    fleet.let_go(0)
    fleet.run(0.115)  # in the midst of a step
    end(fleet, 0)
    assert not fleet.has(0)
    assert Counters.of(fleet.state, 0.2).reading.alive_seconds == pytest.approx(0.115 + 0.2)
