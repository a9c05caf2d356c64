"""Another policy for a live fleet. What a real vLLM would do only after a restart is done in place."""

from __future__ import annotations

import numpy as np

from kavier_twin.simulation import build
from kavier_twin.simulation.compiler.libraries import load
from kavier_twin.simulation.data_plane import DataPlane
from kavier_twin.simulation.kernels import entries as kernels
from kavier_twin.simulation.settings import FleetSettings


def switch_policy(plane: DataPlane, new: FleetSettings) -> None:
    """Let all engines and the router go on with these settings; the number of replicas stays.

    A smaller cache drops its least recently used blocks; another block size clears the cache and preempts all.
    Tiers keep what still fits, as long as their chunks hold the same tokens; transfers under way are done at once.
    Another eviction policy takes over what is cached, in the order in which the present one would evict it; so
    does the same policy in a pool of another size, which knows nothing of the past either.
    """
    old = plane.settings
    load(*build.kernels_of(old.engine), *build.kernels_of(new.engine))
    replicas = range(plane.state.replicas.size)
    resized = new.engine.num_gpu_blocks != old.engine.num_gpu_blocks
    reblocked = new.engine.block_size != old.engine.block_size
    disruptive = reblocked or resized or new.engine.async_scheduling != old.engine.async_scheduling
    new_tiers = (disruptive and old.engine.host_tier is not None) or (
        new.engine.host_tier != old.engine.host_tier
        or new.engine.disk_tier != old.engine.disk_tier
        or (new.engine.host_tier is not None and new.engine.chunk_bytes != old.engine.chunk_bytes)
    )
    reordered = reblocked or resized or new.engine.eviction != old.engine.eviction
    for number in replicas:
        if disruptive or new_tiers:
            plane.room_for_outcomes()
            kernels.settle(plane.state, number)
            if old.engine.host_tier is not None:
                kernels.settle_tiers(plane.state, number)
        else:
            kernels.dissolve_flow(plane.state, number)
        if reordered and old.engine.eviction != "lru":
            kernels.unload_policy(plane.state, number)
    if reblocked:
        for number in replicas:
            while plane.state.replicas["running"][number] > 0:
                kernels.preempt_last(plane.state, number)
            kernels.clear_cache(plane.state, number)
    if resized:
        plane.state = build.with_pool(plane.state, new.engine.num_gpu_blocks)
    for number in replicas:
        build.write_engine(plane.state.engines[number : number + 1], new.engine, new.step_time, stepping=plane.stepping)
        plane.state.replicas["parked"][number] = 0
        plane.state.quiet_until[number] = -np.inf
        kernels.reorder_queue(plane.state, number)
    if reblocked:
        plane.state = build.with_block_size(plane.state, new.engine.block_size)
        plane.state.requests["known"] = plane.state.requests["covered"] // new.engine.block_size
    if new_tiers:
        plane.state = build.with_tiers(plane.state, old.engine, new.engine)
    if new_tiers or reblocked:
        for live in plane.live():  # smaller blocks need longer block tables, tiers room for marks
            plane.set_output(live, int(plane.state.requests["output"][live.replica, live.slot]))
            if new.engine.host_tier is not None:
                kernels.clear_marks(plane.state, live.replica, live.slot)
    if reordered:
        plane.state = build.with_eviction(plane.state, new.engine, plane.now_seconds)
    plane.state.fleet["router"] = build.ROUTERS[new.router]
    plane.state.fleet["max_imbalance"] = new.router_max_imbalance
    plane.state = build.with_holders(plane.state)
    plane.settings = new
    if reordered:
        plane.foresee(plane.pending())
