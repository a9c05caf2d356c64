"""What an eviction policy works on: one replica's views of the state."""

from typing import Any, NamedTuple

from kavier_twin.simulation.compiler.kernel import inlined_kernel, kernel


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
        state.replicas[number].eviction,
        state.nodes[number],
        state.nodes[number].heap,
        state.nodes[number].ghost,
        state.nodes[number].ghost_bucket,
        state.future.bucket,
        state.future.use,
    )


@kernel
def tick(order):
    """The next number of a clock that orders events of the pool."""
    order.eviction.clock += 1
    return order.eviction.clock
