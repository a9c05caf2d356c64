"""Making, growing and re-configuring the arrays of a fleet."""

from __future__ import annotations

import math

import numpy as np

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.compiler.libraries import Library
from kavier_twin.simulation.kernels import POLICIES, TIERS
from kavier_twin.simulation.kernels import entries as kernels
from kavier_twin.simulation.settings import COEFFICIENTS, EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.state import FleetState, Records
from kavier_twin.simulation.versions import PROFILES
from kavier_twin.simulation.workload import Workload

ROUTERS = {
    "round_robin": layout.ROUND_ROBIN,
    "least_loaded": layout.LEAST_LOADED,
    "session_affinity": layout.SESSION_AFFINITY,
    "prefix_aware": layout.PREFIX_AWARE,
}
EVICTIONS = {
    "lru": layout.LRU,
    "fifo": layout.FIFO,
    "lfu": layout.LFU,
    "cost_aware": layout.COST_AWARE,
    "belady": layout.BELADY,
    "ttl": layout.TTL,
    "pinned": layout.PINNED,
    "slru": layout.SLRU,
    "arc": layout.ARC,
    "sieve": layout.SIEVE,
    "s3fifo": layout.S3FIFO,
}


_OF_THE_FLEET = ("fleet", "future", "holders", "pending", "homes", "outcomes")  # arrays without an axis of replicas


def new_state(settings: FleetSettings, *, stepping: bool = False, start_seconds: float = 0.0) -> FleetState:
    """An idle fleet with cold caches that begins at this time. `stepping` selects the reference that never jumps."""
    replicas, engine = settings.replicas, settings.engine
    slots, arena, outcomes = 64, 1 << 14, 256
    state = FleetState(
        fleet=np.zeros(1, layout.FLEET),
        replicas=np.zeros(replicas, layout.REPLICA),
        engines=np.zeros(replicas, layout.ENGINE),
        requests=np.zeros((replicas, slots), layout.REQUEST),
        slots=np.tile(np.arange(slots, dtype=np.int32)[::-1], (replicas, 1)),
        running=np.zeros((replicas, slots), np.int32),
        waiting=np.zeros((replicas, slots), np.int32),
        batches=np.zeros((replicas, 2), layout.BATCH),
        entries=np.zeros((replicas, 2, slots), layout.ENTRY),
        blocks=np.zeros((replicas, engine.num_gpu_blocks), layout.BLOCK),
        buckets=np.zeros((replicas, _bucket_count(engine.num_gpu_blocks)), np.int32),
        arena=np.zeros((replicas, arena), np.uint64),
        arena_free=np.full((replicas, layout.ARENA_CLASSES), -1, np.int64),
        explicit=np.zeros((replicas, slots), np.int32),
        flow=np.zeros((replicas, slots), np.int32),
        phases=_empty_phases(replicas, engine.block_size),
        **_tier_arrays(engine, replicas, slots),
        itl_counts=np.zeros((replicas, layout.ITL_BINS), np.int64),
        nodes=_empty_nodes(replicas, engine),
        future=np.zeros(1, layout.FUTURE),
        quiet_until=np.full(replicas, -np.inf),
        loads=np.zeros(replicas, np.int32),
        holders=np.zeros(1, np.uint8),
        pending=np.zeros(layout.PENDING, np.uint16),
        homes=np.zeros(layout.HOMES, np.int32),
        outcomes=np.zeros(outcomes, layout.OUTCOME),
    )
    state.fleet["router"] = ROUTERS[settings.router]
    state.fleet["max_imbalance"] = settings.router_max_imbalance
    for name in ("now", "accounted", "last_completion", "joined"):
        state.replicas[name] = start_seconds
    state.replicas["free_slots"] = slots
    state.replicas["free_blocks"] = engine.num_gpu_blocks - 1
    state.replicas["hold_until"] = -np.inf
    state.replicas["eviction"]["spare_ghost"] = 1
    state.replicas["left"] = np.inf
    state.replicas["accepting"] = 1
    state.replicas["alive"] = 1
    for number in range(replicas):
        write_engine(state.engines[number : number + 1], engine, settings.step_time, stepping=stepping)
        link_free_list(state.blocks[number], engine.num_gpu_blocks)
        _write_tier(state, number, engine)
    return _with_room_for_holders(state)


def kernels_of(engine: EngineSettings) -> list[Library]:
    """The libraries of kernels that such an engine needs beside those that every engine needs."""
    needed = [(POLICIES, engine.eviction != "lru"), (TIERS, engine.host_tier is not None)]
    return [library for library, is_needed in needed if is_needed]


def with_holders(state: FleetState) -> FleetState:
    """The fleet with its copies of blocks and its live requests counted anew, as far as its router needs them."""
    state = _with_room_for_holders(state)
    if state.holders.size > 1:
        kernels.count_all(state)
    return state


def _with_room_for_holders(state: FleetState) -> FleetState:
    size = 1
    if state.replicas.size > 1 and state.fleet["router"][0] == layout.PREFIX_AWARE:
        size = 1 << max(10, math.ceil(math.log2(state.blocks.size / 4)))  # four places for each that is counted
    if size != state.holders.size:
        state = state._replace(holders=np.zeros(size, np.uint8))
    return state


def _table_sizes(engine: EngineSettings) -> list[int]:
    """Records in the tables of `FleetState.chunks`: host tier (under arc with its ghosts), disk tier, offered keys."""
    host, disk = engine.host_tier, engine.disk_tier
    if host is None:
        return [0, 0, 0]
    chunks = engine.chunks_in(host.capacity_gib) * (3 if host.eviction_policy == "arc" else 1)
    on_disk = engine.chunks_in(disk.capacity_gib) if disk is not None else 0
    tracked = host.max_tracker_size if host.store_threshold >= 2 else 0
    return [layout.RINGS + size if size else 0 for size in (chunks, on_disk, tracked)]


def _tier_arrays(engine: EngineSettings, replicas: int, slots: int) -> dict[str, np.ndarray]:
    """The arrays of `FleetState` that tiers need, of one cell a replica where there are none."""
    tiered = engine.host_tier is not None
    return {
        "tiers": np.zeros(replicas, layout.TIER),
        "chunks": np.zeros((replicas, max(1, sum(_table_sizes(engine)))), layout.CHUNK),
        "fences": np.full((replicas, engine.num_gpu_blocks if tiered else 1), -1, np.int64),
        "tier_slots": np.zeros((replicas, 2, slots if tiered else 1), np.int32),
    }


def _write_tier(state: FleetState, number: int, engine: EngineSettings) -> None:
    """Cold tiers for one replica."""
    host, disk, tier = engine.host_tier, engine.disk_tier, state.tiers[number]
    tier["wake"] = np.inf
    tier["awaited_store"] = -1
    if host is None:
        return
    sizes = _table_sizes(engine)
    tier["disk_at"], tier["offers_at"] = sizes[0], sizes[0] + sizes[1]
    tier["chunks"] = engine.chunks_in(host.capacity_gib)
    tier["blocks_per_chunk"] = host.blocks_per_chunk
    tier["store_threshold"] = host.store_threshold
    tier["tracked"] = host.max_tracker_size
    tier["arc"] = host.eviction_policy == "arc"
    tier["prompt_only"] = host.offload_prompt_only
    tier["block_bytes"] = engine.kv_bytes_per_token * engine.block_size
    tier["host_latency"] = host.latency_seconds
    tier["host_rate"] = host.bytes_per_second
    if disk is not None:
        tier["disk_chunks"] = engine.chunks_in(disk.capacity_gib)
        tier["disk_latency"] = disk.latency_seconds
        tier["read_rate"] = disk.read_bytes_per_second
        tier["write_rate"] = disk.write_bytes_per_second
    for table in chunk_tables(state, number):
        if table.size:
            _clear_table(table)


def _clear_table(table: Records) -> None:
    """All chunks of a zeroed table vacant, in order; each ring's first record stands for the ring."""
    rings, chunks = np.arange(layout.RINGS), np.arange(layout.RINGS, table.size)
    for name in ("ring", "prev", "next"):
        table[name][rings] = rings
    table["ring"][chunks] = layout.VACANT
    order = np.array([layout.VACANT, *chunks])
    table["next"][order] = np.roll(order, -1)
    table["prev"][order] = np.roll(order, 1)
    table["refs"][layout.VACANT] = chunks.size


def chunk_tables(state: FleetState, number: int) -> list[Records]:
    """A replica's tables of host tier, disk tier and offered keys, empty where there are none."""
    tier = state.tiers[number]
    disk_at, offers_at = int(tier["disk_at"]), int(tier["offers_at"])
    chunks = state.chunks[number] if tier["chunks"] else state.chunks[number, :0]
    return [chunks[:disk_at], chunks[disk_at:offers_at], chunks[offers_at:]]


def with_tiers(state: FleetState, old: EngineSettings, new: EngineSettings) -> FleetState:
    """Every (settled) replica with the tiers of `new`, holding of what they held what still fits."""
    before = state
    state = state._replace(**_tier_arrays(new, state.replicas.size, state.requests.shape[1]))
    tokens = [
        engine.block_size * engine.host_tier.blocks_per_chunk for engine in (old, new) if engine.host_tier is not None
    ]
    for number in range(state.replicas.size):
        _write_tier(state, number, new)
        if len(tokens) == 2 and tokens[0] == tokens[1]:
            kernels.carry_over(before, state, number)
    for name in ("stored", "stores", "probed", "tier_rank"):
        state.requests[name] = 0
    return state


def _bucket_count(blocks: int) -> int:
    """Hash buckets for so many blocks: the power of two at or above, times four, so that few hold more than one."""
    return 1 << max(5, 2 + math.ceil(math.log2(blocks)))


def link_free_list(blocks: Records, count: int) -> None:
    """All blocks free, unhashed, in order 1 .. count - 1 (block 0 is the sentinel)."""
    order = np.arange(count, dtype=np.int32)
    blocks["next"][:count] = (order + 1) % count
    blocks["prev"][:count] = (order - 1) % count


def write_engine(row: Records, engine: EngineSettings, step_time: StepTime, *, stepping: bool) -> None:
    """Write settings into one row of `FleetState.engines`."""
    row["block_size"] = engine.block_size
    row["num_blocks"] = engine.num_gpu_blocks
    row["max_num_seqs"] = min(engine.max_num_seqs, engine.max_num_active_seqs or engine.max_num_seqs)
    row["max_num_batched_tokens"] = engine.max_num_scheduled_tokens or engine.max_num_batched_tokens
    row["max_model_len"] = engine.max_model_len
    row["long_prefill_token_threshold"] = engine.long_prefill_token_threshold
    row["watermark_blocks"] = int(engine.watermark * engine.num_gpu_blocks)
    row["prefix_caching"] = engine.prefix_caching
    row["async_scheduling"] = engine.async_scheduling
    row["chunked_prefill"] = engine.enable_chunked_prefill
    row["reserve_full_isl"] = engine.scheduler_reserve_full_isl
    row["priority_policy"] = engine.scheduling_policy == "priority"
    profile = PROFILES[engine.vllm]
    row["self_preemption_ends_pass"] = profile.self_preemption_ends_pass
    row["offload_ranks_by_request"] = profile.offload_ranks_by_request
    row["offload_offers_again"] = profile.offload_offers_again
    row["lora_counts_all_running"] = profile.lora_counts_all_running
    row["max_loras"] = engine.max_loras
    # What decodes write through has to be offered step by step.
    decodes_stored = engine.host_tier is not None and not engine.host_tier.offload_prompt_only
    row["stepping"] = stepping or decodes_stored
    row["eviction"] = EVICTIONS[engine.eviction]
    row["eviction_ttl_seconds"] = engine.eviction_ttl_seconds
    row["eviction_pinned_blocks"] = engine.eviction_pinned_tokens // engine.block_size
    row["eviction_pinned_most"] = int(engine.eviction_pinned_share * (engine.num_gpu_blocks - 1))
    budget = engine.max_num_batched_tokens
    whole = step_time.fixed + step_time.linear_scale * step_time.linear_seconds(budget)
    row["prefill_token_seconds"] = whole / budget + step_time.per_prefill_token
    for name in COEFFICIENTS:
        row[name] = getattr(step_time, name)
    row["knots"] = len(step_time.linear_layers)
    for at, (tokens, seconds) in enumerate(step_time.linear_layers):
        row["knot_tokens"][..., at] = tokens
        row["knot_seconds"][..., at] = seconds


def _empty_nodes(replicas: int, engine: EngineSettings) -> Records:
    """What an eviction policy keeps by block, with nothing in it; as good as none for LRU, which needs none."""
    if engine.eviction == "lru":
        return np.zeros((replicas, 1), layout.NODE)
    blocks = engine.num_gpu_blocks
    ghosts = engine.eviction in ("arc", "s3fifo")
    rows = _bucket_count(blocks + layout.QUEUES) if ghosts else blocks + layout.QUEUES
    nodes = np.zeros((replicas, rows), layout.NODE)
    nodes["place"] = -1
    _close_rings(nodes, layout.QUEUES)
    if ghosts:
        _close_rings(nodes["ghost"], 2)
        nodes["ghost"]["next"][:, 1 : blocks - 1] = np.arange(2, blocks)
    return nodes


def _close_rings(rows: Records, rings: int) -> None:
    """Each of the last `rings` rows is the sentinel of an empty ring."""
    for at in range(rows.shape[1] - rings, rows.shape[1]):
        rows["prev"][:, at] = rows["next"][:, at] = at


def with_eviction(state: FleetState, engine: EngineSettings, time_seconds: float) -> FleetState:
    """The fleet, whose engines are written and whose evictable blocks stand in the free lists, under its policy."""
    nodes = _empty_nodes(state.replicas.size, engine)
    state = state._replace(nodes=nodes, future=np.zeros(1, layout.FUTURE))
    state.replicas["eviction"] = np.zeros(1, layout.EVICTION)
    state.replicas["eviction"]["spare_ghost"] = 1
    if engine.eviction != "lru":
        for number in range(state.replicas.size):
            kernels.load_policy(state, number, time_seconds)
    return state


def _wider(array: np.ndarray, size: int) -> np.ndarray:
    """The same array with its last axis grown to `size`, zero-filled."""
    grown = np.zeros((*array.shape[:-1], size), array.dtype)
    grown[..., : array.shape[-1]] = array
    return grown


def with_more_slots(state: FleetState) -> FleetState:
    """Twice the request slots on every replica."""
    old = state.requests.shape[1]
    new = 2 * old
    slots = _wider(state.slots, new)
    for number, free in enumerate(state.replicas["free_slots"]):
        slots[number, free : free + old] = np.arange(new - 1, old - 1, -1)
    state.replicas["free_slots"] += old
    return state._replace(
        requests=_wider(state.requests, new),
        slots=slots,
        running=_wider(state.running, new),
        waiting=_wider(state.waiting, new),
        entries=_wider(state.entries, new),
        explicit=_wider(state.explicit, new),
        flow=_wider(state.flow, new),
        tier_slots=_wider(state.tier_slots, new) if state.tier_slots.shape[2] > 1 else state.tier_slots,
    )


def with_block_size(state: FleetState, block_size: int) -> FleetState:
    """The (settled) fleet ready for another block size."""
    return state._replace(phases=_empty_phases(state.replicas.size, block_size))


def _empty_phases(replicas: int, block_size: int) -> Records:
    phases = np.zeros((replicas, block_size), layout.PHASE)
    phases["first"] = phases["last"] = -1
    return phases


def with_replicas(state: FleetState, fresh: FleetState) -> FleetState:
    """The fleet and the replicas of `fresh` (same settings, nothing in them yet)."""
    fresh = _as_wide_as(state, fresh)
    columns = {}
    for name, array in state._asdict().items():
        added = getattr(fresh, name)
        if name in _OF_THE_FLEET:
            columns[name] = array
        else:
            columns[name] = np.concatenate([array, added])
    return with_holders(FleetState(**columns))


def begin_anew(state: FleetState, number: int, fresh: FleetState) -> None:
    """An empty replica becomes that of `fresh` (same settings); its counters go on."""
    fresh = _as_wide_as(state, fresh)
    names = layout.REPLICA.names or ()
    counters = list(names[names.index("steps") : names.index("eviction")])
    counted = {name: state.replicas[name][number].copy() for name in counters}
    for name, array in state._asdict().items():
        if name not in _OF_THE_FLEET and name != "itl_counts":
            array[number] = getattr(fresh, name)[0]
    for name, value in counted.items():
        state.replicas[name][number] = value
    with_holders(state)


def _as_wide_as(state: FleetState, fresh: FleetState) -> FleetState:
    while fresh.requests.shape[1] < state.requests.shape[1]:
        fresh = with_more_slots(fresh)
    while fresh.arena.shape[1] < state.arena.shape[1]:
        fresh = with_more_arena(fresh)
    return fresh


def with_pool(state: FleetState, num_blocks: int) -> FleetState:
    """Every (settled) replica's cache in a pool of another size."""
    replicas = state.replicas.size
    blocks = np.zeros((replicas, num_blocks), layout.BLOCK)
    buckets = np.zeros((replicas, _bucket_count(num_blocks)), np.int32)
    for number in range(replicas):
        old = state.blocks.shape[1]
        names, working = np.zeros(old, np.int32), np.zeros(old, np.uint64)
        kernels.resize_pool(state, number, blocks[number], buckets[number], num_blocks, names, working)
    return state._replace(blocks=blocks, buckets=buckets)


def rows_of_live(state: FleetState, number: int, delivered_seconds: float) -> Workload:
    """The requests a replica holds, as a workload that starts them again at `delivered_seconds`."""
    requests = state.requests[number]
    rows = requests[requests["state"] != layout.FREE]
    rows = rows[np.lexsort((rows["index"], rows["arrival"]))]
    starts = np.zeros(rows.size + 1, np.int64)
    np.cumsum(rows["chain_length"], out=starts[1:])
    chains = [state.arena[number, row["cells"] : row["cells"] + row["chain_length"]] for row in rows]
    return Workload(
        index=rows["index"].copy(),
        arrival=rows["arrival"].copy(),
        delivered=np.full(rows.size, delivered_seconds, np.float64),
        prompt=rows["prompt"].astype(np.int64),
        output=rows["output"].astype(np.int64),
        priority=rows["priority"].copy(),
        session=rows["session"].copy(),
        held=rows["held"].astype(np.int8),
        replica=np.full(rows.size, -1, np.int64),
        adapter=rows["adapter"].copy(),
        skips_lookup=rows["skips_lookup"].astype(np.int8),
        chain_starts=starts,
        chain=np.concatenate(chains) if chains else np.zeros(0, np.uint64),
        hash_tokens=rows["hash_tokens"].astype(np.int64),
        covered=rows["covered"].astype(np.int64),
    )


def with_more_arena(state: FleetState) -> FleetState:
    """Twice the arena cells on every replica."""
    return state._replace(arena=_wider(state.arena, 2 * state.arena.shape[1]))


def with_more_outcomes(state: FleetState) -> FleetState:
    """Twice the room for requests that ended."""
    return state._replace(outcomes=_wider(state.outcomes, 2 * state.outcomes.size))
