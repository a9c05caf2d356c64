"""(c) The same 5,000 requests with outputs of 50 and of 800 tokens: cost must not grow with tokens.

At 4 requests/s, so that one replica serves both without queueing or preempting (at 10 requests/s, 800 tokens each
outgrow an H100's KV cache, and the run would measure preemption). "engine" is the simulation alone; "whole" is what a
user waits for: arrays built, simulated, KPIs computed.
"""

from __future__ import annotations

from benchmarks.common import compile_kernels, report, run_to_end, shared_prefix_workload, timed
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.kpis import Counters, kpis
from kavier_twin.simulation.runs import simulate

REQUESTS, RATE = 5_000, 4.0
TARGET = 1.3


def _whole(output_tokens: int) -> None:
    workload = shared_prefix_workload(REQUESTS, RATE, 1000, output_tokens, groups=20, shared_tokens=512)
    fleet = simulate(DEFAULT_FLEET, workload)
    kpis(fleet.collect(), None, Counters.of(fleet.state, fleet.now_seconds), start_seconds=0.0)


def main() -> None:
    """Measure both lengths, and their ratio."""
    compiling = compile_kernels()
    rows = []
    for output_tokens in (50, 800):
        workload = shared_prefix_workload(REQUESTS, RATE, 1000, output_tokens, groups=20, shared_tokens=512)
        fleet = run_to_end(DEFAULT_FLEET, workload)
        engine = timed(lambda workload=workload: run_to_end(DEFAULT_FLEET, workload), 9)
        whole = timed(lambda output_tokens=output_tokens: _whole(output_tokens), 9)
        replica = fleet.state.replicas[0]
        rows.append(
            {
                "output tokens": output_tokens,
                "engine CPU s": engine.cpu_seconds,
                "engine wall s": engine.wall_seconds,
                "whole CPU s": whole.cpu_seconds,
                "output tokens / CPU s": REQUESTS * output_tokens / engine.cpu_seconds,
                "blocks a request": (1000 + output_tokens) / 16,
                "running, mean": float(replica["running_seconds"] / fleet.now_seconds),
                "preemptions": int(replica["preemptions"]),
            }
        )
    engine_ratio = rows[1]["engine CPU s"] / rows[0]["engine CPU s"]
    whole_ratio = rows[1]["whole CPU s"] / rows[0]["whole CPU s"]
    notes = (
        f"cost of 800 over 50: engine {engine_ratio:.2f}, whole {whole_ratio:.2f} (target at most {TARGET}) for 16 "
        f"times the tokens and {rows[1]['blocks a request'] / rows[0]['blocks a request']:.2f} times the blocks; "
        f"kernels excluded: {compiling:.1f} s"
    )
    report("(c) outputs of 50 and 800 tokens", rows, notes)


if __name__ == "__main__":
    main()
