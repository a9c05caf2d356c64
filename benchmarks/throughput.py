"""(a) 100,000 requests of 1,000 prompt and 200 output tokens on one replica of Llama-3.1-8B on an H100.

20 groups share a prefix of 512 tokens, 10 requests/s, 16-token blocks, prefix caching on, every prompt block hashed.
"""

from __future__ import annotations

from benchmarks.common import compile_kernels, report, run_to_end, shared_prefix_workload, timed
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.policies import apply_overrides

REQUESTS = 100_000
TARGET = 100_000


def main() -> None:
    """Measure asynchronous (vLLM's default) and synchronous scheduling."""
    compiling = compile_kernels()
    workload = shared_prefix_workload(REQUESTS, 10.0, 1000, 200, groups=20, shared_tokens=512)
    rows = []
    for scheduling, asynchronous in (("asynchronous", True), ("synchronous", False)):
        settings = apply_overrides(DEFAULT_FLEET, {"async_scheduling": asynchronous})
        fleet = run_to_end(settings, workload)
        timing = timed(lambda settings=settings: run_to_end(settings, workload))
        replica = fleet.state.replicas[0]
        rows.append(
            {
                "scheduling": scheduling,
                "requests": REQUESTS,
                "CPU s": timing.cpu_seconds,
                "wall s": timing.wall_seconds,
                "requests / CPU s": REQUESTS / timing.cpu_seconds,
                "target": TARGET,
                "engine steps": int(replica["steps"]),
                "hit ratio": float(replica["hit_tokens"] / replica["query_tokens"]),
                "blocks evicted": int(replica["evictions"]),
                "running, mean": float(replica["running_seconds"] / fleet.now_seconds),
            }
        )
    report("(a) one replica, shared prefixes", rows, f"compilation or loading of kernels excluded: {compiling:.1f} s")


if __name__ == "__main__":
    main()
