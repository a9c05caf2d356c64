"""Changing a replica's KV cache while it holds requests and cached blocks."""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.blocks import allocate, enter, forget, insert
from kavier_twin.simulation.kernels.step import queue
from kavier_twin.simulation.kernels.step.flow import list_explicit
from kavier_twin.simulation.kernels.step.scheduler import preempt
from kavier_twin.simulation.kernels.tiers.chunks import disk_of, host_of, put
from kavier_twin.simulation.state import FREQUENT, RECENT


@kernel
def preempt_last(state, number):
    """Preempt the last running request (the replica is settled: nothing is in flight)."""
    replica = state.replicas[number]
    replica.running -= 1
    preempt(state, number, state.running[number][replica.running])
    list_explicit(state, number)
    state.quiet_until[number] = -np.inf
    replica.parked = 0


@kernel
def clear_cache(state, number):
    """Forget everything cached. Blocks in use keep their content for their own requests only."""
    replica, blocks, buckets = state.replicas[number], state.blocks[number], state.buckets[number]
    for block in range(1, state.engines[number].num_blocks):
        if blocks[block].refs == 0:
            forget(replica, blocks, buckets, block)


@kernel
def resize_pool(state, number, blocks, buckets, new_count, names, working):
    """Move a settled replica's cache into `blocks` and `buckets`, zeroed arrays for `new_count` blocks.

    The least recently used evictable blocks go first when it shrinks, then running requests from the last; new
    blocks come to the head of the free list when it grows. `names` (zeroed) and `working` are working space, one cell
    for each old block.
    """
    replica, engine = state.replicas[number], state.engines[number]
    old_blocks, old_buckets = state.blocks[number], state.buckets[number]
    old_count = engine.num_blocks
    while old_count - 1 - replica.free_blocks > new_count - 1 and replica.running > 0:
        preempt_last(state, number)
    # names[b] is the new number of old block b, -1 = dropped
    drop = max(0, old_count - new_count)
    drop = min(drop, replica.free_blocks)
    allocate(replica, old_blocks, old_buckets, state.holders, working, 0, drop)
    for at in range(drop):
        names[working[at]] = -1
    named = 0
    for block in range(1, old_count):
        if names[block] == 0:
            named += 1
            names[block] = named
            blocks[named].refs = old_blocks[block].refs
            blocks[named].key = old_blocks[block].key
    last = 0
    for fresh in range(named + 1, new_count):
        blocks[last].next = fresh
        blocks[fresh].prev = last
        last = fresh
        replica.free_blocks += 1
    block = old_blocks[0].next
    while block != 0:
        blocks[last].next = names[block]
        blocks[names[block]].prev = last
        last = names[block]
        block = old_blocks[block].next
    blocks[last].next = 0
    blocks[0].prev = last
    for bucket in range(old_buckets.size):
        length = 0
        block = old_buckets[bucket]
        while block != 0:
            working[length] = np.uint64(block)
            length += 1
            block = old_blocks[block].chain
        for at in range(length - 1, -1, -1):  # oldest first, so that the order among equal keys stays
            name = working[at]
            insert(blocks, buckets, names[name], old_blocks[name].key)
    running, arena = state.running[number], state.arena[number]
    for place in range(replica.running):
        request = state.requests[number][running[place]]
        table = request.cells + request.chain_length
        for at in range(request.blocks):
            arena[table + at] = np.uint64(names[np.int64(arena[table + at])])
    engine.num_blocks = new_count


@kernel
def enter_blocks(state, number, blocks, content):
    """These blocks, which hold nothing, hold what these keys name."""
    for at in range(blocks.size):
        enter(state.blocks[number], state.buckets[number], state.holders, np.int64(blocks[at]), content[at])


@kernel
def carry_over(before, state, number):
    """Fill a replica's cold tiers with what still fits of what they held `before`, with no transfer under way."""
    tier = state.tiers[number]
    kept = _refill(host_of(before, number), host_of(state, number), tier.chunks)
    tier.idle += kept
    tier.next_rank = kept
    if before.tiers[number].disk_chunks > 0 and tier.disk_chunks > 0:
        _refill(disk_of(before, number), disk_of(state, number), tier.disk_chunks)


@kernel
def _refill(old, new, room):
    """Enter the keys of the table `old` into the empty `new`, at most `room`. Returns how many."""
    surplus = old[RECENT].refs + old[FREQUENT].refs - room
    count = 0
    for ring in (RECENT, FREQUENT):
        at = old[ring].next
        while at != ring:
            if surplus > 0:
                surplus -= 1
            else:
                count += 1
                new[put(new, old[at].key, RECENT)].rank = count
            at = old[at].next
    return count


@kernel
def reorder_queue(state, number):
    """Restore the queue's order after the scheduling policy changed."""
    engine = state.engines[number]
    queue.reorder(state.replicas[number], state.requests[number], state.waiting[number], engine.priority_policy)
