"""S3-FIFO (Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023).

A small queue (10 % of the cache) for what is new, a main queue, and a ghost list of 90 % of the cache; a block hit
twice in the small queue moves to the main one, where up to three hits each spare it one round. These are the paper's
numbers and libCacheSim's defaults. While nothing was evicted yet, what does not fit the small queue enters the main
one (libCacheSim). A block in use that comes to its turn leaves its queue and is the newest of it when released.
"""

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.eviction import ghosts, lists

_SMALL, _MAIN = 0, 1
_TO_MAIN_HITS = 2
_MOST_HITS = 3


@kernel
def _small_size(order):
    return max(1, (order.blocks.size - 1) // 10)


@kernel
def entered(order, block):
    """New content enters the small queue, recalled content the main one."""
    eviction = order.eviction
    full = eviction.started == 0 and eviction.counts[_SMALL] - 1 >= _small_size(order)
    lists.belong(order, block, _MAIN if eviction.recalled or full else _SMALL)


@kernel
def _from_small(order):
    """The first of the small queue that was hit too rarely, remembered as a ghost; 0 if there is none."""
    nodes = order.nodes
    block = lists.oldest(nodes, _SMALL)
    while block != 0:
        lists.unlink(nodes, block)
        if order.blocks[block].refs == 0:
            if nodes[block].hits < _TO_MAIN_HITS:
                order.eviction.counts[_SMALL] -= 1
                key = order.blocks[block].key
                room = (order.blocks.size - 1) * 9 // 10
                if room > 0 and not ghosts.knows(order, key):
                    while order.eviction.ghosts[0] >= room:
                        ghosts.drop_oldest(order, 1)
                    ghosts.push(order, 1, key)
                return block
            nodes[block].hits = 0
            lists.belong(order, block, _MAIN)
            lists.link(nodes, block)
        block = lists.oldest(nodes, _SMALL)
    return 0


@kernel
def _from_main(order):
    """The first of the main queue that was not hit since its last round; 0 if there is none."""
    nodes = order.nodes
    block = lists.oldest(nodes, _MAIN)
    while block != 0:
        lists.unlink(nodes, block)
        if order.blocks[block].refs == 0:
            if nodes[block].hits == 0:
                order.eviction.counts[_MAIN] -= 1
                return block
            nodes[block].hits = min(nodes[block].hits, _MOST_HITS) - 1
            lists.link(nodes, block)
        block = lists.oldest(nodes, _MAIN)
    return 0


@kernel
def victim(order):
    """From the main queue if that is too long, else from the small one."""
    eviction = order.eviction
    eviction.started = 1
    while True:
        block = 0
        if eviction.counts[_MAIN] <= order.blocks.size - 1 - _small_size(order):
            block = _from_small(order)
        if block == 0:
            block = _from_main(order)
        if block == 0:
            block = _from_small(order)
        if block != 0:
            return block
