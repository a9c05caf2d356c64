"""What live requests may still bring into the caches of a fleet: `FleetState.pending`.

A router that matches prefixes asks a hundred caches about each request. A replica need not be brought up to date to
know that it still lacks a block, if no live request has that block. So live requests are counted by their blocks'
keys: by a hash of every fourth one, as who has a block has those before it. More may be counted than are live.
"""

import numpy as np

from kavier_twin.simulation.kernels.blocks import bucket_of
from kavier_twin.simulation.kernels.compile import kernel, small_kernel
from kavier_twin.simulation.kernels.reference import by_reference
from kavier_twin.simulation.state import FREE, PREFIX_AWARE

_EVERY = 4


@kernel
def count_pending(state, number, slot, change):
    """A request comes (1), leaves (-1), or is about to be another one (-1, then 1)."""
    if state.fleet[0].router != PREFIX_AWARE or state.replicas.size == 1:
        return
    pending, arena, size = state.pending, state.arena[number], state.engines[number].block_size
    request = state.requests[number, slot]
    for block in range(0, request.known, _EVERY):
        last = (block + 1) * size - 1
        key = arena[request.cells + last // request.hash_tokens] + np.uint64((last % request.hash_tokens) // size)
        pending[bucket_of(pending, key)] += np.uint16(change)


@kernel
def count_all_pending(state):
    """Count anew: router, replicas or the size of blocks have changed."""
    state = by_reference(state)
    for place in range(state.pending.size):
        state.pending[place] = 0
    for number in range(state.replicas.size):
        for slot in range(state.requests.shape[1]):
            if state.requests[number, slot].state != FREE:
                count_pending(state, number, slot, 1)


@small_kernel
def sampled(block):
    """The block by which a live request that has this one is counted."""
    return block - block % _EVERY


@small_kernel
def may_come(pending, key):
    """Whether a live request may have the sampled block with this key."""
    return pending[bucket_of(pending, key)] > 0
