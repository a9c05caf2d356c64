"""The eviction kernels driven as a plain cache of blocks of one size: keys one by one, hit or inserted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation import build, future
from kavier_twin.simulation import state as layout
from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.compiler.reference import by_reference
from kavier_twin.simulation.kernels.cache.blocks import allocate as allocate_lru
from kavier_twin.simulation.kernels.cache.blocks import find, insert, touch
from kavier_twin.simulation.kernels.cache.blocks import release as release_lru
from kavier_twin.simulation.kernels.cache.eviction import dispatch
from kavier_twin.simulation.kernels.cache.eviction.order import order_of
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime

FIRST_KEY = 1 << 40  # keys like those of chains: the low ten bits are free


@kernel
def _run(state, keys, table, hits):
    state = by_reference(state)
    order = order_of(state, 0)
    lru = order.engine.eviction == layout.LRU
    for at in range(keys.size):
        block = find(order.blocks, order.buckets, keys[at])
        hits[at] = block != 0
        if block != 0:
            if lru:
                touch(order.replica, order.blocks, block)
            else:
                dispatch.hit(order, block, 0, float(at), at)
        else:
            if lru:
                allocate_lru(order.replica, order.blocks, order.buckets, state.holders, table, 0, 1)
            else:
                dispatch.recall(order, keys[at])  # as in the papers: the content is known before room is made
                dispatch.allocate(order, table, 0, 1)
            block = np.int64(table[0])
            insert(order.blocks, order.buckets, block, keys[at])
            if not lru:
                dispatch.entered(order, block, 0, float(at), at)
        if lru:
            release_lru(order.replica, order.blocks, block)
        else:
            dispatch.release(order, block)


def run_cache(policy: str, capacity: int, objects: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which accesses hit, in a cache of `capacity` blocks."""
    engine = EngineSettings(num_gpu_blocks=capacity + 1, eviction=policy)
    state = build.new_state(FleetSettings(engine=engine, step_time=StepTime(fixed=8192.0)))
    keys = FIRST_KEY + objects.astype(np.uint64) * np.uint64(1024)
    if policy == "belady":
        at = np.arange(keys.size)
        known = future.foresee_keys(keys, at, at.astype(np.float64), at, 0)
        state = state._replace(future=known.rows)
    hits = np.zeros(keys.size, np.bool_)
    _run(state, keys, np.zeros(1, np.uint64), hits)
    return hits
