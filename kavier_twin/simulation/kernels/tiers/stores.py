"""What a replica writes through to its host tier, and what it tells the tier about a request that ends.

Follows vLLM 0.32 `distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py` (`_build_store_jobs`,
`build_connector_meta`) and `v1/kv_offload/cpu/manager.py` (`prepare_store`, `on_request_finished`), for full-attention
models without speculative decoding.

What a request did with each chunk is noted (`state.SEEN` ...) in cells at the end of its arena piece.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel, linked
from kavier_twin.simulation.kernels import TIERS
from kavier_twin.simulation.kernels.cache.keys import key_of, private_key
from kavier_twin.simulation.kernels.step.requests import give_back
from kavier_twin.simulation.kernels.tiers.chunks import count_offer, find, find_resident, host_of, move, offers_of
from kavier_twin.simulation.kernels.tiers.eviction import (
    enter,
    learn_miss,
    make_room,
    rank_with_request,
    renew,
    take_rank,
    use,
)
from kavier_twin.simulation.kernels.tiers.transfers import (
    decide_store,
    next_done,
    store_done,
    store_uid,
    submit_stores,
)
from kavier_twin.simulation.state import INSERTED, MISSED, OFFERED, REUSED, SEEN, FleetState

NO_FENCE = -1  # else twice the number of the store that reads a block, plus one once its request has ended
DROPPED = -1  # no room could be made: vLLM's allocation failure


@kernel
def chunk_key(tier, request, arena, chunk, block_size):
    """The key of a request's chunk: that of its last block, known by a hash of the trace or private."""
    block = (chunk + 1) * tier.blocks_per_chunk - 1
    if block < request.known:
        return key_of(arena, request.cells, request.hash_tokens, block, block_size)
    return private_key(request.uid, block)


@kernel
def marks_cell(request, chunk):
    """The arena cell with the marks of a request's chunk."""
    return request.cells + (1 << np.int64(request.cell_class)) - 1 - chunk


@kernel
def ranks_by_request(state, number):
    """Whether the host tier ranks the chunks of a live request together: `versions.Profile`."""
    return state.engines[number].offload_ranks_by_request and not state.tiers[number].arc


@kernel
def previous_chunk(state, number, slot, chunk):
    """The request's chunk before this one if it is in the host tier, else 0."""
    if chunk == 0:
        return 0
    request, arena, size = state.requests[number][slot], state.arena[number], state.engines[number].block_size
    return find_resident(host_of(state, number), chunk_key(state.tiers[number], request, arena, chunk - 1, size))


@kernel
def _count_offers(tier, tracker, request, arena, first, last, block_size):
    kept = tracker[0].refs
    for chunk in range(first, last):
        known = find(tracker, chunk_key(tier, request, arena, chunk, block_size))
        if known != 0:
            move(tracker, known, 0)
            tracker[known].refs += 1
            kept -= 1
    for chunk in range(first, last):
        key = chunk_key(tier, request, arena, chunk, block_size)
        if find(tracker, key) == 0:
            kept = count_offer(tracker, key, tier.tracked, kept)


@kernel
def _wanted(tier, tracker, key):
    """Whether a chunk was offered often enough."""
    if tier.store_threshold < 2:
        return True
    known = find(tracker, key)
    return known != 0 and tracker[known].refs >= tier.store_threshold


@kernel
def offer(state, number, slot, first, last, fence):
    """Offer a request's chunks [first, last) to the host tier; `fence` for their blocks, NO_FENCE if read from disk.

    Those that it takes are about to be written, linked in order. Returns the first of them (its `count` says how
    many), 0 if there is none, DROPPED if there is no room for all.
    """
    tier, request, arena = state.tiers[number], state.requests[number][slot], state.arena[number]
    host, size = host_of(state, number), state.engines[number].block_size
    tracker, fences = offers_of(state, number), state.fences[number]
    ranks = ranks_by_request(state, number)
    if fence != NO_FENCE:
        tier.offers += 1  # a promotion goes on with the number that the search for its request took
    stamp = np.int32(tier.offers & 0x7FFFFFFF)
    if tier.store_threshold >= 2:
        _count_offers(tier, tracker, request, arena, first, last, size)
    count = 0
    before = previous_chunk(state, number, slot, first) if ranks else 0
    for chunk in range(first, last):
        key, cell = chunk_key(tier, request, arena, chunk, size), marks_cell(request, chunk)
        held = find_resident(host, key)
        if held == 0:
            before = 0
            if _wanted(tier, tracker, key):
                if ranks:
                    take_rank(tier, request)
                arena[cell] |= np.uint64(SEEN | OFFERED)
                count += 1
            continue
        host[held].offer = stamp
        if host[held].refs >= 0:
            if ranks and not arena[cell] & np.uint64(SEEN):
                take_rank(tier, request)
                use(host, held, request, chunk, before)
            arena[cell] |= np.uint64(SEEN)
            if not arena[cell] & np.uint64(INSERTED):
                arena[cell] |= np.uint64(REUSED)
        before = held
    if count == 0:
        return 0
    for chunk in range(last - 1, first - 1, -1):
        cell = marks_cell(request, chunk)
        if arena[cell] & np.uint64(OFFERED) and not arena[cell] & np.uint64(MISSED):
            learn_miss(tier, host, chunk_key(tier, request, arena, chunk, size))
            arena[cell] |= np.uint64(MISSED)
    room = make_room(tier, host, count, stamp)
    head, tail = 0, 0
    before = previous_chunk(state, number, slot, first) if ranks else 0
    for chunk in range(first, last):
        cell = marks_cell(request, chunk)
        if not arena[cell] & np.uint64(OFFERED):
            continue
        arena[cell] &= ~np.uint64(OFFERED)
        if room:
            arena[cell] |= np.uint64(INSERTED)
            chunk_at = enter(tier, host, chunk_key(tier, request, arena, chunk, size))
            if ranks:
                rank_with_request(host, chunk_at, request, chunk, before)
                before = chunk_at
            if head == 0:
                head = chunk_at
            else:
                host[tail].link = chunk_at
            tail = chunk_at
            if fence != NO_FENCE:
                table = request.cells + request.chain_length + chunk * tier.blocks_per_chunk
                for block in range(tier.blocks_per_chunk):
                    fences[np.int64(arena[table + block])] = fence
    if not room:
        return DROPPED
    host[head].count = count
    return head


@kernel
def _store(state, number, slot, computed, ended):
    """Offer the full chunks of a request's first `computed` tokens that were not offered yet."""
    replica, tier, request = state.replicas[number], state.tiers[number], state.requests[number][slot]
    host = host_of(state, number)
    tokens = min(computed, request.tokens)
    if tier.prompt_only:
        tokens = min(tokens, request.prompt)
    last = tokens // (tier.blocks_per_chunk * state.engines[number].block_size)
    if last <= request.stored:
        return
    job = offer(state, number, slot, request.stored, last, 2 * tier.next_store + ended)
    if job == DROPPED:
        replica.dropped_stores += 1
        return
    if job > 0:
        host[job].slot = slot
        host[job].uid = request.uid
        host[job].number = tier.next_store
        decide_store(tier, host, job)
        request.stores += 1
        request.last_store = tier.next_store
        tier.next_store += 1
    request.stored = last


@kernel
def tell_ended(state, number):
    """Tell the host tier about the requests that ended, and give back their slots and cells."""
    tier, requests = state.tiers[number], state.requests[number]
    arena, size = state.arena[number], state.engines[number].block_size
    host, ended = host_of(state, number), state.tier_slots[number, 1]
    for place in range(tier.ended):
        request = requests[ended[place]]
        _store(state, number, ended[place], max(request.prompt, request.tokens - 1), 1)
    for place in range(tier.ended):
        slot = ended[place]
        request = requests[slot]
        for chunk in range(request.tokens // (tier.blocks_per_chunk * size) - 1, -1, -1):
            marks = arena[marks_cell(request, chunk)]
            if marks & np.uint64(SEEN):
                held = find_resident(host, chunk_key(tier, request, arena, chunk, size))
                if held != 0:
                    renew(tier, host, held, np.int64(marks))
        give_back(state, number, slot)
    tier.ended = 0


@kernel
def owes_store(tier, request, block_size):
    """Whether a request has chunks to offer even where it computes no more of its prompt: a store was dropped."""
    return tier.chunks > 0 and request.stored < request.prompt // (tier.blocks_per_chunk * block_size)


@kernel
def _fencing(fence):
    """The store that must be complete before a block with this fence is written, -1 = none."""
    return fence >> 1 if fence & 1 else np.int64(-1)


@kernel
def _fence_ended(state, number):
    """The blocks of requests that ended may be handed out while stores still read them: from now on their fences count.

    Those of a live request are its own, and what preempts it waits for its stores.
    """
    tier, requests, arena = state.tiers[number], state.requests[number], state.arena[number]
    host, fences, ended = host_of(state, number), state.fences[number], state.tier_slots[number, 1]
    for place in range(tier.ended):
        request = requests[ended[place]]
        if request.stores == 0:
            continue
        table = request.cells + request.chain_length
        store, own = np.int64(-1), False
        for at in range(request.stored * tier.blocks_per_chunk):
            block = np.int64(arena[table + at])
            if fences[block] >> 1 < tier.oldest_store:
                continue
            if fences[block] >> 1 != store:
                store = fences[block] >> 1
                own = store_uid(tier, host, store) == request.uid
            if own:
                fences[block] |= 1


@kernel
def _await_stores(state, number, entries, count, least):
    """Note which store from `least` on the batch just scheduled must wait for: it writes to what that reads."""
    replica, tier, requests = state.replicas[number], state.tiers[number], state.requests[number]
    if least == tier.next_store:
        return
    awaited = np.int64(-1)
    arena, fences, size = state.arena[number], state.fences[number], state.engines[number].block_size
    for at in range(count):
        request = requests[entries[at].slot]
        table = request.cells + request.chain_length
        # vLLM takes the blocks that a request was admitted with for new ones, prefix hits included.
        admitted = request.run_order >= tier.admitted_from
        kept = 0 if admitted else (request.computed - entries[at].tokens + size - 1) // size
        for block in range(kept, request.blocks):
            awaited = max(awaited, _fencing(fences[np.int64(arena[table + block])]))
    slot = state.phases[number][(replica.scheduled_batches + 1) % size].first
    while slot >= 0:
        request = requests[slot]
        newest = np.int64(arena[request.cells + request.chain_length + request.blocks - 1])
        awaited = max(awaited, _fencing(fences[newest]))
        slot = request.flow_next
    for place in range(replica.loading):
        request = requests[state.tier_slots[number, 0][place]]
        if request.load_done == np.inf:
            table = request.cells + request.chain_length
            for block in range(request.blocks):
                awaited = max(awaited, _fencing(fences[np.int64(arena[table + block])]))
    if awaited >= least:
        tier.awaited_store = max(tier.awaited_store, awaited)


@linked(TIERS)
def hand_over(state: FleetState, number: int, place: int, count: int, start: float) -> float:
    """What the connector does with the batch scheduled in `place`, to begin at `start`. Returns when it may begin.

    What the batch computes is offered, then what requests left behind that ended before.
    """
    replica, tier, host = state.replicas[number], state.tiers[number], host_of(state, number)
    entries = state.entries[number, place]
    submit_stores(replica, tier, host, start, tier.next_store)
    _fence_ended(state, number)
    _await_stores(state, number, entries, count, tier.oldest_store)
    for at in range(count):
        slot = entries[at].slot
        _store(state, number, slot, state.requests[number][slot].computed, 0)
    new = tier.next_store
    tell_ended(state, number)
    _await_stores(state, number, entries, count, new)
    if tier.awaited_store < tier.oldest_store:
        return start
    submit_stores(replica, tier, host, start, tier.awaited_store + 1)
    return max(start, store_done(tier, host, tier.awaited_store))


@linked(TIERS)
def rest(state: FleetState, number: int) -> None:
    """Nothing is in flight and nothing can be scheduled: look for completed transfers from now on."""
    replica, tier = state.replicas[number], state.tiers[number]
    _fence_ended(state, number)
    tell_ended(state, number)
    submit_stores(replica, tier, host_of(state, number), replica.now, tier.next_store)
    tier.resting = 1
    tier.wake = next_done(state, number)
    if tier.asked:
        tier.wake = min(tier.wake, replica.now + tier.disk_latency)
