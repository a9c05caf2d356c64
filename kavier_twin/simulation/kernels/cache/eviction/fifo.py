"""FIFO: what entered the cache first goes first."""

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.eviction.order import tick


@kernel
def entered(order, block):
    """Its place is that of its entry, whatever happens later."""
    order.nodes[block].priority = float(tick(order))
