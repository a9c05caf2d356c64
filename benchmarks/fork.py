"""(d) Forking a replica whose cache holds one million blocks: a memory copy, at most 20 ms."""

from __future__ import annotations

import numpy as np

from benchmarks.common import report, timed
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.policies import apply_overrides
from kavier_twin.simulation.state import UNHASHED, state_bytes
from kavier_twin.simulation.workload import make_workload

BLOCKS = 1_000_000
TARGET_MS = 20.0


def main() -> None:
    """Fill the cache with a million different blocks, then fork."""
    settings = apply_overrides(DEFAULT_FLEET, {"num_gpu_blocks": BLOCKS + 2})
    requests, prompt_tokens = 500, 16 * BLOCKS // 500
    chain = np.arange(1, BLOCKS + 1, dtype=np.uint64)
    workload = make_workload(
        np.arange(requests) * 5.0,
        prompt_tokens,
        1,
        chain=chain,
        chain_starts=np.arange(requests + 1) * (BLOCKS // requests),
        hash_tokens=16,
        covered=prompt_tokens,
    )
    fleet = Fleet(settings)
    fleet.feed(workload)
    fleet.run()
    cached = int((fleet.state.blocks["key"] != UNHASHED).sum())
    fleet.fork()
    timing = timed(fleet.fork, 20)
    rows = [
        {
            "cached blocks": cached,
            "state MB": state_bytes(fleet.state) / 1e6,
            "CPU ms": 1e3 * timing.cpu_seconds,
            "wall ms": 1e3 * timing.wall_seconds,
            "target ms": TARGET_MS,
        }
    ]
    report("(d) fork of a replica", rows, "the best of 20 forks")


if __name__ == "__main__":
    main()
