"""(f) Peak memory of one million requests: the workload of (a), fed in parts of 20,000.

The process that measures is a fresh one: its peak is what the operating system says it held at most.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.common import compile_kernels, report, shared_prefix_workload
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.kpis import Counters, kpis
from kavier_twin.simulation.runs import simulate_parts
from kavier_twin.simulation.workload import Workload

REQUESTS = 1_000_000
PART = 20_000
TARGET_MEBIBYTES = 500
_MEASURE = "measure"


def parts() -> Iterator[Workload]:
    """One million requests, 20,000 at a time."""
    begin = 0.0
    for number in range(REQUESTS // PART):
        first = number * PART
        part = shared_prefix_workload(PART, 10.0, 1000, 200, groups=20, shared_tokens=512, seed=number, first=first)
        yield part._replace(index=part.index + first, arrival=part.arrival + begin, delivered=part.delivered + begin)
        begin += float(part.arrival[-1])


def measure() -> None:
    """Run it and print the peak in bytes, how much of that was there before, CPU seconds and mean TTFT."""
    compile_kernels()
    before = _peak_bytes()
    cpu = time.process_time()
    fleet, outcomes = simulate_parts(DEFAULT_FLEET, parts())
    result = kpis(outcomes, None, Counters.of(fleet.state, fleet.now_seconds), start_seconds=0.0)
    if result.requests_finished != REQUESTS:
        raise RuntimeError("the benchmark's workload was not served whole: it measures something else")
    print(_peak_bytes(), before, time.process_time() - cpu, result.ttft_seconds.mean)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Measure in a process of its own."""
    compile_kernels()  # so that compiling does not count
    command = [sys.executable, "-m", "benchmarks.memory", _MEASURE]
    peak, before, cpu, ttft = map(float, subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split())
    mebibyte = 2.0**20
    row = {
        "requests": REQUESTS,
        "peak MiB": peak / mebibyte,
        "target": TARGET_MEBIBYTES,
        "of it Python, libraries, kernels MiB": before / mebibyte,
        "CPU s": cpu,
        "mean TTFT s": ttft,
    }
    report("(f) peak memory of one million requests", [row], f"fed in parts of {PART:,}; KPIs are of all requests")


if __name__ == "__main__":
    if sys.argv[1:] == [_MEASURE]:
        measure()
    else:
        main()
