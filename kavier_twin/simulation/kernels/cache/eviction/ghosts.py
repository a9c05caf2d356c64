"""Keys of what was evicted, in up to two lists (1 and 2) from the newest to the oldest, found by hash."""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.blocks import find, insert, remove
from kavier_twin.simulation.state import PRIVATE

_PRIVATE = np.uint64(PRIVATE)


@kernel
def _drop(order, row):
    ghosts, eviction = order.ghosts, order.eviction
    before, after = ghosts[row].prev, ghosts[row].next
    ghosts[before].next = after
    ghosts[after].prev = before
    if ghosts[row].key != _PRIVATE:
        remove(ghosts, order.ghost_buckets, row)
    eviction.ghosts[ghosts[row].queue - 1] -= 1
    ghosts[row].next = eviction.spare_ghost
    eviction.spare_ghost = row


@kernel
def drop_oldest(order, which):
    """Forget the oldest of list 1 or 2. The caller knows that there is one."""
    ghosts = order.ghosts
    _drop(order, ghosts[ghosts.size - 3 + which].prev)


@kernel
def push(order, which, key):
    """Remember `key` as the newest of list 1 or 2. The caller knows that there is room.

    A private key takes its room, as its like would in an engine, but nobody will ask for it.
    """
    ghosts, eviction = order.ghosts, order.eviction
    row = eviction.spare_ghost
    eviction.spare_ghost = ghosts[row].next
    end = ghosts.size - 3 + which
    after = ghosts[end].next
    ghosts[row].prev = end
    ghosts[row].next = after
    ghosts[row].queue = which
    ghosts[after].prev = row
    ghosts[end].next = row
    eviction.ghosts[which - 1] += 1
    if key == _PRIVATE:
        ghosts[row].key = key
    else:
        insert(ghosts, order.ghost_buckets, row, key)


@kernel
def knows(order, key):
    """Whether a list has the key."""
    return find(order.ghosts, order.ghost_buckets, key) != 0


@kernel
def recall(order, key):
    """Take the key out of the list that has it. Returns the list, 0 if none has it."""
    row = find(order.ghosts, order.ghost_buckets, key)
    if row == 0:
        return 0
    which = order.ghosts[row].queue
    _drop(order, row)
    return which
