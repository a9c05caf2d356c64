"""What a replica's prefix cache holds, read out of its arrays, and filling it with what a real one is known to hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.kernels.entries import enter_blocks
from kavier_twin.simulation.state import FleetState

FILLED: Final = "lru"  # the only eviction policy whose cache can be filled: a real vLLM's


class Tail(NamedTuple):
    """Cached blocks of a live request whose content is not known yet: `blocks` of them behind the block `key`."""

    key: int
    blocks: int


def cached_keys(state: FleetState, number: int) -> npt.NDArray[np.uint64]:
    """Keys of the blocks that can be found, each once, rising."""
    keys = state.blocks["key"][number, : int(state.engines["num_blocks"][number])]
    return np.unique(keys[keys > layout.PRIVATE])


def unknown_tails(state: FleetState, number: int) -> list[Tail]:
    """The blocks that live requests have filled beyond what hashes tell. Only where one hash covers one block."""
    size = int(state.engines["block_size"][number])
    found = []
    for slot in np.flatnonzero(state.requests["state"][number] != layout.FREE):
        request = state.requests[number, slot]
        known, registered = int(request["known"]), int(request["registered"])
        if registered > known and (known == 0 or request["hash_tokens"] == size):
            key = int(state.arena[number, int(request["cells"]) + known - 1]) if known else 0
            found.append(Tail(key, registered - known))
    return found


def fill_cache(state: FleetState, number: int, keys: Sequence[int]) -> int:
    """Put cached blocks that nothing refers to into empty memory, `keys` from the least to the most recently used.

    All are older than what the replica cached itself. What does not fit is left out, the least recently used first.
    Returns how many there are now. The replica's policy must be `FILLED`.
    """
    blocks = state.blocks[number]
    followers, cached = blocks["next"].tolist(), (blocks["key"] != layout.UNHASHED).tolist()
    free: list[int] = []
    block = followers[0]
    while block:
        free.append(block)
        block = followers[block]
    empty = [block for block in free if not cached[block]]
    kept = keys[max(0, len(keys) - len(empty)) :]
    filled = empty[len(empty) - len(kept) :]
    enter_blocks(state, number, np.array(filled, np.int32), np.array(kept, np.uint64))
    order = np.array([0, *empty[: len(empty) - len(kept)], *filled, *(b for b in free if cached[b])])
    blocks["next"][order] = np.roll(order, -1)
    blocks["prev"][order] = np.roll(order, 1)
    return len(kept)
