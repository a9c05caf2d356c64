"""Ends that come from outside, beside requests that end by themselves: the invariants hold at every stop."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.settings import EngineSettings, FleetSettings
from kavier_twin.simulation.workload import make_workload
from simulation.invariants import check_state
from simulation.scenarios import Scenario, examples, scenarios
from simulation.test_closed_loop import STEP_TIME
from simulation.test_properties import play_checked


@examples(150)
@given(scenarios(held=True, kinds=("finish", "finish_any", "output", "let_go", "fork")))
def test_ends_from_outside(scenario: Scenario) -> None:
    play_checked(scenario)


@examples(50)
@given(scenarios(held=True, kinds=("finish", "finish_any", "output", "let_go", "fork")))
def test_ends_from_outside_step_by_step(scenario: Scenario) -> None:
    play_checked(scenario, stepping=True)


@examples(100)
@given(generated=st.integers(1, 80), true=st.integers(1, 80), size=st.sampled_from([1, 4]))
def test_the_content_of_a_request_that_generated_more_has_room(generated: int, true: int, size: int) -> None:
    """Its hashes come while it still holds the blocks of tokens that were never real; others' memory is next to it."""
    engine = EngineSettings(block_size=size, num_gpu_blocks=400)
    fleet = Fleet(FleetSettings(engine=engine, step_time=STEP_TIME))
    keys = np.arange(1, 2 + (1 + true) // size, dtype=np.uint64)
    outputs = [generated, 1, 1]
    fleet.feed(make_workload([0.0, 0.1, 0.2], 1, outputs, hash_tokens=size, held=1))
    fleet.run(100.0)
    whole = make_workload([0.0], 1, true, chain=keys, chain_starts=[0, keys.size], hash_tokens=size)
    live = next(live for live in fleet.live() if live.index == 0)
    fleet.finish(live, true, whole.chain, min(1 + true, size * keys.size))
    check_state(fleet.state)
