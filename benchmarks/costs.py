"""(g) What a simulation spends its time on: nanoseconds per request, per block allocated, per block hit.

Workloads that differ in one thing at a time are timed on one replica; the costs are a non-negative least-squares fit of
CPU time to what each workload did. The fit's own error stands beside it.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from benchmarks.common import BLOCK_TOKENS, compile_kernels, report, run_to_end, shared_prefix_workload, timed
from kavier_twin.recordings.scenario import DEFAULT_FLEET

REQUESTS = 4_000


def main() -> None:
    """Time, fit, and tell."""
    compiling = compile_kernels()
    rows, seconds = [], []
    for prompt, output, shared, rate in (
        (64, 2, 0, 100.0),
        (64, 2, 0, 10.0),
        (64, 60, 0, 10.0),
        (64, 500, 0, 2.0),
        (64, 500, 0, 8.0),
        (1024, 2, 0, 10.0),
        (4096, 2, 0, 4.0),
        (4096, 2, 4000, 10.0),
        (1024, 2, 1008, 10.0),
        (1024, 200, 512, 10.0),
        (1024, 800, 512, 4.0),
        (256, 200, 128, 20.0),
        (2048, 100, 1024, 5.0),
    ):
        workload = shared_prefix_workload(REQUESTS, rate, prompt, output, groups=20, shared_tokens=shared)
        fleet = run_to_end(DEFAULT_FLEET, workload)
        seconds.append(timed(lambda workload=workload: run_to_end(DEFAULT_FLEET, workload), 5).cpu_seconds)
        replica = fleet.state.replicas[0]
        hit_blocks = float(replica["hit_tokens"]) / BLOCK_TOKENS
        allocated = REQUESTS * -(-(prompt + output - 1) // BLOCK_TOKENS) - hit_blocks
        rows.append([REQUESTS, allocated, hit_blocks])
    work, measured = np.array(rows, dtype=float), np.array(seconds)
    weight = 1.0 / measured
    costs, _ = nnls(work * weight[:, None], measured * weight)
    predicted = work @ costs
    error = np.abs(predicted / measured - 1.0)
    table = [
        {"what": what, "ns each": cost * 1e9, "of (a)": share}
        for what, cost, share in zip(
            ("request (arrival, admission, first token, end)", "block allocated and registered", "block hit"),
            costs,
            work[9] * costs / predicted[9],
            strict=True,
        )
    ]
    notes = f"fit over {measured.size} workloads, mean error {error.mean():.0%}, worst {error.max():.0%}"
    report("(g) where the time goes", table, f"{notes}; compilation excluded: {compiling:.1f} s")


if __name__ == "__main__":
    main()
