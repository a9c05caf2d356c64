"""(n) Hit ratio by capacity and reasons for misses: CPU time for each request of a stream, and the curve's error.

Chat: 100 requests/s on 4 replicas, prompts of 2,048 tokens in 16-token blocks, half of them shared by one of 20 groups.
The curve's error is against a simulation of each size, in points. The whole Mooncake conversation trace on 8 replicas
is run too where its path is given: `python -m benchmarks.reuse [PATH]`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import compile_kernels, report, shared_prefix_workload, timed
from connectors.traces import read_trace
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.reuse.curve import SHOWN_FACTORS
from kavier_twin.reuse.simulated import watch_run
from kavier_twin.reuse.watch import ReuseWatch
from kavier_twin.simulation.policies import apply_overrides
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.workload import Workload, workload_of

TARGET_MICROSECONDS = 100.0  # 1 % of a core at 100 requests/s


def _watch(settings: FleetSettings) -> ReuseWatch:
    follows = settings.router == "prefix_aware"
    engine = settings.engine
    return ReuseWatch(engine.block_size, engine.num_gpu_blocks, follows_prefixes=follows, window_seconds=math.inf)


def _row(name: str, settings: FleetSettings, workload: Workload) -> dict[str, Any]:
    outcomes = simulate(settings, workload).collect()
    watch = _watch(settings)
    watch_run(watch, workload, outcomes)
    timing = timed(lambda: watch_run(_watch(settings), workload, outcomes))
    curve = {point.factor: point.hit_ratio for point in watch.points()}
    row: dict[str, Any] = {
        "what": name,
        "router": settings.router,
        "us / request": 1e6 * timing.cpu_seconds / outcomes.size,
        "target": TARGET_MICROSECONDS,
        "one key in": watch.sampled,
    }
    for factor in SHOWN_FACTORS:
        blocks = round((settings.engine.num_gpu_blocks - 1) * factor) + 1
        sized = simulate(apply_overrides(settings, {"num_gpu_blocks": blocks}), workload).collect()
        served = sized[sized["status"] == 0]
        simulated = float(served["cached"].sum() / served["prompt"].sum())
        row[f"{factor:g} x"] = f"{curve[factor]:.2%} ({100.0 * (curve[factor] - simulated):+.2f})"
    return row


def main() -> None:
    """One row a workload and router."""
    compiling = compile_kernels(apply_overrides(DEFAULT_FLEET, {"replicas": 4}))
    workloads = {4: ("chat", shared_prefix_workload(20_000, 100.0, 2_048, 200, groups=20, shared_tokens=1_024))}
    if len(sys.argv) > 1:
        workloads[8] = ("Mooncake", workload_of(read_trace(Path(sys.argv[1])).records))
    rows = []
    for replicas, (name, workload) in workloads.items():
        for router in ("prefix_aware", "least_loaded"):
            rows.append(_row(name, apply_overrides(DEFAULT_FLEET, {"replicas": replicas, "router": router}), workload))
    report("(n) capacity and misses", rows, f"compilation or loading of kernels excluded: {compiling:.1f} s")


if __name__ == "__main__":
    main()
