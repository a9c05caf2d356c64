"""Who holds what in a fleet, without looking: `FleetState.holders` and `FleetState.pending`.

A router that matches prefixes asks a hundred caches about each request. How many copies of a block all of them hold
tells that nobody but one has it; how many live requests have it tells that a replica which is not up to date still
lacks it. Only some blocks are counted, by a hash of their key, as who has a block of a prompt has those before it. More
may be counted than there are, never less. Only fleets of several replicas with prefix-aware routing count.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel, small_kernel
from kavier_twin.simulation.kernels.cache.keys import key_of, spread
from kavier_twin.simulation.kernels.cache.prefetch import prefetch
from kavier_twin.simulation.state import FREE, PRIVATE, UNHASHED

_UNHASHED = np.uint64(UNHASHED)
_PRIVATE = np.uint64(PRIVATE)
_COUNTED = np.uint64(15)  # one key in 16: caches change often
_EVERY = 4  # blocks of a live request
_LEFT_OUT_BITS = np.uint64(4)  # the same in all keys whose copies are counted
_MANY = 255  # or more: not counted on, nor down again


@small_kernel
def is_counted(key):
    """Whether copies of the block with this key are counted."""
    return spread(key) & _COUNTED == np.uint64(0)


@small_kernel
def _place(size, key):
    return np.int64((spread(key) >> _LEFT_OUT_BITS) & np.uint64(size - 1))


@small_kernel
def copies(holders, key):
    """Copies of the counted block with this key in all caches, or more."""
    return np.int64(holders[_place(holders.size, key)])


@small_kernel
def ask_for_copies(holders, key):
    """It will be counted: ask for the memory."""
    if holders.size > 1 and is_counted(key):
        prefetch(holders, _place(holders.size, key))


@small_kernel
def count_copy(holders, key):
    """A cache holds one more block with this key."""
    if holders.size > 1 and is_counted(key):
        place = _place(holders.size, key)
        if holders[place] < _MANY:
            holders[place] += np.uint8(1)


@small_kernel
def discount_copy(holders, key):
    """A cache holds one block with this key less."""
    if holders.size > 1 and key != _PRIVATE and is_counted(key):
        place = _place(holders.size, key)
        if holders[place] < _MANY:
            holders[place] -= np.uint8(1)


@kernel
def count_pending(state, number, slot, change):
    """A request comes (1), leaves (-1), or is about to be another one (-1, then 1)."""
    if state.holders.size == 1:
        return
    pending, arena, size = state.pending, state.arena[number], state.engines[number].block_size
    request = state.requests[number, slot]
    hash_tokens = request.hash_tokens
    for block in range(0, request.known, _EVERY):
        # The division is spared where one hash covers one block, which is the rule.
        key = arena[request.cells + block]
        if hash_tokens != size:
            key = key_of(arena, request.cells, hash_tokens, block, size)
        pending[_place(pending.size, key)] += np.uint16(change)


@small_kernel
def counts_for(block):
    """The block by which a live request that has this one is counted."""
    return block - block % _EVERY


@small_kernel
def may_come(pending, key):
    """Whether a live request may have the block with this key, one of those by which they are counted."""
    return pending[_place(pending.size, key)] > 0


@kernel
def count_all(state):
    """Count anew: router, replicas or caches have changed."""
    state.holders[:] = 0
    state.pending[:] = 0
    for number in range(state.replicas.size):
        for slot in range(state.requests.shape[1]):
            if state.requests[number, slot].state != FREE:
                count_pending(state, number, slot, 1)
        for block in range(1, state.engines[number].num_blocks):
            key = state.blocks[number, block].key
            if key != _UNHASHED and key != _PRIVATE:
                count_copy(state.holders, key)
