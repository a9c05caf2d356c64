"""Doubly linked queues of blocks, from the newest to the oldest: rings around sentinels at the end of `nodes`.

A block belongs to the queue `nodes[block].queue`, whether it stands in it (`linked`) or not; `eviction.counts` counts
those that belong.
"""

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.state import QUEUES


@kernel
def sentinel(nodes, queue):
    """The row that closes the ring of a queue."""
    return nodes.size - QUEUES + queue


@kernel
def oldest(nodes, queue):
    """The oldest block that stands in the queue, 0 if there is none."""
    end = sentinel(nodes, queue)
    block = nodes[end].prev
    return 0 if block == end else block


@kernel
def link(nodes, block):
    """The block stands in its queue as the newest."""
    end = sentinel(nodes, nodes[block].queue)
    after = nodes[end].next
    nodes[block].prev = end
    nodes[block].next = after
    nodes[after].prev = block
    nodes[end].next = block
    nodes[block].linked = 1


@kernel
def unlink(nodes, block):
    """The block stands in no queue."""
    before, after = nodes[block].prev, nodes[block].next
    nodes[before].next = after
    nodes[after].prev = before
    nodes[block].linked = 0


@kernel
def belong(order, block, queue):
    """The block belongs to that queue from now on. It does not stand in the one it belonged to."""
    order.eviction.counts[order.nodes[block].queue] -= 1
    order.eviction.counts[queue] += 1
    order.nodes[block].queue = queue


@kernel
def take_oldest(order, queue):
    """The oldest of the queue leaves it for good. The caller knows that there is one."""
    block = oldest(order.nodes, queue)
    unlink(order.nodes, block)
    order.eviction.counts[queue] -= 1
    return block
