"""Handing a live cache from one policy to another: through vLLM's free list, which any policy can be read from."""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.eviction import belady, dispatch
from kavier_twin.simulation.kernels.cache.eviction.order import order_of
from kavier_twin.simulation.state import LRU, UNHASHED

_UNHASHED = np.uint64(UNHASHED)


@kernel
def unload(state, number):
    """Put every evictable block into the free list, in the order in which the policy would evict. LRU from now on."""
    order = order_of(state, number)
    blocks = order.blocks
    left = order.replica.free_blocks
    block = blocks[0].next
    while block != 0:
        left -= 1
        block = blocks[block].next
    for _ in range(left):
        block = dispatch.victim(order)
        last = blocks[0].prev
        blocks[last].next = block
        blocks[block].prev = last
        blocks[block].next = 0
        blocks[0].prev = block
    order.engine.eviction = LRU


@kernel
def load(state, number, time):
    """Fill the policy's structures, which are new: as if the blocks had entered in the order of the free list.

    What happened to them before (hits, their place in their chain) is not known any more.
    """
    order = order_of(state, number)
    blocks = order.blocks
    block = blocks[0].next
    while block != 0:
        after = blocks[block].next
        if blocks[block].key != _UNHASHED:
            before = blocks[block].prev
            blocks[before].next = after
            blocks[after].prev = before
            dispatch.entered(order, block, 0, time, belady.LAST)
            dispatch.evictable(order, block)
        block = after
    for block in range(1, blocks.size):
        if blocks[block].refs > 0 and blocks[block].key != _UNHASHED:
            dispatch.entered(order, block, 0, time, belady.LAST)
