"""What the benchmarks share: timing, reporting, the engine they measure, the workload they generate."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.workload import Workload, make_workload

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Timing:
    """The best of several repetitions, compilation excluded."""

    cpu_seconds: float
    wall_seconds: float


def timed(work: Callable[[], Any], repetitions: int = 3) -> Timing:
    """Time `work`, which was run once before so that its kernels are compiled."""
    best = Timing(float("inf"), float("inf"))
    for _ in range(repetitions):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        taken = Timing(time.process_time() - cpu, time.perf_counter() - wall)
        best = min(best, taken, key=lambda timing: timing.cpu_seconds)
    return best


def compile_kernels(settings: FleetSettings = DEFAULT_FLEET) -> float:
    """Compile (or load from the cache) every kernel a run needs. Returns the seconds it took."""
    start = time.perf_counter()
    simulate(settings, shared_prefix_workload(50, 10.0, 1000, 50, groups=20, shared_tokens=512))
    return time.perf_counter() - start


def shared_prefix_workload(
    requests: int,
    rate_per_second: float,
    prompt_tokens: int,
    output_tokens: int,
    *,
    groups: int,
    shared_tokens: int,
    seed: int = 1,
    first: int = 0,
) -> Workload:
    """Poisson arrivals; each prompt begins with the prefix of one of `groups` and goes on with content of its own.

    Requests count from `first`: two parts of one workload share prefixes, not what is their own.
    """
    rng = np.random.default_rng(seed)
    blocks, shared = prompt_tokens // BLOCK_TOKENS, shared_tokens // BLOCK_TOKENS
    group = rng.integers(0, groups, requests)
    chain = np.empty((requests, blocks), np.uint64)
    chain[:, :shared] = group[:, None] * shared + np.arange(shared) + 1
    own = requests * (blocks - shared)
    chain[:, shared:] = (1 << 32) + first * (blocks - shared) + np.arange(own).reshape(requests, blocks - shared)
    return make_workload(
        np.cumsum(rng.exponential(1.0 / rate_per_second, requests)),
        prompt_tokens,
        output_tokens,
        chain=chain.ravel(),
        chain_starts=np.arange(requests + 1) * blocks,
        hash_tokens=BLOCK_TOKENS,
        covered=blocks * BLOCK_TOKENS,
    )


def run_to_end(settings: FleetSettings, workload: Workload) -> Fleet:
    """Simulate, and make sure that everything came out at the end."""
    fleet = simulate(settings, workload)
    outcomes = fleet.collect()
    if outcomes.size != workload.index.size or (outcomes["status"] != 0).any():
        raise RuntimeError("the benchmark's workload was not served whole: it measures something else")
    return fleet


def report(title: str, rows: list[dict[str, Any]], notes: str) -> None:
    """Print a table for people and one JSON object for machines."""
    console = Console(width=180)
    table = Table(*rows[0].keys(), title=title)
    for row in rows:
        table.add_row(
            *(
                f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
                for value in row.values()
            )
        )
    console.print(table)
    console.print(notes, highlight=False)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": title, "rows": rows, "notes": notes, "machine": machine}))
