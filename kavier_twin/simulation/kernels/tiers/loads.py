"""Requests that wait for a tier: what the tiers hold for them, loads, and their way back into the schedule.

Follows vLLM 0.32 `distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py` (`get_num_new_matched_tokens`,
`update_state_after_alloc`), `v1/kv_offload/tiering/manager.py` (`lookup`) and `v1/core/sched/scheduler.py`
(WAITING_FOR_REMOTE_KVS and the queue of waiting requests that hold blocks), for full-attention models.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel, linked
from kavier_twin.simulation.kernels import TIERS
from kavier_twin.simulation.kernels.cache.eviction.stranded import stranded_blocks
from kavier_twin.simulation.kernels.step import queue
from kavier_twin.simulation.kernels.step.requests import (
    add_blocks,
    count_hits,
    free_blocks,
    lookup,
    register,
    take_hits,
)
from kavier_twin.simulation.kernels.tiers.chunks import disk_of, find, find_resident, host_of, move
from kavier_twin.simulation.kernels.tiers.eviction import take_rank, use
from kavier_twin.simulation.kernels.tiers.stores import (
    NO_FENCE,
    chunk_key,
    marks_cell,
    offer,
    previous_chunk,
    ranks_by_request,
)
from kavier_twin.simulation.kernels.tiers.transfers import observe_copies, observe_disk, submit_read, unpin
from kavier_twin.simulation.state import (
    FROM_DISK,
    INSERTED,
    LOADING,
    LRU,
    PREEMPTED,
    RECENT,
    REUSED,
    SEEN,
    WAITING,
    FleetState,
)

NOTHING = 0
DEFERRED = 1  # the answer, or a transfer, has to be waited for: others may go first
BEGUN = 2
NO_ROOM = 3


@kernel
def _promote(state, number, slot, chunk, first):
    """Fetch a chunk from disk into host memory. Returns the first chunk of the request's transfer, 0 on failure."""
    host = host_of(state, number)
    stored = offer(state, number, slot, chunk, chunk + 1, NO_FENCE)
    if stored <= 0:
        return 0
    request, arena = state.requests[number][slot], state.arena[number]
    arena[marks_cell(request, chunk)] |= np.uint64(FROM_DISK)
    if first == 0:
        host[stored].count = 1
        return stored
    # Behind the first of this transfer: their order does not matter.
    host[stored].link = host[first].link
    host[first].link = stored
    host[first].count += 1
    return first


@kernel
def _search(state, number, slot, local):
    """Tokens that the tiers can add to `local` tokens found in the GPU's cache, -1 if that has to be waited for."""
    replica, tier, request = state.replicas[number], state.tiers[number], state.requests[number][slot]
    host, disk, arena = host_of(state, number), disk_of(state, number), state.arena[number]
    block_size = state.engines[number].block_size
    chunk_tokens = tier.blocks_per_chunk * block_size
    first, last = local // chunk_tokens, request.tokens // chunk_tokens
    if last * chunk_tokens - local < chunk_tokens:
        return 0
    hits, deferred, asked, read = first, False, False, 0
    tier.offers += 1
    stamp = np.int32(tier.offers & 0x7FFFFFFF)
    for chunk in range(first, last):
        key = chunk_key(tier, request, arena, chunk, block_size)
        held = find_resident(host, key)
        if held != 0:
            hits += 1
            deferred = deferred or host[held].refs < 0
            # Promoting the rest must not evict it: in vLLM a prompt longer than the host tier would promote for ever.
            host[held].offer = stamp
            continue
        if tier.disk_chunks == 0:
            break
        if not request.probed:
            asked = True
            continue
        copy = find(disk, key)
        if copy == 0:
            break
        started = _promote(state, number, slot, chunk, read)
        if started == 0:
            break
        read = started
        move(disk, copy, RECENT)
        hits += 1
        deferred = True
    if read != 0:
        submit_read(replica, tier, host, read, replica.now)
    if asked:
        request.probed = 1
        tier.asked = 1
    if deferred or asked:
        return -1
    tokens = hits * chunk_tokens - local
    if hits == first or tokens < chunk_tokens:
        return 0
    if state.engines[number].prefix_caching:
        for chunk in range(first, hits):
            # Somebody loads it already: soon it will be in the GPU's cache.
            if host[find_resident(host, chunk_key(tier, request, arena, chunk, block_size))].loads > 0:
                return -1
    return tokens


@kernel
def _reserved_blocks(state, number):
    """Blocks that requests not yet through their prompt still need (vLLM `_inflight_prefill_reserved_blocks`)."""
    replica, engine, requests = state.replicas[number], state.engines[number], state.requests[number]
    size, total = engine.block_size, 0
    for place in range(replica.explicit):  # the flow's requests are through
        request = requests[state.explicit[number][place]]
        if request.prefilling:
            whole = (min(request.tokens, engine.max_model_len) + size - 1) // size
            total += max(0, whole - request.blocks)
    for place in range(replica.loading):
        request = requests[state.tier_slots[number, 0][place]]
        whole = (min(request.tokens, engine.max_model_len) + size - 1) // size
        total += max(0, whole - request.blocks)
    return total


@linked(TIERS)
def begin_load(state: FleetState, number: int, slot: int) -> int:
    """Look into the tiers for the waiting request at hand; begin to load what they hold.

    Returns NOTHING (compute it), DEFERRED, BEGUN or NO_ROOM. The caller takes it out of the queue where it began.
    """
    replica, engine, tier = state.replicas[number], state.engines[number], state.tiers[number]
    blocks, buckets = state.blocks[number], state.buckets[number]
    arena, request, size = state.arena[number], state.requests[number][slot], engine.block_size
    if engine.offload_offers_again:
        request.stored = 0
    if request.stores > 0:
        return DEFERRED
    if request.skips_lookup:
        return NOTHING
    hits, evictable = 0, 0
    if engine.prefix_caching:
        hits, evictable, _ = lookup(request, blocks, buckets, arena, size)
    tokens = _search(state, number, slot, hits * size)
    if tokens < 0:
        return DEFERRED
    if tokens == 0:
        return NOTHING
    watermark = engine.watermark_blocks if replica.running > 0 else 0
    if engine.reserve_full_isl:
        whole = (min(request.tokens, engine.max_model_len) + size - 1) // size
        if max(whole - hits, 0) + evictable + watermark > replica.free_blocks:
            return NO_ROOM
    needed = tokens // size
    if needed + evictable + watermark > replica.free_blocks - _reserved_blocks(state, number):
        return NO_ROOM
    if engine.eviction != LRU and engine.prefix_caching and request.preemptions == 0 and not request.counted:
        replica.stranded_tokens += size * stranded_blocks(state, number, request, hits)
    take_hits(state, number, request, hits)
    add_blocks(state, number, request, needed)
    request.computed = hits * size + tokens
    _pin(state, number, slot, hits)
    if request.preemptions == 0 and not request.counted:
        count_hits(replica, request, hits * size)
        request.external = tokens
        from_disk = _tokens_from_disk(tier, request, arena, hits * size, size)
        replica.external_query_tokens += request.tokens - hits * size
        replica.disk_hit_tokens += from_disk
        replica.host_hit_tokens += tokens - from_disk
    request.prefilling = 1
    _join_loading(state, number, slot)
    return BEGUN


@kernel
def _pin(state, number, slot, hits):
    """The chunks to load stay where they are until they are loaded."""
    tier, request, arena = state.tiers[number], state.requests[number][slot], state.arena[number]
    host, size = host_of(state, number), state.engines[number].block_size
    request.load_first = hits // tier.blocks_per_chunk
    request.load_last = request.computed // (size * tier.blocks_per_chunk)
    request.stored = request.load_last
    ranks = ranks_by_request(state, number)
    before = previous_chunk(state, number, slot, request.load_first) if ranks else 0
    for chunk in range(request.load_first, request.load_last):
        held = find_resident(host, chunk_key(tier, request, arena, chunk, size))
        if host[held].refs == 0:
            tier.idle -= 1
        host[held].refs += 1
        host[held].loads += 1
        cell = marks_cell(request, chunk)
        if ranks and not arena[cell] & np.uint64(SEEN):
            take_rank(tier, request)
            use(host, held, request, chunk, before)
        before = held
        if not arena[cell] & np.uint64(INSERTED):
            arena[cell] |= np.uint64(REUSED)
        arena[cell] |= np.uint64(SEEN)


@kernel
def _tokens_from_disk(tier, request, arena, local, block_size):
    size, tokens = tier.blocks_per_chunk * block_size, 0
    for chunk in range(request.load_first, request.load_last):
        if arena[marks_cell(request, chunk)] & np.uint64(FROM_DISK):
            tokens += (chunk + 1) * size - max(local, chunk * size)
    return tokens


@kernel
def _join_loading(state, number, slot):
    """To the end of the requests that load; under the priority policy to its place among them."""
    replica, requests, loading = state.replicas[number], state.requests[number], state.tier_slots[number, 0]
    state.tiers[number].begun = 1
    requests[slot].state = LOADING
    requests[slot].arrived = 0
    requests[slot].load_done = np.inf
    place = replica.loading
    by_priority = state.engines[number].priority_policy
    if by_priority:
        while place > 0 and queue.before(requests, by_priority, slot, loading[place - 1]):
            loading[place] = loading[place - 1]
            place -= 1
    loading[place] = slot
    replica.loading += 1


@kernel
def leave_loading(state, number, slot):
    """Take a request out of those that load. What it holds is the caller's."""
    replica, loading = state.replicas[number], state.tier_slots[number, 0]
    place = 0
    while loading[place] != slot:
        place += 1
    for after in range(place, replica.loading - 1):
        loading[after] = loading[after + 1]
    replica.loading -= 1


@kernel
def _unpin_load(state, number, slot):
    tier, request, arena = state.tiers[number], state.requests[number][slot], state.arena[number]
    host, size = host_of(state, number), state.engines[number].block_size
    for chunk in range(request.load_first, request.load_last):
        unpin(tier, host, find_resident(host, chunk_key(tier, request, arena, chunk, size)), True)


@kernel
def break_off(state, number, slot):
    """A request that loads gives up: its blocks go back."""
    request = state.requests[number][slot]
    leave_loading(state, number, slot)
    if not request.arrived:
        _unpin_load(state, number, slot)
    free_blocks(state, number, request)
    request.computed = 0
    request.state = PREEMPTED if request.preemptions > 0 else WAITING


@kernel
def observe_loads(state, number, until):
    """The scheduler learns of the loads complete by `until`."""
    replica, requests, loading = state.replicas[number], state.requests[number], state.tier_slots[number, 0]
    for place in range(replica.loading):
        request = requests[loading[place]]
        if not request.arrived and request.load_done <= until:
            request.arrived = 1
            _unpin_load(state, number, loading[place])


@linked(TIERS)
def observe(state: FleetState, number: int, until: float, time: float) -> None:
    """At `time` the scheduler learns of the copies between GPU and host that were complete by `until`."""
    observe_copies(state, number, until, time)
    observe_loads(state, number, until)


@linked(TIERS)
def look(state: FleetState, number: int) -> None:
    """What the scheduler learns about transfers as it begins to schedule."""
    replica, tier = state.replicas[number], state.tiers[number]
    if tier.resting:
        observe(state, number, replica.now, replica.now)
        tier.resting = 0
    observe_disk(state, number, replica.now)
    tier.wake = np.inf
    tier.asked = 0
    tier.begun = 0
    tier.awaited_store = -1
    tier.admitted_from = replica.next_run_order


@kernel
def enter_loaded(state, number, slot):
    """The blocks of a request whose load is complete enter the GPU's prefix cache, once."""
    engine, request = state.engines[number], state.requests[number][slot]
    if engine.prefix_caching:
        full = request.computed // engine.block_size
        register(state, number, request, full)
    # The last token goes through the model anyway, so that the next can be sampled.
    request.computed = min(request.computed, request.tokens - 1)


@linked(TIERS)
def may_go_on(state: FleetState, number: int) -> bool:
    """Whether a request that holds blocks already may be scheduled: its load is complete."""
    replica, requests, loading = state.replicas[number], state.requests[number], state.tier_slots[number, 0]
    for place in range(replica.loading):
        if requests[loading[place]].arrived:
            return True
    return False
