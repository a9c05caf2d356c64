"""An indexed binary heap of evictable blocks: the lowest (priority, tie) is evicted first.

`tie` is the clock at the release. A request frees its blocks from the tail, so among equals descendants go before
their ancestors.
"""

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.eviction.order import tick


@kernel
def _before(nodes, a, b):
    if nodes[a].priority != nodes[b].priority:
        return nodes[a].priority < nodes[b].priority
    return nodes[a].tie < nodes[b].tie


@kernel
def _rise(nodes, heap, place):
    block = heap[place]
    while place > 0:
        parent = (place - 1) // 2
        if not _before(nodes, block, heap[parent]):
            break
        heap[place] = heap[parent]
        nodes[heap[place]].place = place
        place = parent
    heap[place] = block
    nodes[block].place = place


@kernel
def _sink(nodes, heap, count, place):
    block = heap[place]
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        if child + 1 < count and _before(nodes, heap[child + 1], heap[child]):
            child += 1
        if not _before(nodes, heap[child], block):
            break
        heap[place] = heap[child]
        nodes[heap[place]].place = place
        place = child
    heap[place] = block
    nodes[block].place = place


@kernel
def push(order, block):
    """The block became evictable."""
    order.nodes[block].tie = tick(order)
    place = order.eviction.evictable
    order.heap[place] = block
    order.eviction.evictable = place + 1
    _rise(order.nodes, order.heap, place)


@kernel
def restore(order, block):
    """The priority of an evictable block changed."""
    _sink(order.nodes, order.heap, order.eviction.evictable, order.nodes[block].place)
    _rise(order.nodes, order.heap, order.nodes[block].place)


@kernel
def remove(order, block):
    """The block is no longer evictable."""
    place = order.nodes[block].place
    order.nodes[block].place = -1
    order.eviction.evictable -= 1
    last = order.eviction.evictable
    if place < last:
        order.heap[place] = order.heap[last]
        order.nodes[order.heap[place]].place = place
        restore(order, order.heap[place])


@kernel
def pop(order):
    """Take the first to go."""
    block = order.heap[0]
    remove(order, block)
    return block
