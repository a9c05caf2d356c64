"""The block pool: free list, hash table and reference counts of one replica's KV cache.

Follows vLLM 0.32 `v1/core/block_pool.py` and `v1/core/kv_cache_utils.py` (FreeKVCacheBlockQueue): allocation from the
head, eviction only when a cached block is handed out again, freed blocks with a hash to the tail and without one to
the head, no de-duplication, the first registered copy answers a lookup.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import small_kernel
from kavier_twin.simulation.kernels.cache.holders import ask_for_copies, count_copy, discount_copy
from kavier_twin.simulation.kernels.cache.keys import spread
from kavier_twin.simulation.kernels.cache.prefetch import prefetch
from kavier_twin.simulation.state import PRIVATE, UNHASHED

_UNHASHED = np.uint64(UNHASHED)
_PRIVATE = np.uint64(PRIVATE)
_AHEAD = 64  # blocks whose memory is asked for at a time


@small_kernel
def bucket_of(buckets, key):
    """The hash bucket of a key.

    Blocks under one coarse hash lie in neighbouring buckets: a prefix walk stays in a few cache lines.
    """
    return np.int64(spread(key) & np.uint64(buckets.size - 1))


@small_kernel
def ask_for_bucket(buckets, key):
    """`find`, `insert` or `remove` of this key will come: ask for the memory of its bucket."""
    prefetch(buckets, bucket_of(buckets, key))


@small_kernel
def ask_for_block(blocks, buckets, key):
    """`find` or `remove` of this key will come and its bucket is there: ask for the memory of its first block."""
    prefetch(blocks, np.int64(buckets[bucket_of(buckets, key)]))


@small_kernel
def ask_ahead(blocks, buckets, keys, start, at, count):
    """For a loop that will `find` `keys[start : start + count]` in turn and is at `at`: ask for what it needs soon."""
    if at % _AHEAD > 0:
        return
    first = 0 if at == 0 else at + 2 * _AHEAD
    for ahead in range(start + first, start + min(at + 3 * _AHEAD, count)):
        ask_for_bucket(buckets, keys[ahead])
    first = 0 if at == 0 else at + _AHEAD
    for ahead in range(start + first, start + min(at + 2 * _AHEAD, count)):
        ask_for_block(blocks, buckets, keys[ahead])


@small_kernel
def find(blocks, buckets, key):
    """The first registered block with this key, 0 if there is none."""
    found = 0
    block = buckets[bucket_of(buckets, key)]
    while block != 0:
        if blocks[block].key == key:
            found = block
        block = blocks[block].chain
    return found


@small_kernel
def insert(blocks, buckets, block, key):
    """Make `block` findable under `key`."""
    bucket = bucket_of(buckets, key)
    blocks[block].key = key
    blocks[block].chain = buckets[bucket]
    buckets[bucket] = block


@small_kernel
def enter(blocks, buckets, holders, block, key):
    """Make `block` findable under `key`, and count the copy."""
    insert(blocks, buckets, block, key)
    count_copy(holders, key)


@small_kernel
def remove(blocks, buckets, block):
    """Take a findable block out of the hash table. Its key stays."""
    bucket = bucket_of(buckets, blocks[block].key)
    at = buckets[bucket]
    if at == block:
        buckets[bucket] = blocks[block].chain
        return
    while blocks[at].chain != block:
        at = blocks[at].chain
    blocks[at].chain = blocks[block].chain


@small_kernel
def forget(replica, blocks, buckets, block):
    """Drop a block's cached content, if any. Counts the eviction."""
    key = blocks[block].key
    if key != _UNHASHED:
        if key != _PRIVATE:
            remove(blocks, buckets, block)
        blocks[block].key = _UNHASHED
        replica.evictions += 1


@small_kernel
def allocate(replica, blocks, buckets, holders, table, start, count):
    """Take `count` blocks from the head of the free list into `table[start:]`. The caller checked there are as many.

    What they cached is evicted now.
    """
    block = np.int64(blocks[0].next)
    for at in range(start, start + count):
        ask_for_bucket(buckets, blocks[block].key)
        ask_for_copies(holders, blocks[block].key)
        table[at] = np.uint64(block)
        block = np.int64(blocks[block].next)
    for at in range(start, start + count - 1):
        ask_for_block(blocks, buckets, blocks[np.int64(table[at])].key)
    for at in range(start, start + count):
        taken = np.int64(table[at])
        if blocks[taken].key != _UNHASHED:
            discount_copy(holders, blocks[taken].key)
        forget(replica, blocks, buckets, taken)
        blocks[taken].refs = 1
    ask_for_bucket(buckets, blocks[block].key)  # of the one that goes next
    ask_for_copies(holders, blocks[block].key)
    prefetch(blocks, np.int64(blocks[block].next))
    blocks[0].next = block
    blocks[block].prev = 0
    replica.free_blocks -= count


@small_kernel
def touch(replica, blocks, block):
    """A prefix hit: one more reference; an evictable block leaves the free list."""
    if blocks[block].refs == 0:
        before, after = blocks[block].prev, blocks[block].next
        blocks[before].next = after
        blocks[after].prev = before
        replica.free_blocks -= 1
    blocks[block].refs += 1


@small_kernel
def release(replica, blocks, block):
    """Drop one reference; the last one returns the block: cached content to the tail, none to the head."""
    blocks[block].refs -= 1
    if blocks[block].refs > 0:
        return
    replica.free_blocks += 1
    if blocks[block].key == _UNHASHED:
        before, after = 0, blocks[0].next
    else:
        before, after = blocks[0].prev, 0
    blocks[block].prev = before
    blocks[block].next = after
    blocks[before].next = block
    blocks[after].prev = block


@small_kernel
def release_table(replica, blocks, table, start, count):
    """`release` of the blocks `table[start : start + count]`, the last one first."""
    for at in range(start, start + count):
        prefetch(blocks, np.int64(table[at]))
    last = blocks[0].prev  # what goes to the tail is linked as it comes, the list's end only once
    for at in range(start + count - 1, start - 1, -1):
        block = np.int64(table[at])
        if blocks[block].refs == 1 and blocks[block].key != _UNHASHED:
            blocks[block].refs = 0
            blocks[block].prev = last
            blocks[last].next = block
            last = block
            replica.free_blocks += 1
        else:
            blocks[last].next = 0
            blocks[0].prev = last
            release(replica, blocks, block)
            last = blocks[0].prev
    blocks[last].next = 0
    blocks[0].prev = last
