"""A table of chunks: rings in order of use, and a hash table to find a key.

One structure serves the host tier, the disk tier and the offer tracker. Records below `RINGS` stand for the rings (a
ring's `prev` is its most, `next` its least recently used chunk, `refs` its length); the others are chunks, each in
one ring. Follows the ordered dictionaries of vLLM 0.32 `v1/kv_offload/cpu/` (`policies/lru.py` keeps ranks and a heap
instead, which gives the same order).
"""

import numpy as np

from kavier_twin.simulation.kernels.blocks import mix
from kavier_twin.simulation.kernels.compile import kernel
from kavier_twin.simulation.state import FREQUENT, RINGS, VACANT


@kernel
def _bucket(buckets, key):
    return np.int64(mix(key) & np.uint64(buckets.size - 1))


@kernel
def find(cache, buckets, key):
    """The record with this key, ghosts included; 0 if there is none."""
    at = buckets[_bucket(buckets, key)]
    while at != 0 and cache[at].key != key:
        at = cache[at].chain
    return at


@kernel
def find_resident(cache, buckets, key):
    """The chunk with this key whose content is there or on its way, 0 if there is none."""
    at = find(cache, buckets, key)
    return at if at != 0 and cache[at].ring <= FREQUENT else 0


@kernel
def move(cache, chunk, ring):
    """Make a chunk the most recently used of `ring`."""
    before, after = cache[chunk].prev, cache[chunk].next
    cache[before].next = after
    cache[after].prev = before
    cache[cache[chunk].ring].refs -= 1
    last = cache[ring].prev
    cache[chunk].ring = ring
    cache[chunk].prev = last
    cache[chunk].next = ring
    cache[last].next = chunk
    cache[ring].prev = chunk
    cache[ring].refs += 1


@kernel
def _link(cache, buckets, chunk, key):
    bucket = _bucket(buckets, key)
    cache[chunk].key = key
    cache[chunk].chain = buckets[bucket]
    buckets[bucket] = chunk


@kernel
def _unlink(cache, buckets, chunk):
    bucket = _bucket(buckets, cache[chunk].key)
    at = buckets[bucket]
    if at == chunk:
        buckets[bucket] = cache[chunk].chain
        return
    while cache[at].chain != chunk:
        at = cache[at].chain
    cache[at].chain = cache[chunk].chain


@kernel
def put(cache, buckets, key, ring):
    """Enter a key that is not in the table as the most recently used of `ring`. The caller knows a record is vacant."""
    chunk = cache[VACANT].next
    move(cache, chunk, ring)
    _link(cache, buckets, chunk, key)
    return chunk


@kernel
def drop(cache, buckets, chunk):
    """Take a chunk out of the table."""
    _unlink(cache, buckets, chunk)
    cache[chunk].key = np.uint64(0)
    cache[chunk].chain = 0
    cache[chunk].refs = 0
    move(cache, chunk, VACANT)


@kernel
def rename(cache, buckets, old, new):
    """The content with key `old` turns out to be that of key `new`, unless something has that key already."""
    chunk = find(cache, buckets, old)
    if chunk == 0 or find(cache, buckets, new) != 0:
        return
    _unlink(cache, buckets, chunk)
    _link(cache, buckets, chunk, new)


@kernel
def count_offer(tracker, buckets, key, limit, kept):
    """Count an offer of a key that the tracker does not know; `kept` of its keys may not be forgotten for it.

    Returns the number of keys that may still be forgotten. vLLM `CPUOffloadingManager._record_accesses`.
    """
    known = tracker[0].refs
    if known >= limit:
        if kept == 0:
            return kept
        drop(tracker, buckets, tracker[0].next)
        kept -= 1
    chunk = put(tracker, buckets, key, 0)
    tracker[chunk].refs = 1
    return kept


@kernel
def clear(cache, buckets):
    """An empty table: every chunk vacant, in order."""
    for bucket in range(buckets.size):
        buckets[bucket] = 0
    for ring in range(RINGS):
        cache[ring].ring = ring
        cache[ring].prev = ring
        cache[ring].next = ring
        cache[ring].refs = 0
    for chunk in range(RINGS, cache.size):
        cache[chunk].key = np.uint64(0)
        cache[chunk].chain = 0
        cache[chunk].ring = VACANT
        cache[chunk].refs = 0
        last = cache[VACANT].prev
        cache[chunk].prev = last
        cache[chunk].next = VACANT
        cache[last].next = chunk
        cache[VACANT].prev = chunk
        cache[VACANT].refs += 1
