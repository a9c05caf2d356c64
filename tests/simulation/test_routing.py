"""Prefix-aware routing looks at few caches and brings few replicas up to date. It decides as if it did with all."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from effort import examples
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.kernels.cache.blocks import find
from kavier_twin.simulation.kernels.entries import advance_all
from kavier_twin.simulation.settings import EngineSettings, FleetSettings
from kavier_twin.simulation.workload import Workload, make_workload
from simulation.test_closed_loop import STEP_TIME


@st.composite
def sessions(draw: st.DrawFn) -> tuple[FleetSettings, Workload]:
    """Turns of sessions that share system prompts, on small caches; some come while the turn before is served."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    size, coarse = draw(st.sampled_from([4, 16])), draw(st.sampled_from([1, 4]))
    engine = EngineSettings(
        block_size=size,
        num_gpu_blocks=draw(st.integers(120, 600)),
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.sampled_from([64, 2048])),
        prefix_caching=draw(st.sampled_from([True, True, True, False])),
        async_scheduling=draw(st.booleans()),
        eviction=draw(st.sampled_from(["lru", "lru", "lfu", "ttl"])),
        eviction_ttl_seconds=0.5,
    )
    settings = FleetSettings(
        replicas=draw(st.integers(2, 6)),
        engine=engine,
        step_time=STEP_TIME,
        router="prefix_aware",
        router_max_imbalance=draw(st.integers(0, 3)),
    )
    tokens, count = size * coarse, draw(st.integers(2, 60))
    contents: list[list[int]] = [[]]
    prompt, output, chain, session = [], [], [], []
    for number in range(count):
        before = contents[rng.integers(0, len(contents))]
        known = before[: rng.integers(0, len(before) + 1)] if rng.random() < 0.3 else before
        hashes = [*known, *rng.integers(1, 6, rng.integers(0, 8)).tolist()][: 100 // coarse]
        contents.append(hashes)
        output.append(int(rng.integers(1, 3 * size)))
        prompt.append(max(1, len(hashes) * tokens + int(rng.integers(0, tokens)) - int(rng.integers(0, output[-1]))))
        chain.append(hashes)
        session.append(int(rng.integers(0, 4)) if rng.random() < 0.8 else -1 - number)
    workload = make_workload(
        np.cumsum(rng.exponential(draw(st.sampled_from([0.002, 0.02, 0.2])), count)),
        prompt,
        output,
        chain=np.array([key for hashes in chain for key in hashes], np.uint64),
        chain_starts=np.cumsum([0, *map(len, chain)]),
        hash_tokens=tokens,
        covered=[len(hashes) * tokens for hashes in chain],
        session=session,
    )
    return settings, workload


def expected(fleet: Fleet, workload: Workload, row: int) -> int:
    """Where the request goes by the definition: everything brought up to date and looked at."""
    state, settings = fleet.fork().state, fleet.settings
    advance_all(state, float(workload.delivered[row]))
    loads = state.replicas["running"] + state.replicas["waiting"] + state.replicas["loading"]
    size, tokens = settings.engine.block_size, int(workload.hash_tokens[row])
    keys = workload.chain[workload.chain_starts[row] : workload.chain_starts[row + 1]]
    most = int(min(workload.covered[row], workload.prompt[row])) // size if settings.engine.prefix_caching else 0
    found = []
    for number in np.flatnonzero(state.replicas["accepting"]):
        match = 0
        while match < most:
            last = (match + 1) * size - 1
            key = keys[last // tokens] + np.uint64(last % tokens // size)
            if find(state.blocks[number], state.buckets[number], key) == 0:
                break
            match += 1
        found.append((-match, int(loads[number]), int(number)))
    limit = min(load for _, load, _ in found) + settings.router_max_imbalance
    return min(one for one in found if one[1] <= limit)[2]


@given(played=sessions(), leaves=st.booleans())
@examples(150)
def test_it_decides_as_if_it_looked_at_all(played: tuple[FleetSettings, Workload], leaves: bool) -> None:
    settings, workload = played
    fleet = Fleet(settings)
    for row in range(workload.index.size):
        if leaves and row == workload.index.size // 2:
            fleet.dismiss(0)
        wanted = expected(fleet, workload, row)
        assert fleet.deliver(workload, row, row + 1)[0, 0] == wanted, row
