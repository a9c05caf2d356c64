"""The jump and the flow against the reference that takes every step: every decision equal, times to a rounding."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from effort import examples
from kavier_twin.simulation import state as layout
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.state import FleetState
from kavier_twin.simulation.workload import make_workload
from simulation.invariants import free_list, queue, ring
from simulation.scenarios import Player, Scenario, outcomes_by_index, scenarios

EXACT = (
    "running",
    "waiting",
    "loading",
    "free_blocks",
    "accepting",
    "alive",
    "leaving",
    "next_uid",
    "steps",
    "received",
    "finished",
    "rejected",
    "query_tokens",
    "hit_tokens",
    "external_query_tokens",
    "host_hit_tokens",
    "disk_hit_tokens",
    "loaded_bytes",
    "stored_bytes",
    "read_bytes",
    "written_bytes",
    "dropped_stores",
    "prompt_tokens",
    "computed_tokens",
    "output_tokens",
    "preemptions",
    "evictions",
    "stranded_tokens",
)
INTEGRALS = ("busy_seconds", "running_seconds", "waiting_seconds", "used_block_seconds")
TIMES = ("scheduled", "first_token", "finish")
DECISIONS = ("index", "session", "replica", "status", "prompt", "output", "cached", "external", "preemptions")


def assert_same_outcomes(fast: Fleet, reference: Fleet) -> None:
    ours, theirs = outcomes_by_index(fast), outcomes_by_index(reference)
    for name in (*DECISIONS, "arrival"):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for name in TIMES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, atol=0, err_msg=name)
    for name in ("prefill_work", "decode_work"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-6, err_msg=name)


def assert_same_state(fast: Fleet, reference: Fleet) -> None:
    """The caches equal block by block, the queues slot by slot, the counters digit by digit."""
    ours, theirs = fast.state, reference.state
    for name in EXACT:
        np.testing.assert_array_equal(ours.replicas[name], theirs.replicas[name], err_msg=name)
    for name in INTEGRALS:
        np.testing.assert_allclose(ours.replicas[name], theirs.replicas[name], rtol=1e-6, atol=1e-9, err_msg=name)
    for name in ("key", "refs", "chain"):
        np.testing.assert_array_equal(ours.blocks[name], theirs.blocks[name], err_msg=name)
    np.testing.assert_array_equal(ours.buckets, theirs.buckets)
    for name in ("key", "ring", "prev", "next", "refs", "loads"):
        np.testing.assert_array_equal(ours.chunks[name], theirs.chunks[name], err_msg=f"chunks: {name}")
    np.testing.assert_allclose(ours.tiers["target"], theirs.tiers["target"], err_msg="ARC's target")
    for number in range(ours.replicas.size):
        assert free_list(ours, number) == free_list(theirs, number)
        assert_same_eviction(ours, theirs, number)
        for lists, length in (
            ("running", "running"),
            ("waiting", "waiting"),
            ("slots", "free_slots"),
        ):
            count = int(ours.replicas[number][length])
            np.testing.assert_array_equal(
                getattr(ours, lists)[number, :count], getattr(theirs, lists)[number, :count], err_msg=lists
            )
        loading = int(ours.replicas[number]["loading"])
        np.testing.assert_array_equal(ours.tier_slots[number, 0, :loading], theirs.tier_slots[number, 0, :loading])
        live = theirs.requests[number]["state"] != layout.FREE
        for name in (
            "index",
            "state",
            "output",
            "computed",
            "blocks",
            "registered",
            "cached",
            "external",
            "stored",
            "stores",
            "arrived",
            "preemptions",
            "sequence",
        ):
            np.testing.assert_array_equal(
                ours.requests[number][name][live], theirs.requests[number][name][live], err_msg=name
            )


def assert_same_eviction(ours: FleetState, theirs: FleetState, number: int) -> None:
    """The policies would evict the same blocks in the same order, and have forgotten the same ones."""
    evictions = [state.replicas[number]["eviction"] for state in (ours, theirs)]
    for name in layout.EVICTION.names or ():
        if name not in ("spare_ghost", "spare"):
            np.testing.assert_array_equal(*(eviction[name] for eviction in evictions), err_msg=name)
    count = int(evictions[0]["evictable"])
    np.testing.assert_array_equal(*(state.nodes[number]["heap"][:count] for state in (ours, theirs)))
    if ours.nodes.shape[1] > 1:
        for which in range(layout.QUEUES):
            assert queue(ours.nodes[number], which) == queue(theirs.nodes[number], which)
        cached = ours.blocks[number]["key"] != layout.UNHASHED
        for name in ("priority", "tie", "place", "queue", "linked", "hits", "depth"):
            a, b = (state.nodes[number][name][: cached.size][cached] for state in (ours, theirs))
            np.testing.assert_allclose(a, b, rtol=1e-9, err_msg=name)
    if evictions[0]["ghosts"].any():
        ghosts = [state.nodes[number]["ghost"] for state in (ours, theirs)]
        for which in (0, 1):
            np.testing.assert_array_equal(*(rows["key"][ring(rows, rows.size - 2 + which)] for rows in ghosts))


def assert_same_latencies(fast: Fleet, reference: Fleet) -> None:
    """Histograms of inter-token latencies: a latency on the edge of a bin may fall on either side."""
    ours, theirs = (fleet.state.itl_counts.sum(axis=0) for fleet in (fast, reference))
    assert ours.sum() == theirs.sum()
    moved = np.cumsum(ours - theirs)  # what crossed each edge
    values = layout.ITL_SMALLEST_SECONDS * layout.ITL_BIN_RATIO ** np.arange(1, ours.size + 1)
    assert np.abs(moved).max() <= max(2, 0.01 * ours.sum()), f"{moved[moved != 0]} crossed {values[moved != 0]}"


def play_both(scenario: Scenario) -> tuple[Fleet, Fleet]:
    """Play the scenario on both, comparing at every stop and at the end."""
    reference, seen = Player(scenario, stepping=True), []

    def remember(player: Player) -> None:
        seen.append(player.fleet.fork())
        player.fleet.collect()

    reference.play(remember)
    expected = iter(seen)

    def compare(player: Player) -> None:
        then = next(expected)
        assert_same_outcomes(player.fleet, then)
        assert_same_state(player.fleet, then)

    fast = Player(scenario)
    fast.play(compare)
    assert next(expected, None) is None, "the reference had to be stopped more often"
    assert_same_latencies(fast.fleet, reference.fleet)
    return fast.fleet, reference.fleet


def test_a_block_enters_the_cache_in_its_turn() -> None:
    """Under asynchronous scheduling after what ends in the same batch, also where a run stopped in between."""
    engine = EngineSettings(block_size=1, num_gpu_blocks=8, async_scheduling=True, eviction="fifo")
    settings = FleetSettings(engine=engine, step_time=StepTime(fixed=0.01))
    fleets = [Fleet(settings, stepping=stepping) for stepping in (False, True)]
    for fleet in fleets:
        fleet.feed(make_workload([0.0, 0.0, 0.001], 1, np.array([3, 1, 1])))
    for seconds in (0.0005, 0.002, 0.0105, 1.0):
        for fleet in fleets:
            fleet.run(seconds)
        assert_same_state(*fleets)


@examples(100)
@given(scenarios())
def test_jump_equals_reference(scenario: Scenario) -> None:
    play_both(scenario)


@examples(100)
@given(scenarios(control=True))
def test_jump_equals_reference_under_control_events(scenario: Scenario) -> None:
    play_both(scenario)
