"""Prefix integrity: what is cached but cannot be hit, because an ancestor is gone."""

from kavier_twin.simulation.compiler.kernel import linked
from kavier_twin.simulation.kernels import POLICIES
from kavier_twin.simulation.kernels.cache.blocks import find
from kavier_twin.simulation.kernels.cache.keys import key_of
from kavier_twin.simulation.state import FleetState, Request


@linked(POLICIES)
def stranded_blocks(state: FleetState, number: int, request: Request, hits: int) -> int:
    """Blocks of a new request's prompt that are in the cache behind the first `hits`, which alone can be used.

    vLLM's LRU evicts descendants first, as sequences are freed from the tail: there it hardly happens.
    """
    count, block_size = 0, state.engines[number].block_size
    blocks, buckets, arena = state.blocks[number], state.buckets[number], state.arena[number]
    for block in range(hits + 1, min((request.tokens - 1) // block_size, request.known)):
        if find(blocks, buckets, key_of(arena, request.cells, request.hash_tokens, block, block_size)) != 0:
            count += 1
    return count
