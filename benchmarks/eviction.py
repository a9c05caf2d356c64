"""(e) Hit ratio against capacity: 20 capacities and six eviction policies on the whole Mooncake conversation trace.

12,031 requests on 8 replicas, each simulated whole (queues, batches, preemptions), from 10,000 to 1,000,000 blocks a
replica. Needs the trace: `python -m benchmarks.eviction [PATH] [--policies a,b,c] [--threads N]` (default:
../shared/data/mooncake/conversation_trace.jsonl).
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import compile_kernels, report, run_to_end
from benchmarks.mooncake import DEFAULT_PATH
from connectors.traces import read_trace
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.policies import apply_overrides
from kavier_twin.simulation.workload import Workload, workload_of

CAPACITIES = np.unique(np.round(np.geomspace(10_000, 1_000_000, 20), -2).astype(int)).tolist()
POLICIES = ("lru", "lfu", "arc", "s3fifo", "cost_aware", "belady")


def _simulate(workload: Workload, policy: str, blocks: int) -> tuple[float, float]:
    """Shares of the prompt tokens: hit, and cached but stranded behind an evicted ancestor."""
    settings = apply_overrides(DEFAULT_FLEET, {"replicas": 8, "num_gpu_blocks": blocks, "eviction": policy})
    replicas = run_to_end(settings, workload).state.replicas
    queries = float(replicas["query_tokens"].sum())
    return float(replicas["hit_tokens"].sum()) / queries, float(replicas["stranded_tokens"].sum()) / queries


def main() -> None:
    """One row a capacity, one column a policy; then what it cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=DEFAULT_PATH)
    parser.add_argument("--policies", type=lambda text: tuple(text.split(",")), default=POLICIES)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not arguments.path.exists():
        sys.exit(f"{arguments.path}: no such file; give the path of Mooncake's conversation_trace.jsonl")
    compiling = compile_kernels(apply_overrides(DEFAULT_FLEET, {"replicas": 8}))
    workload = workload_of(read_trace(arguments.path).records)
    rows: list[dict[str, Any]] = [{"blocks": blocks} for blocks in CAPACITIES]
    costs = []
    cpu, wall = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(arguments.threads) as executor:
        for policy in arguments.policies:
            start = time.process_time()
            found = executor.map(lambda blocks, policy=policy: _simulate(workload, policy, blocks), CAPACITIES)
            for row, (hits, stranded) in zip(rows, found, strict=True):
                row[policy] = hits
                if policy in ("fifo", "sieve", "s3fifo", "cost_aware"):
                    row[f"{policy} stranded"] = stranded
            costs.append(f"{policy} {time.process_time() - start:.1f} s")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    notes = (
        f"{len(CAPACITIES) * len(arguments.policies)} runs of {workload.index.size} requests: {cpu:.1f} CPU s, "
        f"{wall:.1f} s on {arguments.threads} threads ({', '.join(costs)}); kernels excluded: {compiling:.1f} s"
    )
    report("(e) hit ratio against capacity, Mooncake conversation trace", rows, notes)


if __name__ == "__main__":
    main()
