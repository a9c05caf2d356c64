"""TTL: LRU in which a block that was not used for `eviction_ttl_seconds` is gone.

Prompt caches sold as a service work like that (Anthropic's: 5 minutes, refreshed by each use).
"""

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.blocks import forget
from kavier_twin.simulation.kernels.cache.eviction import lists


@kernel
def released(order, block):
    """Its time runs from now, which is where the replica's integrals stand whenever blocks are released."""
    order.nodes[block].priority = order.replica.accounted


@kernel
def expire(order, time):
    """Drop what is out of date at `time`.

    The blocks go to the tail of the free list, in the order in which they would have been evicted: when this is
    called changes nothing but what can be hit.
    """
    blocks = order.blocks
    before = time - order.engine.eviction_ttl_seconds
    block = lists.oldest(order.nodes, 0)
    while block != 0 and order.nodes[block].priority < before:
        lists.take_oldest(order, 0)
        forget(order.replica, blocks, order.buckets, block)
        last = blocks[0].prev
        blocks[last].next = block
        blocks[block].prev = last
        blocks[block].next = 0
        blocks[0].prev = block
        block = lists.oldest(order.nodes, 0)
