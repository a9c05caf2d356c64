"""Ends that come from outside, beside requests that end by themselves: the invariants hold at every stop."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from effort import examples
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.settings import DiskTier, EngineSettings, FleetSettings, HostTier, StepTime
from kavier_twin.simulation.workload import make_workload
from simulation.invariants import check_state
from simulation.scenarios import Row, Scenario, Stop, scenarios
from simulation.test_closed_loop import STEP_TIME
from simulation.test_properties import play_checked

KINDS = ("finish", "finish_any", "output", "let_go", "fork")


def parked_over_an_emptied_batch() -> Scenario:
    """A held request ends while the engine stands still and a batch, which a preemption emptied, is in flight."""
    requests = [(0.1, 1, 1, 0, True), (0.11, 1, 1, 0, True), (0.31, 57, 1, 0, True), (0.32, 1, 13, 0, True)]
    requests += [(0.33, 100, 1, 0, True), (0.34, 80, 1, 0, False), (0.35, 148, 1, 2, False), (0.36, 1, 1, 0, False)]
    engine = EngineSettings(
        block_size=4,
        num_gpu_blocks=64,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=150,
        prefix_caching=False,
        async_scheduling=True,
        scheduling_policy="priority",
        scheduler_reserve_full_isl=False,
        kv_bytes_per_token=256,
        host_tier=HostTier(
            capacity_gib=48 * 1024 / 2**30, blocks_per_chunk=2, bytes_per_second=1_100_000.0, latency_seconds=0.031
        ),
        disk_tier=DiskTier(
            capacity_gib=36 * 1024 / 2**30, read_bytes_per_second=210_000.0, write_bytes_per_second=900_000.0
        ),
    )
    return Scenario(
        fleet=FleetSettings(engine=engine, step_time=StepTime(fixed=0.0, linear_layers=((4.0, 0.0103),))),
        hash_tokens=16,
        rows=tuple(
            Row(arrival, prompt, output, (), 0, (), priority, 0, held)
            for arrival, prompt, output, priority, held in requests
        ),
        switches=(),
        stops=(Stop(0.25, "finish", pick=5, output=42),),
    )


@examples(150)
@given(scenarios(held=True, kinds=KINDS))
@example(parked_over_an_emptied_batch())
def test_ends_from_outside(scenario: Scenario) -> None:
    play_checked(scenario)


@examples(50)
@given(scenarios(held=True, kinds=KINDS))
@example(parked_over_an_emptied_batch())
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
