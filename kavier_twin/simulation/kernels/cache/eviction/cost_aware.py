"""Cost-aware: greedy-dual with frequency (GDSF: Cherkasova, HP Labs HPL-98-69R1, 1998), all blocks being of one size.

priority = age + uses * cost, where the age is the priority of the last victim, so that what was popular once gets old,
and the cost is what computing the block again would take: its tokens' share of a full prefill batch, and attention
over its context, which makes deep blocks dearer.
"""

from kavier_twin.simulation.compiler.kernel import kernel


@kernel
def _cost_seconds(engine, depth):
    """Seconds to compute block number `depth` of a chain again (`settings.StepTime`, one block of prefill)."""
    size = float(engine.block_size)
    attention = size * (depth * size) + 0.5 * size * (size + 1.0)
    return engine.prefill_token_seconds * size + engine.per_prefill_attention * attention


@kernel
def ranked(order, block):
    """It was used now: from this age on, all its uses count."""
    node = order.nodes[block]
    node.priority = order.eviction.age + (node.hits + 1) * _cost_seconds(order.engine, node.depth)


@kernel
def evicted(order, block):
    """Everything that stays is measured from here."""
    order.eviction.age = order.nodes[block].priority
