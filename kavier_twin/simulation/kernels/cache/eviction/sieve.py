"""SIEVE (Zhang et al., SIEVE is simpler than LRU, NSDI 2024).

One queue in order of entry, and a hand that moves from the oldest to the newest: a block hit since the hand last came
is spared once. One in use leaves the queue when the hand finds it and is the newest again when it is released.
"""

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.eviction import lists


@kernel
def victim(order):
    """The first block under the hand that was not hit."""
    nodes, eviction = order.nodes, order.eviction
    end = lists.sentinel(nodes, 0)
    block = eviction.hand
    if block == 0:
        block = nodes[end].prev
    while True:
        newer = nodes[block].prev
        if order.blocks[block].refs > 0:
            lists.unlink(nodes, block)
        elif nodes[block].hits > 0:
            nodes[block].hits = 0
        else:
            break
        block = nodes[end].prev if newer == end else newer
    eviction.hand = 0 if newer == end else newer
    lists.unlink(nodes, block)
    eviction.counts[0] -= 1
    return block
