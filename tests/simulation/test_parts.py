"""A workload fed in parts ends as the same workload fed at once."""

from __future__ import annotations

import numpy as np
import pytest

from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.runs import simulate, simulate_parts
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.turns import Turns
from kavier_twin.simulation.workload import make_workload, take_rows

SETTINGS = FleetSettings(
    replicas=2,
    engine=EngineSettings(num_gpu_blocks=300, max_num_seqs=8),
    step_time=StepTime(fixed=0.01, per_prefill_token=3e-5, per_context_token=1e-7),
)


def test_parts_end_as_the_whole() -> None:
    rng = np.random.default_rng(3)
    whole = make_workload(
        np.sort(rng.uniform(0, 60, 300)),
        rng.integers(50, 400, 300),
        rng.integers(1, 60, 300),
        chain=rng.integers(1, 40, 900),
        chain_starts=np.arange(301) * 3,
        hash_tokens=16,
        covered=48,
    )
    fleet, outcomes = simulate_parts(
        SETTINGS, (take_rows(whole, rows) for rows in np.split(np.arange(300), [7, 7, 150]))
    )
    expected = simulate(SETTINGS, whole).collect()
    order, wanted = np.argsort(outcomes["index"]), np.argsort(expected["index"])
    for name in ("index", "replica", "status", "cached", "preemptions"):
        np.testing.assert_array_equal(outcomes[name][order], expected[name][wanted], err_msg=name)
    for name in ("scheduled", "first_token", "finish"):
        np.testing.assert_allclose(outcomes[name][order], expected[name][wanted], rtol=1e-9, err_msg=name)
    assert fleet.idle


def test_nothing_in_parts_is_nothing() -> None:
    fleet, outcomes = simulate_parts(SETTINGS, [])
    assert outcomes.size == 0
    assert fleet.idle


@pytest.mark.parametrize("in_turns", [False, True])
def test_columns_that_may_only_be_read_and_times_that_are_whole_numbers(in_turns: bool) -> None:
    """Such as other processes send and people write: kernels are compiled for arrays to write to and for floats."""
    workload = make_workload(np.arange(20) * 0.1, 40, 30, held=1)
    for column in workload:
        column.flags.writeable = False
    fleet = Fleet(SETTINGS, start_seconds=0)
    if in_turns:
        numbers = np.arange(20)
        fleet.feed_sessions(workload, Turns(np.where(numbers % 2, numbers - 1, -1), np.ones(20, np.int64), 0))
    else:
        fleet.feed(workload)
    fleet.at(1, Fleet.crash, 0)
    fleet.run(3)
    assert {live.index for live in fleet.live()} == set(range(0, 20, 2) if in_turns else range(20))
