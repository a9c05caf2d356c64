"""The jump and the flow against the reference that takes every step: every decision equal, times to a rounding."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.fleet import Fleet
from simulation.scenarios import Player, Scenario, examples, outcomes_by_index, scenarios

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
    np.testing.assert_array_equal(ours.blocks, theirs.blocks)
    np.testing.assert_array_equal(ours.buckets, theirs.buckets)
    for table in ("host", "disk", "offers"):
        for name in ("key", "ring", "prev", "next", "refs", "loads"):
            np.testing.assert_array_equal(
                getattr(ours, table)[name], getattr(theirs, table)[name], err_msg=f"{table} {name}"
            )
    np.testing.assert_allclose(ours.tiers["target"], theirs.tiers["target"], err_msg="ARC's target")
    for number in range(ours.replicas.size):
        for lists, length in (
            ("running", "running"),
            ("waiting", "waiting"),
            ("loading", "loading"),
            ("slots", "free_slots"),
        ):
            count = int(ours.replicas[number][length])
            np.testing.assert_array_equal(
                getattr(ours, lists)[number, :count], getattr(theirs, lists)[number, :count], err_msg=lists
            )
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


@examples(100)
@given(scenarios())
def test_jump_equals_reference(scenario: Scenario) -> None:
    play_both(scenario)


@examples(100)
@given(scenarios(control=True))
def test_jump_equals_reference_under_control_events(scenario: Scenario) -> None:
    play_both(scenario)
