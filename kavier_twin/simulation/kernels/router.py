"""Which replica a request goes to. Policies see what a router could see: requests in flight and cache content now."""

import numpy as np

from kavier_twin.simulation.kernels.blocks import find, mix
from kavier_twin.simulation.kernels.compile import inlined_kernel, kernel
from kavier_twin.simulation.kernels.flow import next_end
from kavier_twin.simulation.kernels.replica import advance
from kavier_twin.simulation.state import LEAST_LOADED, PREFIX_AWARE, SESSION_AFFINITY


@inlined_kernel
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
    shortest = engine.fixed + engine.per_decode_sequence + engine.per_context_token
    return end + (next_end(state, number) - replica.completed_batches - 1) * shortest


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


@kernel
def _cached_blocks(state, number, workload, row):
    """Leading blocks of the prompt that a replica has in its cache."""
    engine = state.engines[number]
    if not engine.prefix_caching:
        return 0
    blocks, buckets = state.blocks[number], state.buckets[number]
    start, size, hash_tokens = workload.chain_starts[row], engine.block_size, workload.hash_tokens[row]
    most = min(workload.covered[row], workload.prompt[row]) // size
    for block in range(most):
        last = (block + 1) * size - 1
        key = workload.chain[start + last // hash_tokens] + np.uint64((last % hash_tokens) // size)
        if find(blocks, buckets, key) == 0:
            return block
    return most


@inlined_kernel
def _by_prefix(state, workload, row, time):
    """The longest cached prefix among replicas not much busier than the least loaded; ties to the least loaded."""
    least = 1 << 30
    for number in range(state.replicas.size):
        if state.replicas[number].accepting:
            advance(state, number, time)
            replica = state.replicas[number]
            least = min(least, replica.running + replica.waiting + replica.loading)
    best, longest, lightest = -1, -1, 1 << 30
    for number in range(state.replicas.size):
        replica = state.replicas[number]
        requests = replica.running + replica.waiting + replica.loading
        if not replica.accepting or requests > least + state.fleet[0].max_imbalance:
            continue
        match = _cached_blocks(state, number, workload, row)
        if match > longest or (match == longest and requests < lightest):
            best, longest, lightest = number, match, requests
    return best


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
