"""What an eviction policy works on: one replica's views of the state."""

from typing import Any, NamedTuple

from kavier_twin.simulation.kernels.compile import inlined_kernel, kernel


class Order(NamedTuple):
    """One replica's block pool, and the order in which a policy other than LRU evicts from it."""

    replica: Any
    engine: Any
    blocks: Any
    buckets: Any
    eviction: Any
    nodes: Any
    heap: Any
    ghosts: Any
    ghost_buckets: Any
    oracle: Any
    uses: Any


@inlined_kernel
def order_of(state, number):
    """The views of replica `number`."""
    return Order(
        state.replicas[number],
        state.engines[number],
        state.blocks[number],
        state.buckets[number],
        state.eviction[number],
        state.nodes[number],
        state.heap[number],
        state.ghosts[number],
        state.ghost_buckets[number],
        state.oracle,
        state.uses,
    )


@kernel
def tick(order):
    """The next number of a clock that orders events of the pool."""
    order.eviction.clock += 1
    return order.eviction.clock
