"""Which replica a request goes to. Policies see what a router could see: requests in flight and cache content now."""

import numpy as np

from kavier_twin.simulation.kernels.blocks import NEAR, bucket_of, expected, find_oldest, mix
from kavier_twin.simulation.kernels.compile import inlined_kernel, kernel, small_kernel
from kavier_twin.simulation.kernels.flow import next_end
from kavier_twin.simulation.kernels.prefetch import prefetch
from kavier_twin.simulation.kernels.replica import advance
from kavier_twin.simulation.kernels.requests import AHEAD, ask_for, keys_from, next_key
from kavier_twin.simulation.state import LEAST_LOADED, PREFIX_AWARE, SESSION_AFFINITY


@inlined_kernel
def _quiet_until(state, number):
    """A time before which nothing can happen on the replica that a router sees, but for blocks of its decodes.

    That is the end of a request, or a batch that prefills. Decodes evict, and enter into the cache what they generate:
    whoever looks at the content of a replica that is not up to date has to think of that.
    """
    replica, engine = state.replicas[number], state.engines[number]
    if replica.running + replica.waiting + replica.loading == 0:
        return np.inf
    if replica.in_flight < (2 if engine.async_scheduling else 1) or state.tiers[number].chunks > 0:
        return replica.now
    end = state.batches[number, replica.oldest].end
    if replica.running > replica.flowing or replica.waiting > 0 or state.batches[number, 0].count > 0:
        return end
    if engine.async_scheduling and state.batches[number, 1].count > 0:
        return end
    steps = next_end(state, number) - replica.completed_batches - 1
    # Out of memory somebody would be preempted.
    if replica.flowing * (steps // engine.block_size + 2) > replica.free_blocks:
        return end
    # Assuming the shortest possible steps.
    return end + steps * (engine.fixed + engine.per_decode_sequence + engine.per_context_token)


@inlined_kernel
def load(state, number, time):
    """Live requests of a replica at `time`."""
    replica = state.replicas[number]
    if replica.quiet_until <= time:
        advance(state, number, time)
        replica.quiet_until = _quiet_until(state, number)
    return replica.running + replica.waiting + replica.loading


@inlined_kernel
def _least_loaded(state, time):
    best, least = -1, 1 << 30
    for number in range(state.replicas.size):
        if state.replicas[number].accepting:
            requests = load(state, number, time)
            if requests < least:
                best, least = number, requests
    return best


@inlined_kernel
def _by_turn(state):
    fleet = state.fleet[0]
    for _ in range(state.replicas.size):
        number = fleet.turn % state.replicas.size
        fleet.turn = number + 1
        if state.replicas[number].accepting:
            return number
    return -1


@inlined_kernel
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
def _prompt_blocks(state, number, workload, row):
    """Blocks of the prompt that may be found in a cache."""
    if not state.engines[number].prefix_caching:
        return 0
    return min(workload.covered[row], workload.prompt[row]) // state.engines[number].block_size


@small_kernel
def _place(workload, row, block, size):
    """Where the key of the prompt's block comes from: (cell of the chain, which token under that hash)."""
    last, hash_tokens = (block + 1) * size - 1, workload.hash_tokens[row]
    return workload.chain_starts[row] + last // hash_tokens, last % hash_tokens


@small_kernel
def _key(workload, row, block, size):
    cell, within = _place(workload, row, block, size)
    return workload.chain[cell] + np.uint64(within // size)


@kernel
def _cached_blocks(state, number, workload, row):
    """Leading blocks of the prompt that a replica has in its cache."""
    most = _prompt_blocks(state, number, workload, row)
    if most == 0:
        return 0
    blocks, buckets, size = state.blocks[number], state.buckets[number], state.engines[number].block_size
    hash_tokens = workload.hash_tokens[row]
    cell, within = _place(workload, row, 0, size)
    block, step, asked = np.int64(0), np.int64(1), 0
    for at in range(most):
        key = workload.chain[cell] + np.uint64(within // size)
        last, block = block, expected(blocks, key, block, step)
        if block == 0:
            if at >= asked:
                ask_for(blocks, buckets, workload.chain, cell, within, hash_tokens, size, min(AHEAD, most - at))
                asked = at + AHEAD
            block = find_oldest(blocks, buckets, key)
        if block == 0:
            return at
        if abs(block - last) <= NEAR:
            step = block - last
        cell, within = next_key(cell, within, hash_tokens, size)
    return most


@small_kernel
def _has(state, number, bucket, key):
    """Whether a replica has a block of this key in its cache."""
    block = state.buckets[number, bucket]
    while block != 0:
        if state.blocks[number, block].key == key:
            return True
        block = state.blocks[number, block].chain
    return False


@small_kernel
def _ask_replicas(state, first, bucket):
    """Ask for what `_has` of the replicas from `first` on will read."""
    for number in range(first, state.replicas.size):
        prefetch(state.buckets[number], bucket)
    for number in range(first, state.replicas.size):
        prefetch(state.blocks[number], state.buckets[number, bucket])


@kernel
def _may_generate(state, number, workload, row):
    """Whether a request of the flow may generate a block of this prompt, known where requests' answers are known.

    Keys are chained: they then share all blocks, the first one that the other generates included.
    """
    size, requests, arena = state.engines[number].block_size, state.requests[number], state.arena[number]
    most = _prompt_blocks(state, number, workload, row)
    for place in range(state.replicas[number].flowing):
        request = requests[state.flow[number][place]]
        first = request.prompt // size
        if first < request.known and first < most:
            if request.hash_tokens != workload.hash_tokens[row]:
                return True
            cell, _ = keys_from(request, first, size)
            own, _ = _place(workload, row, first, size)
            if arena[cell] == workload.chain[own]:
                return True
    return False


@inlined_kernel
def _by_prefix(state, workload, row, time):
    """The longest cached prefix among replicas not much busier than the least loaded; ties to the least loaded.

    Replicas are brought up to `time` only where that can matter: what one that is not up to date lacks is less, or
    equal, to what it seems to have, unless it is just generating this very prompt.
    """
    least = 1 << 30
    for number in range(state.replicas.size):
        if state.replicas[number].accepting:
            least = min(least, load(state, number, time))
            if state.replicas[number].flowing > 0 and _may_generate(state, number, workload, row):
                advance(state, number, time)
    best, seemed = _best_match(state, workload, row, least)
    if best >= 0:
        evictions = state.replicas[best].evictions
        advance(state, best, time)
        if (
            seemed > 0
            and state.replicas[best].evictions != evictions
            and _cached_blocks(state, best, workload, row) < seemed
        ):
            for number in range(state.replicas.size):
                if state.replicas[number].accepting:
                    advance(state, number, time)
            best, _ = _best_match(state, workload, row, least)
    return best


@kernel
def _best_match(state, workload, row, least):
    """(replica, leading blocks of the prompt that it has in its cache), -1 if no replica accepts requests."""
    replicas, buckets, size = state.replicas, state.buckets[0], state.engines[0].block_size  # all are alike
    most_requests, most = least + state.fleet[0].max_imbalance, _prompt_blocks(state, 0, workload, row)
    best, lightest = -1, 1 << 30
    for number in range(replicas.size):
        requests = replicas[number].running + replicas[number].waiting + replicas[number].loading
        if replicas[number].accepting and requests < lightest:
            best, lightest = number, requests
    first = best
    if best < 0 or most == 0:
        return best, 0
    longest, asked = _cached_blocks(state, best, workload, row), False
    more = equal = bucket_more = bucket_equal = np.uint64(0)
    for number in range(replicas.size):
        if not asked:
            # To win, a replica needs one block more, or as many if it has fewer requests. Mostly it lacks that one.
            asked = True
            if longest < most:
                more = _key(workload, row, longest, size)
                bucket_more = np.uint64(bucket_of(buckets, more))
            if longest > 0:
                equal = _key(workload, row, longest - 1, size)
                bucket_equal = np.uint64(bucket_of(buckets, equal))
            _ask_replicas(state, number, np.int64(bucket_more if best == first else bucket_equal))
        requests = replicas[number].running + replicas[number].waiting + replicas[number].loading
        if not replicas[number].accepting or requests > most_requests:
            continue
        if requests < lightest:
            if longest > 0 and not _has(state, number, np.int64(bucket_equal), equal):
                continue
        elif longest == most or not _has(state, number, np.int64(bucket_more), more):
            continue
        match = _cached_blocks(state, number, workload, row)
        if match > longest or (match == longest and requests < lightest):
            best, longest, lightest, asked = number, match, requests, False
    return best, longest


@inlined_kernel
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
