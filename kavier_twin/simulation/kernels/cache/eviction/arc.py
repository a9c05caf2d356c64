"""ARC (Megiddo, Modha: ARC, a self-tuning, low overhead replacement cache, FAST 2003).

Queue 0 is T1 (used once), queue 1 is T2 (used again), ghost lists 1 and 2 are B1 and B2, `target` is p. Blocks in use
belong to T1 or T2 but stand in neither. An engine evicts when it allocates, before it knows what the block will hold,
so a ghost hit moves the target after the eviction that made room, not before it as in the paper.
"""

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.eviction import ghosts, lists

_T1, _T2 = 0, 1
_B1, _B2 = 1, 2


@kernel
def recalled(order, which):
    """Content that list `which` of the ghosts knew comes again: give more room to what it was evicted from.

    The step is max(1, |other| / |own|), a fraction as in vLLM's host tier; the sizes are those before the key left.
    """
    eviction = order.eviction
    if which == _B1:
        step = max(1.0, eviction.ghosts[1] / (eviction.ghosts[0] + 1))
        eviction.target = min(eviction.target + step, float(order.blocks.size - 1))
    else:
        step = max(1.0, eviction.ghosts[0] / (eviction.ghosts[1] + 1))
        eviction.target = max(eviction.target - step, 0.0)


@kernel
def entered(order, block):
    """New content belongs to T1, recalled content to T2."""
    lists.belong(order, block, _T2 if order.eviction.recalled else _T1)


@kernel
def hit(order, block):
    """Used again."""
    lists.belong(order, block, _T2)


@kernel
def victim(order):
    """The paper's REPLACE, after the ghosts made room (its cases A and B)."""
    eviction, nodes, usable = order.eviction, order.nodes, order.blocks.size - 1
    remember = True
    if eviction.recalled == 0:
        if eviction.counts[_T1] + eviction.ghosts[0] >= usable:
            remember = eviction.counts[_T1] < usable
            while eviction.ghosts[0] > 0 and eviction.counts[_T1] + eviction.ghosts[0] >= usable:
                ghosts.drop_oldest(order, _B1)
        elif eviction.ghosts[0] + eviction.ghosts[1] >= usable and eviction.ghosts[1] > 0:
            ghosts.drop_oldest(order, _B2)
    while eviction.ghosts[0] + eviction.ghosts[1] >= usable:
        ghosts.drop_oldest(order, _B2 if eviction.ghosts[1] > 0 else _B1)
    size = float(eviction.counts[_T1])
    first = not remember or size > eviction.target or (size == eviction.target and eviction.recalled == _B2)
    # Blocks in use cannot go: then the other list gives one.
    if lists.oldest(nodes, _T1) == 0:
        first = False
    elif lists.oldest(nodes, _T2) == 0:
        first = True
    block = lists.take_oldest(order, _T1 if first else _T2)
    if remember or not first:
        ghosts.push(order, _B1 if first else _B2, order.blocks[block].key)
    return block
