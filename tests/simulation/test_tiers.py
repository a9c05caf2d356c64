"""Tiers as settings and policies, and a switch of tiers in a live fleet."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.build import chunk_tables
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.kpis import Counters, kpis
from kavier_twin.simulation.policies import PolicyError, apply_overrides, parse_override, vllm_flags
from kavier_twin.simulation.settings import DiskTier, EngineSettings, FleetSettings, HostTier, StepTime
from kavier_twin.simulation.workload import Workload, make_workload
from simulation.invariants import check_state

STEP = StepTime(fixed=0.00613, per_prefill_token=3e-5, per_decode_sequence=4e-5, per_context_token=4.5e-8)
BARE = FleetSettings(engine=EngineSettings(num_gpu_blocks=100), step_time=STEP)
TIERED = FleetSettings(engine=EngineSettings(num_gpu_blocks=100, host_tier=HostTier(capacity_gib=1.0)), step_time=STEP)


def test_a_tier_comes_and_goes_by_override() -> None:
    grown = apply_overrides(BARE, dict([parse_override("host_tier.capacity_gib=32")]))
    assert grown.engine.host_tier == HostTier(capacity_gib=32)
    assert vllm_flags(BARE, grown) == ["--kv-offloading-size 32", "--kv-offloading-backend native"]
    doubled = apply_overrides(grown, {"host_tier.capacity_gib": "2x", "host_tier.eviction_policy": "arc"})
    assert doubled.engine.host_tier == HostTier(capacity_gib=64, eviction_policy="arc")
    assert apply_overrides(grown, {"host_tier.capacity_gib": 0}) == BARE


def test_flags_carry_what_has_no_flag_of_its_own() -> None:
    changed = apply_overrides(
        BARE, {"host_tier.capacity_gib": 8, "host_tier.eviction_policy": "arc", "disk_tier.capacity_gib": 100}
    )
    *plain, transfer = vllm_flags(BARE, changed)
    assert plain == ["--kv-offloading-size 8", "--kv-offloading-backend native"]
    name, _, value = transfer.partition(" ")
    assert name == "--kv-transfer-config"
    extra = json.loads(value.strip("'"))["kv_connector_extra_config"]
    assert extra["eviction_policy"] == "arc"
    assert extra["spec_name"] == "TieringOffloadingSpec"
    assert extra["secondary_tiers"][0]["type"] == "fs"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"host_tier.eviction_policy": "arc"}, "capacity_gib"),
        ({"disk_tier.capacity_gib": 10}, "disk_tier needs a host_tier"),
        ({"host_tier.capacity_gib": 1e-6}, "must hold 1 to"),
        ({"host_tier.capacity": 5}, "unknown policy setting"),
        ({"host_tier.capacity_gib": 1, "host_tier.store_threshold": 2, "disk_tier.capacity_gib": 1}, "store_threshold"),
    ],
)
def test_what_cannot_be_is_refused(overrides: dict[str, float | str], problem: str) -> None:
    with pytest.raises(PolicyError, match=problem):
        apply_overrides(BARE, overrides)


def returning(prompts: int, tokens: int, gap_seconds: float) -> Workload:
    """`prompts` different prompts, one after the other, and then once more in the same order."""
    blocks = tokens // 16
    chain = np.tile(np.arange(1, prompts * blocks + 1), 2)
    return make_workload(
        np.arange(2 * prompts) * gap_seconds,
        tokens,
        3,
        chain=chain,
        chain_starts=np.arange(2 * prompts + 1) * blocks,
        hash_tokens=16,
        covered=tokens,
    )


def test_a_load_pays_each_link_and_spares_all_but_the_last_token() -> None:
    """64-token prompts, fully in the tier that holds them: from disk they cross both links, one after the other."""
    host = HostTier(capacity_gib=8.1 * 2**21 / 2**30, bytes_per_second=2**21, latency_seconds=0.25)
    disk = DiskTier(capacity_gib=1.0, read_bytes_per_second=2**20, write_bytes_per_second=2**30, latency_seconds=0.5)
    engine = EngineSettings(num_gpu_blocks=6, async_scheduling=False, host_tier=host, disk_tier=disk)
    fleet = Fleet(FleetSettings(engine=engine, step_time=StepTime(fixed=0.001)))
    fleet.feed(returning(4, 64, 60.0))
    fleet.run()
    outcomes = fleet.collect()
    assert outcomes["external"].tolist() == [0, 0, 0, 0, 64, 64, 64, 64]  # the disk has what the host had to give up
    waited = (outcomes["scheduled"] - outcomes["arrival"])[4:]
    # Asking the disk, reading 4 chunks of 2 MiB at 1 MiB/s, loading them at 2 MiB/s.
    np.testing.assert_allclose(waited, 0.5 + (0.5 + 8.0) + (0.25 + 4.0), atol=0.005)
    after = kpis(outcomes, None, Counters.of(fleet.state, fleet.now_seconds), start_seconds=0.0)
    assert after.disk_hit_tokens == 256
    assert after.host_hit_tokens == 0
    assert after.external_cache_hit_ratio == 0.5
    assert int(fleet.state.replicas["computed_tokens"][0]) == 4 * 64 + 4 * 1 + 8 * 2


def test_a_smaller_host_tier_keeps_what_was_used_last() -> None:
    fleet = Fleet(TIERED)
    fleet.feed(returning(20, 320, 1.0))
    fleet.run(50.0)
    host = chunk_tables(fleet.state, 0)[0]
    held = int(host["refs"][layout.RECENT])
    order, at = [], int(host[layout.RECENT]["next"])
    while at != layout.RECENT:
        order.append(int(host[at]["key"]))
        at = int(host[at]["next"])
    assert held == 20 * 20
    fork = fleet.fork()
    fork.apply({"host_tier.capacity_gib": 100 * 2**21 / 2**30})
    check_state(fork.state)
    kept = chunk_tables(fork.state, 0)[0]
    assert sorted(kept["key"][kept["key"] != 0].tolist()) == sorted(order[-100:])
    fork.apply({"host_tier.capacity_gib": 0})
    check_state(fork.state)
    assert fork.state.chunks.size == 1
    assert int(host["refs"][layout.RECENT]) == held  # a fork is independent
