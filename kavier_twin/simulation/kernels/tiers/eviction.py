"""Which chunks leave the host tier: lru and arc.

Follows vLLM `v1/kv_offload/cpu/policies/lru.py` and `arc.py`. ARC: Megiddo, Modha, "ARC: A Self-Tuning, Low
Overhead Replacement Cache", FAST 2003; vLLM's adapts once a request and evicts in batches.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.tiers.chunks import drop, find, move, move_before, put
from kavier_twin.simulation.state import FREQUENT, GHOST_FREQUENT, GHOST_RECENT, INSERTED, RECENT, REUSED


@kernel
def residents(cache):
    """Chunks in the host tier, those being written included."""
    return cache[RECENT].refs + cache[FREQUENT].refs


@kernel
def _next_evictable(cache, at, ring, offer):
    """The first chunk from `at` on that no transfer uses and the offer being decided does not name; `ring` if none."""
    while at != ring and (cache[at].refs != 0 or cache[at].offer == offer):
        at = cache[at].next
    return at


@kernel
def _evict_lru(tier, cache, count, offer):
    at = _next_evictable(cache, cache[RECENT].next, RECENT, offer)
    for _ in range(count - 1):
        if at == RECENT:
            break
        at = _next_evictable(cache, cache[at].next, RECENT, offer)
    if at == RECENT:
        return False
    at = cache[RECENT].next
    for _ in range(count):
        at = _next_evictable(cache, at, RECENT, offer)
        after = cache[at].next
        drop(cache, at)
        at = after
    tier.idle -= count
    return True


@kernel
def _evict_arc(tier, cache, count, offer):
    recent = _next_evictable(cache, cache[RECENT].next, RECENT, offer)
    frequent = _next_evictable(cache, cache[FREQUENT].next, FREQUENT, offer)
    left = cache[RECENT].refs
    first, last = 0, 0
    for _ in range(count):
        pick = 0
        if recent != RECENT and (left >= int(tier.target) or frequent == FREQUENT):
            pick = recent
            recent = _next_evictable(cache, cache[recent].next, RECENT, offer)
            left -= 1
        elif frequent != FREQUENT:
            pick = frequent
            frequent = _next_evictable(cache, cache[frequent].next, FREQUENT, offer)
        else:
            return False
        cache[pick].link = 0
        if last == 0:
            first = pick
        else:
            cache[last].link = pick
        last = pick
    while first != 0:
        move(cache, first, GHOST_RECENT if cache[first].ring == RECENT else GHOST_FREQUENT)
        first = cache[first].link
    for ring in (GHOST_RECENT, GHOST_FREQUENT):
        while cache[ring].refs > tier.chunks:
            drop(cache, cache[ring].next)
    tier.idle -= count
    return True


@kernel
def make_room(tier, cache, count, offer):
    """Evict until `count` more chunks fit. Returns False, and changes nothing, if they cannot."""
    needed = count - (tier.chunks - residents(cache))
    if needed <= 0:
        return True
    if needed > tier.idle:
        return False
    if tier.arc:
        return _evict_arc(tier, cache, needed, offer)
    return _evict_lru(tier, cache, needed, offer)


@kernel
def enter(tier, cache, key):
    """A chunk for this key, about to be written. There is room."""
    chunk = find(cache, key)
    if chunk != 0:
        move(cache, chunk, RECENT)  # out of a ghost ring
    else:
        chunk = put(cache, key, RECENT)
    cache[chunk].refs = -1
    cache[chunk].loads = 0
    cache[chunk].link = 0
    _rank_last(tier, cache, chunk)
    return chunk


@kernel
def _rank_last(tier, cache, chunk):
    """Give the most recently used chunk a rank of its own."""
    tier.next_rank += 1
    cache[chunk].rank = tier.next_rank
    cache[chunk].position = 0


@kernel
def take_rank(tier, request):
    """The rank of a request's chunks while it lives: that of its first use of the tier."""
    if request.tier_rank == 0:
        tier.next_rank += 1
        request.tier_rank = tier.next_rank


@kernel
def rank_with_request(cache, chunk, request, position, before):
    """Rank a chunk with its request's others, tails first: vLLM 0.33's `LRUCachePolicy`.

    `before` is the request's previous chunk, 0 if it is not there: only where to begin the search.
    """
    row, ring = cache[chunk], np.int64(RECENT)
    row.rank = request.tier_rank
    row.position = position
    newer = ring
    if before != 0 and cache[before].rank == request.tier_rank and cache[before].position < position:
        newer = np.int64(before)
    at = np.int64(cache[newer].prev)
    while at != ring:
        if at != chunk:
            if cache[at].rank < row.rank or (cache[at].rank == row.rank and cache[at].position > position):
                break
            newer = at
        at = np.int64(cache[at].prev)
    move_before(cache, chunk, newer, ring)


@kernel
def use(cache, chunk, request, position, before):
    """A live request uses a chunk for the first time, which never makes it older."""
    row = cache[chunk]
    if row.rank < request.tier_rank or (row.rank == request.tier_rank and row.position > position):
        rank_with_request(cache, chunk, request, position, before)


@kernel
def learn_miss(tier, cache, key):
    """A request brings a key that is not there: a ghost hit moves ARC's target."""
    if not tier.arc:
        return
    ghost = find(cache, key)
    if ghost == 0:
        return
    ring = cache[ghost].ring
    recent, frequent = float(cache[GHOST_RECENT].refs), float(cache[GHOST_FREQUENT].refs)
    if ring == GHOST_RECENT:
        tier.target = min(tier.target + max(1.0, frequent / recent), float(tier.chunks))
        move(cache, ghost, GHOST_RECENT)
    elif ring == GHOST_FREQUENT:
        tier.target = max(tier.target - max(1.0, recent / frequent), 0.0)
        move(cache, ghost, GHOST_FREQUENT)


@kernel
def renew(tier, cache, chunk, marks):
    """The request that used a chunk as `marks` say has ended."""
    ring = cache[chunk].ring
    if not tier.arc:
        move(cache, chunk, RECENT)
        _rank_last(tier, cache, chunk)
    elif marks & REUSED:
        move(cache, chunk, FREQUENT)
    elif marks & INSERTED:
        move(cache, chunk, ring)
