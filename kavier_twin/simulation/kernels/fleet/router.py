"""Which replica a request goes to. Policies see what a router could see: requests in flight and cache content now."""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel, small_kernel
from kavier_twin.simulation.kernels.cache.blocks import ask_ahead, bucket_of, find
from kavier_twin.simulation.kernels.cache.holders import copies, counts_for, is_counted, may_come
from kavier_twin.simulation.kernels.cache.keys import key_of, mix
from kavier_twin.simulation.kernels.cache.prefetch import prefetch
from kavier_twin.simulation.kernels.step.flow import next_end
from kavier_twin.simulation.kernels.step.replica import advance
from kavier_twin.simulation.kernels.step.scheduler import shortest_decode_step
from kavier_twin.simulation.state import LEAST_LOADED, LRU, PREFIX_AWARE, SESSION_AFFINITY

_TOO_BUSY = 1 << 30  # requests of a replica that is to get no more


@kernel
def _quiet_until(state, number):
    """A time before which no live request of the replica can end by itself, assuming the shortest possible steps."""
    replica, engine = state.replicas[number], state.engines[number]
    if replica.running + replica.waiting + replica.loading == 0:
        return np.inf
    if replica.in_flight == 0:
        return replica.now
    end = state.batches[number, replica.oldest].end
    if replica.running > replica.flowing or replica.waiting + replica.loading > 0:
        return end
    return end + (next_end(state, number) - replica.completed_batches - 1) * shortest_decode_step(engine)


@kernel
def _recount(state, number, time):
    replica = state.replicas[number]
    if replica.accepting:
        advance(state, number, time)
        state.quiet_until[number] = _quiet_until(state, number)
        state.loads[number] = replica.running + replica.waiting + replica.loading
    else:
        state.quiet_until[number] = np.inf
        state.loads[number] = _TOO_BUSY


@kernel
def load(state, number, time):
    """Live requests of a replica at `time`, `_TOO_BUSY` if it takes none."""
    if state.quiet_until[number] <= time:
        _recount(state, number, time)
    return np.int64(state.loads[number])


@kernel
def _least_loaded(state, time):
    best, least = -1, np.int64(_TOO_BUSY)
    for number in range(state.replicas.size):
        requests = load(state, number, time)
        if requests < least:
            best, least = number, requests
    return best


@kernel
def _by_turn(state):
    fleet = state.fleet[0]
    for _ in range(state.replicas.size):
        number = fleet.turn % state.replicas.size
        fleet.turn = number + 1
        if state.replicas[number].accepting:
            return number
    return -1


@kernel
def _by_session(state, session):
    """Rendezvous hashing: when a replica goes, only its own sessions move."""
    best, highest = -1, np.uint64(0)
    for number in range(state.replicas.size):
        if state.replicas[number].accepting:
            weight = mix(np.uint64(session) ^ mix(np.uint64(number)))
            if best < 0 or weight > highest:
                best, highest = number, weight
    return best


@small_kernel
def _key(workload, row, size, block):
    """Key of a block of a request's prompt."""
    return key_of(workload.chain, workload.chain_starts[row], workload.hash_tokens[row], block, size)


@kernel
def _cached_blocks(state, number, workload, row, most):
    """Leading blocks of the prompt, `most` at most, that a replica has in its cache."""
    size, blocks, buckets = state.engines[number].block_size, state.blocks[number], state.buckets[number]
    start = workload.chain_starts[row]
    if workload.hash_tokens[row] == size:
        if most == 0 or find(blocks, buckets, workload.chain[start]) == 0:
            return 0
        for block in range(most):
            ask_ahead(blocks, buckets, workload.chain, start, block, most)
            if find(blocks, buckets, workload.chain[start + block]) == 0:
                return block
    else:
        for block in range(most):
            if find(blocks, buckets, _key(workload, row, size, block)) == 0:
                return block
    return most


@small_kernel
def _needed(requests, number, longest, lightest, best):
    """Leading blocks that a replica must have to be better than the best so far."""
    lighter = requests < lightest or (requests == lightest and number < best)
    return longest if lighter else longest + 1


@kernel
def _ask_caches(state, workload, row, first, most, longest, lightest, best):
    """Ask for the memory that tells which replicas from `first` on have the last block they need to be the best."""
    if longest < 0 or longest >= most:
        return
    size, loads = state.engines[0].block_size, state.loads
    wins = bucket_of(state.buckets[0], _key(workload, row, size, longest))
    draws = bucket_of(state.buckets[0], _key(workload, row, size, max(longest - 1, 0)))
    for number in range(first, loads.size):
        bucket = wins if _needed(loads[number], number, longest, lightest, best) > longest else draws
        prefetch(state.buckets[number], bucket)
    for number in range(first, loads.size):
        bucket = wins if _needed(loads[number], number, longest, lightest, best) > longest else draws
        prefetch(state.blocks[number], np.int64(state.buckets[number, bucket]))


@kernel
def _counted(workload, row, size, block):
    """The last block up to this one whose copies are counted, -1 if there is none."""
    while block >= 0 and not is_counted(_key(workload, row, size, block)):
        block -= 1
    return block


@kernel
def _may_change(state, workload, row, block, most):
    """Whether a replica that is not up to date may by now have a block of the prompt that it lacked."""
    if block < 0 or block >= most:
        return False
    return may_come(state.pending, _key(workload, row, state.engines[0].block_size, counts_for(block)))


@kernel
def _is_alone(state, number, workload, row, most):
    """Whether a replica that is up to date has more of the prompt than any other can have.

    It has, if it holds the only copy of a block: others have less than that, and it has all before it, as caches that
    drop the least recently used block first have. Looked for where a next turn's prompt has become its session's own.
    """
    size = state.engines[0].block_size
    if state.engines[0].eviction != LRU:
        return False
    for eighths in (7, 6, 4, 2):
        block = _counted(workload, row, size, most * eighths // 8)
        if block < 0:
            return False
        key = _key(workload, row, size, block)
        held = copies(state.holders, key)
        if held > 0:
            if held > 1 or _may_change(state, workload, row, block, block + 1):
                return False
            return find(state.blocks[number], state.buckets[number], key) > 0
    return False


@kernel
def _by_prefix(state, workload, row, time):
    """The longest cached prefix among replicas not much busier than the least loaded; ties to the least loaded.

    Replicas are brought up to date only where that can matter.
    """
    engine, home = state.engines[0], mix(np.uint64(workload.session[row])) & np.uint64(state.homes.size - 1)
    most = min(workload.covered[row], workload.prompt[row]) // engine.block_size if engine.prefix_caching else 0
    loads, least = state.loads, np.int64(_TOO_BUSY)
    for number in range(loads.size):
        least = min(least, load(state, number, time))
    limit = min(least + state.fleet[0].max_imbalance, _TOO_BUSY - 1)
    best, longest, lightest = np.int64(-1), np.int64(-1), np.int64(_TOO_BUSY)
    last = np.int64(state.homes[home])
    if last < loads.size and loads[last] <= limit:
        advance(state, last, time)
        if most > 0 and _is_alone(state, last, workload, row, most - 1):
            return last
        best, longest, lightest = last, _cached_blocks(state, last, workload, row, most), np.int64(loads[last])
    _ask_caches(state, workload, row, 0, most, longest, lightest, best)
    wins_change = _may_change(state, workload, row, longest, most)
    draws_change = _may_change(state, workload, row, longest - 1, most)
    for number in range(loads.size):
        requests = np.int64(loads[number])
        if requests > limit or number == best:
            continue
        needed = _needed(requests, number, longest, lightest, best)
        if needed > most:
            continue
        if needed > 0:
            if requests > 0 and (wins_change if needed > longest else draws_change):
                advance(state, number, time)
            key = _key(workload, row, engine.block_size, needed - 1)
            if find(state.blocks[number], state.buckets[number], key) == 0:
                continue
        advance(state, number, time)
        match = _cached_blocks(state, number, workload, row, most)
        if match < needed:
            continue
        if match > longest:
            wins_change = _may_change(state, workload, row, match, most)
            draws_change = _may_change(state, workload, row, match - 1, most)
            _ask_caches(state, workload, row, number + 1, most, match, requests, np.int64(number))
        best, longest, lightest = np.int64(number), match, requests
    if best >= 0:
        state.homes[home] = best
    return best


@kernel
def route(state, workload, row, time):
    """The replica for this request, -1 if none accepts requests."""
    if workload.replica[row] >= 0:
        return np.int64(workload.replica[row])
    if state.replicas.size == 1 and state.replicas[0].accepting:
        return 0
    policy = state.fleet[0].router
    if policy == LEAST_LOADED:
        return _least_loaded(state, time)
    if policy == SESSION_AFFINITY:
        return _by_session(state, workload.session[row])
    if policy == PREFIX_AWARE:
        return _by_prefix(state, workload, row, time)
    return _by_turn(state)
