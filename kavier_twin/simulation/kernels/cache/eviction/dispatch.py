"""One interface for all policies other than LRU: what happens to a block, and which one goes.

Free blocks without content stay in vLLM's free list and are taken first. A block in use cannot go.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.blocks import forget
from kavier_twin.simulation.kernels.cache.eviction import (
    arc,
    belady,
    cost_aware,
    fifo,
    ghosts,
    heap,
    lfu,
    lists,
    pinned,
    s3fifo,
    sieve,
    slru,
    ttl,
)
from kavier_twin.simulation.state import (
    ARC,
    BELADY,
    COST_AWARE,
    FIFO,
    LFU,
    PINNED,
    PRIVATE,
    S3FIFO,
    SIEVE,
    SLRU,
    TTL,
    UNHASHED,
)

_UNHASHED = np.uint64(UNHASHED)
_PRIVATE = np.uint64(PRIVATE)


@kernel
def recall(order, key):
    """Content with this key is about to enter: what the ghosts know about it counts."""
    policy, eviction = order.engine.eviction, order.eviction
    eviction.recalled = 0
    if (policy == ARC or policy == S3FIFO) and key != _PRIVATE:
        eviction.recalled = ghosts.recall(order, key)
        if policy == ARC and eviction.recalled > 0:
            arc.recalled(order, eviction.recalled)


@kernel
def entered(order, block, depth, arrival, index):
    """A block in use got its content, number `depth` of a chain, from the request (arrival, index)."""
    policy, node = order.engine.eviction, order.nodes[block]
    node.hits = 0
    node.depth = depth
    node.queue = 0
    order.eviction.counts[0] += 1
    if policy == FIFO:
        fifo.entered(order, block)
    elif policy == LFU:
        lfu.ranked(order, block)
    elif policy == COST_AWARE:
        cost_aware.ranked(order, block)
    elif policy == BELADY:
        belady.entered(order, block, arrival, index)
    elif policy == SLRU:
        slru.entered(order, block)
    elif policy == ARC:
        arc.entered(order, block)
    elif policy == S3FIFO:
        s3fifo.entered(order, block)
    if policy >= SIEVE:
        lists.link(order.nodes, block)
    order.eviction.recalled = 0


@kernel
def hit(order, block, depth, arrival, index):
    """The request (arrival, index) found the block as number `depth` of its chain: one more reference."""
    policy, node = order.engine.eviction, order.nodes[block]
    if order.blocks[block].refs == 0:
        order.replica.free_blocks -= 1
        if policy <= BELADY:
            heap.remove(order, block)
        elif policy < SIEVE:
            lists.unlink(order.nodes, block)
    order.blocks[block].refs += 1
    node.hits += 1
    node.depth = depth
    if policy == LFU:
        lfu.ranked(order, block)
    elif policy == COST_AWARE:
        cost_aware.ranked(order, block)
    elif policy == BELADY:
        belady.used(order, block, arrival, index)
    elif policy == PINNED:
        pinned.hit(order, block)
    elif policy == SLRU:
        slru.hit(order, block)
    elif policy == ARC:
        arc.hit(order, block)


@kernel
def evictable(order, block):
    """The last reference to a block with content is gone."""
    policy = order.engine.eviction
    if policy <= BELADY:
        heap.push(order, block)
        return
    if order.nodes[block].linked:  # only where a block keeps its place while it is in use
        return
    lists.link(order.nodes, block)
    if policy == TTL:
        ttl.released(order, block)
    elif policy == SLRU:
        slru.released(order, block)


@kernel
def victim(order):
    """Take the evictable block that goes next out of the policy's keeping. The caller knows that there is one."""
    policy = order.engine.eviction
    if policy <= BELADY:
        block = heap.pop(order)
        order.eviction.counts[0] -= 1
        if policy == COST_AWARE:
            cost_aware.evicted(order, block)
        return block
    if policy == PINNED:
        return pinned.victim(order)
    if policy == SLRU:
        return slru.victim(order)
    if policy == ARC:
        return arc.victim(order)
    if policy == SIEVE:
        return sieve.victim(order)
    if policy == S3FIFO:
        return s3fifo.victim(order)
    return lists.take_oldest(order, 0)


@kernel
def allocate(order, table, start, count):
    """`blocks.allocate` under these policies: free blocks without content first, then victims."""
    blocks = order.blocks
    for at in range(start, start + count):
        block = blocks[0].next
        if block == 0:
            block = victim(order)
            forget(order.replica, blocks, order.buckets, block)
        else:
            after = blocks[block].next
            blocks[0].next = after
            blocks[after].prev = 0
        blocks[block].refs = 1
        table[at] = np.uint64(block)
    order.replica.free_blocks -= count


@kernel
def release(order, block):
    """`blocks.release` under these policies."""
    blocks = order.blocks
    blocks[block].refs -= 1
    if blocks[block].refs > 0:
        return
    order.replica.free_blocks += 1
    if blocks[block].key == _UNHASHED:
        after = blocks[0].next
        blocks[block].prev = 0
        blocks[block].next = after
        blocks[0].next = block
        blocks[after].prev = block
    else:
        evictable(order, block)


@kernel
def enter_blocks(order, request, arena, table, first, stop):
    """Blocks number `first` to `stop` of the request's table got their content.

    The deepest first: among blocks that enter together, descendants are to go before their ancestors.
    """
    for number in range(stop - 1, first - 1, -1):
        block = np.int64(arena[table + number])
        recall(order, order.blocks[block].key)
        entered(order, block, number, request.arrival, request.index)


@kernel
def hit_blocks(order, request, arena, table, count):
    """The request found the first `count` blocks of its table in the cache."""
    for number in range(count):
        hit(order, np.int64(arena[table + number]), number, request.arrival, request.index)


@kernel
def release_blocks(order, arena, table, count):
    """A request returns the blocks of its table, the tail first."""
    for number in range(count - 1, -1, -1):
        release(order, np.int64(arena[table + number]))
