"""Whoever runs a fleet, in a process that has loaded nothing yet, has the kernels that its engine needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
from kavier_twin.simulation.closed_loop import simulate_closed_loop, simulate_sessions
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, HostTier, StepTime
from kavier_twin.simulation.workload import make_workload

engine = EngineSettings(
    num_gpu_blocks=10,
    eviction="lfu",
    kv_bytes_per_token=256,
    host_tier=HostTier(capacity_gib=0.01, blocks_per_chunk=1, bytes_per_second=1e9, latency_seconds=0.0),
)
settings = FleetSettings(engine=engine, step_time=StepTime(fixed=0.01, linear_layers=((4.0, 0.01),)))
keys = list(range(8))
workload = make_workload(
    [0.0, 1.0, 2.0, 3.0], 64, 4, chain=keys, chain_starts=[0, 2, 4, 6, 8], hash_tokens=32, session=[0, 0, 0, 0]
)
"""
RUNS = {
    "at given times": "ended = simulate(settings, workload).collect()",
    "closed loop": "ended = simulate_closed_loop(settings, workload, 1).collect()",
    "sessions": "ended = simulate_sessions(settings, workload, lambda row, finish: finish)",
}


@pytest.mark.parametrize("run", RUNS)
def test_a_process_that_has_loaded_nothing_runs_a_fleet_with_a_tier_and_a_policy(run: str) -> None:
    subprocess.run([sys.executable, "-c", f"{PROGRAM}{RUNS[run]}\nassert ended.size == 4"], check=True)
