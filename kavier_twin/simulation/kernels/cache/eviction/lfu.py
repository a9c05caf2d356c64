"""LFU: the least often hit goes first, among equals the least recently used. Counts live as long as the block."""

from kavier_twin.simulation.compiler.kernel import kernel


@kernel
def ranked(order, block):
    """Hits rank it."""
    order.nodes[block].priority = float(order.nodes[block].hits)
