"""A table of chunks: rings in order of use, and a hash table to find a key.

One structure serves the host tier, the disk tier and the offer tracker. Records below `RINGS` stand for the rings (a
ring's `prev` is its most, `next` its least recently used chunk, `refs` its length); the others are chunks, each in
one ring. Follows the ordered dictionaries of vLLM 0.32 `v1/kv_offload/cpu/` (`policies/lru.py` keeps ranks and a heap
instead, which gives the same order).
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import inlined_kernel, kernel
from kavier_twin.simulation.kernels.cache.keys import mix
from kavier_twin.simulation.state import FREQUENT, VACANT

_HALF = np.uint64(32)


@inlined_kernel
def host_of(state, number):
    """The host tier's table."""
    return state.chunks[number][: state.tiers[number].disk_at]


@inlined_kernel
def disk_of(state, number):
    """The disk tier's table, empty where there is none."""
    tier = state.tiers[number]
    return state.chunks[number][tier.disk_at : tier.offers_at]


@inlined_kernel
def offers_of(state, number):
    """The table of keys whose offers are counted, empty without a store threshold."""
    return state.chunks[number][state.tiers[number].offers_at :]


@kernel
def _bucket(cache, key):
    """The record that heads the hash bucket of a key: every record is the head of one bucket besides its own use."""
    return np.int64((mix(key) >> _HALF) * np.uint64(cache.size) >> _HALF)


@kernel
def find(cache, key):
    """The record with this key, ghosts included; 0 if there is none."""
    at = cache[_bucket(cache, key)].bucket
    while at != 0 and cache[at].key != key:
        at = cache[at].chain
    return at


@kernel
def find_resident(cache, key):
    """The chunk with this key whose content is there or on its way, 0 if there is none."""
    at = find(cache, key)
    return at if at != 0 and cache[at].ring <= FREQUENT else 0


@kernel
def move_before(cache, chunk, newer, ring):
    """Put a chunk before `newer`, another chunk of `ring`, in the order of use; before the ring itself: at the end."""
    before, after = cache[chunk].prev, cache[chunk].next
    cache[before].next = after
    cache[after].prev = before
    cache[cache[chunk].ring].refs -= 1
    older = cache[newer].prev
    cache[chunk].ring = ring
    cache[chunk].prev = older
    cache[chunk].next = newer
    cache[older].next = chunk
    cache[newer].prev = chunk
    cache[ring].refs += 1


@kernel
def move(cache, chunk, ring):
    """Make a chunk the most recently used of `ring`."""
    move_before(cache, chunk, ring, ring)


@kernel
def _link(cache, chunk, key):
    bucket = _bucket(cache, key)
    cache[chunk].key = key
    cache[chunk].chain = cache[bucket].bucket
    cache[bucket].bucket = chunk


@kernel
def _unlink(cache, chunk):
    bucket = _bucket(cache, cache[chunk].key)
    at = cache[bucket].bucket
    if at == chunk:
        cache[bucket].bucket = cache[chunk].chain
        return
    while cache[at].chain != chunk:
        at = cache[at].chain
    cache[at].chain = cache[chunk].chain


@kernel
def put(cache, key, ring):
    """Enter a key that is not in the table as the most recently used of `ring`. The caller knows a record is vacant."""
    chunk = cache[VACANT].next
    move(cache, chunk, ring)
    _link(cache, chunk, key)
    return chunk


@kernel
def drop(cache, chunk):
    """Take a chunk out of the table."""
    _unlink(cache, chunk)
    cache[chunk].key = np.uint64(0)
    cache[chunk].chain = 0
    cache[chunk].refs = 0
    move(cache, chunk, VACANT)


@kernel
def rename(cache, old, new):
    """The content with key `old` turns out to be that of key `new`, unless something has that key already."""
    chunk = find(cache, old)
    if chunk == 0 or find(cache, new) != 0:
        return
    _unlink(cache, chunk)
    _link(cache, chunk, new)


@kernel
def count_offer(tracker, key, limit, kept):
    """Count an offer of a key that the tracker does not know; `kept` of its keys may not be forgotten for it.

    Returns the number of keys that may still be forgotten. vLLM `CPUOffloadingManager._record_accesses`.
    """
    known = tracker[0].refs
    if known >= limit:
        if kept == 0:
            return kept
        drop(tracker, tracker[0].next)
        kept -= 1
    chunk = put(tracker, key, 0)
    tracker[chunk].refs = 1
    return kept
