"""SLRU (Karedla, Love, Wherry: Caching strategies to improve disk system performance, IEEE Computer 27(3), 1994).

With four segments of equal size (S4LRU: Huang et al., An analysis of Facebook photo caching, SOSP 2013; libCacheSim's
default). A hit moves a block up one segment; one that is too full passes its least recently used down. The victim is
the least recently used of the lowest segment. Evictable blocks stand in the segments' lists; those in use count.
"""

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.eviction import lists
from kavier_twin.simulation.state import QUEUES


@kernel
def _size(order):
    return (order.blocks.size - 1) // QUEUES


@kernel
def _cool(order, segment):
    """Pass down what is too much for the segment, as far as it is evictable."""
    while segment > 0:
        while order.eviction.counts[segment] > _size(order):
            block = lists.oldest(order.nodes, segment)
            if block == 0:
                break
            lists.unlink(order.nodes, block)
            lists.belong(order, block, segment - 1)
            lists.link(order.nodes, block)
        segment -= 1


@kernel
def entered(order, block):
    """Into the lowest segment with room, the lowest of all if none has."""
    for segment in range(QUEUES):
        if order.eviction.counts[segment] - (segment == 0) < _size(order):
            lists.belong(order, block, segment)
            break


@kernel
def hit(order, block):
    """One segment up."""
    segment = min(order.nodes[block].queue + 1, QUEUES - 1)
    lists.belong(order, block, segment)
    _cool(order, segment)


@kernel
def released(order, block):
    """Its segment may have been too full of blocks in use."""
    _cool(order, order.nodes[block].queue)


@kernel
def victim(order):
    """The least recently used of the lowest segment that has an evictable one."""
    segment = 0
    while lists.oldest(order.nodes, segment) == 0:
        segment += 1
    return lists.take_oldest(order, segment)
