"""(b) The whole Mooncake conversation trace (12,031 requests, 9 million blocks of 16 tokens) on 8 replicas.

Needs the trace: `python -m benchmarks.mooncake PATH` (default: ../shared/data/mooncake/conversation_trace.jsonl).
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.common import compile_kernels, report, run_to_end, timed
from connectors.traces import read_trace
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.policies import apply_overrides
from kavier_twin.simulation.workload import workload_of

DEFAULT_PATH = Path(__file__).resolve().parents[2] / "shared" / "data" / "mooncake" / "conversation_trace.jsonl"
TARGET = 20_000


def main() -> None:
    """Measure every routing policy."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_PATH
    if not path.exists():
        sys.exit(f"{path}: no such file; give the path of Mooncake's conversation_trace.jsonl")
    compiling = compile_kernels(apply_overrides(DEFAULT_FLEET, {"replicas": 8}))
    workload = workload_of(read_trace(path).records)
    requests = workload.index.size
    rows = []
    for router in ("prefix_aware", "least_loaded", "session_affinity", "round_robin"):
        settings = apply_overrides(DEFAULT_FLEET, {"replicas": 8, "router": router})
        fleet = run_to_end(settings, workload)
        timing = timed(lambda settings=settings: run_to_end(settings, workload))
        replicas = fleet.state.replicas
        rows.append(
            {
                "router": router,
                "requests": requests,
                "CPU s": timing.cpu_seconds,
                "wall s": timing.wall_seconds,
                "requests / CPU s": requests / timing.cpu_seconds,
                "target": TARGET,
                "ns / prompt block": 1e9 * timing.cpu_seconds / float(workload.prompt.sum() / 16),
                "hit ratio": float(replicas["hit_tokens"].sum() / replicas["query_tokens"].sum()),
                "blocks evicted": int(replicas["evictions"].sum()),
            }
        )
    report("(b) Mooncake conversation trace", rows, f"compilation or loading of kernels excluded: {compiling:.1f} s")


if __name__ == "__main__":
    main()
