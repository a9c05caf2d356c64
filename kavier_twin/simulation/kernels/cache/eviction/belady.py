"""Belady's optimum (A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 5(2), 1966).

What is used again the furthest in the future goes first. The uses to come are known by hash of the trace: `oracle`
and `uses` (see `simulation/future.py`); requests count in order of arrival, and only what lies in their prompts. A
chain's ancestors are used no later than its descendants, and among equals descendants go first: no block is kept
without its ancestors.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel, linked
from kavier_twin.simulation.kernels import POLICIES
from kavier_twin.simulation.kernels.cache.blocks import find
from kavier_twin.simulation.kernels.cache.eviction import heap
from kavier_twin.simulation.kernels.cache.eviction.order import order_of
from kavier_twin.simulation.kernels.cache.keys import key_of, mix
from kavier_twin.simulation.state import BELADY, PRIVATE, UNHASHED, FleetState, Workload

_PRIVATE = np.uint64(PRIVATE)
_UNHASHED = np.uint64(UNHASHED)
_EMPTY = np.uint64(0)
_HASH_BITS = ~np.uint64(1023)  # of a block's key: which hash of the trace it belongs to (keys.chain_key)
LAST = 1 << 62  # greater than any request's index


@kernel
def _bucket(oracle, key):
    """Where the key stands in the table, or where it would."""
    mask = np.uint64(oracle.size - 1)
    at = mix(key) & mask
    while oracle[np.int64(at)].key != _EMPTY and oracle[np.int64(at)].key != key:
        at = (at + np.uint64(1)) & mask
    return np.int64(at)


@kernel
def fill_oracle(future, keys):
    """Build the table over `keys`, the hash of each row of the uses, in which equal ones stand together."""
    oracle = future.bucket
    for row in range(keys.size):
        bucket = oracle[_bucket(oracle, keys[row])]
        if bucket.key == _EMPTY:
            bucket.key = keys[row]
            bucket.first = row
        bucket.count += 1


@kernel
def next_rank(order, key, arrival, index):
    """Rank of the first request behind (arrival, index) whose prompt has the block with this key; infinite: none."""
    bucket = order.oracle[_bucket(order.oracle, key & _HASH_BITS)]
    uses, low, high = order.uses, bucket.first, bucket.first + bucket.count
    end = high
    while low < high:
        middle = (low + high) // 2
        use = uses[middle]
        if use.arrival > arrival or (use.arrival == arrival and use.index > index):
            high = middle
        else:
            low = middle + 1
    return float(uses[low].rank) if low < end else np.inf


@kernel
def used(order, block, arrival, index):
    """The request (arrival, index) uses the block. Of several requests that do, the last one tells the next use."""
    node = order.nodes[block]
    node.priority = min(node.priority, -next_rank(order, order.blocks[block].key, arrival, index))


@kernel
def _move(order, block, arrival, index):
    """`used` for a block that may be in the heap."""
    used(order, block, arrival, index)
    if order.nodes[block].place >= 0:
        heap.restore(order, block)


@kernel
def entered(order, block, arrival, index):
    """Another copy of what is cached is of no use: lookups find the first."""
    node, key = order.nodes[block], order.blocks[block].key
    node.priority = -np.inf
    if key == _PRIVATE:
        return
    first = find(order.blocks, order.buckets, key)
    if first == block:
        node.priority = np.inf
        used(order, block, arrival, index)
    else:
        _move(order, first, arrival, index)


@linked(POLICIES)
def passed(state: FleetState, row: int, workload: Workload, number: int) -> None:
    """A request went to replica `number` (-1: to none): on the others its blocks wait for the use after it."""
    for other in range(state.replicas.size):
        if other == number or not state.engines[other].prefix_caching or state.engines[other].eviction != BELADY:
            continue
        order = order_of(state, other)
        size, hash_tokens = state.engines[other].block_size, workload.hash_tokens[row]
        for at in range(min(workload.covered[row], workload.prompt[row]) // size):
            key = key_of(workload.chain, workload.chain_starts[row], hash_tokens, at, size)
            block = find(order.blocks, order.buckets, key)
            if block != 0:
                _move(order, block, workload.arrival[row], workload.index[row])


@kernel
def learn(state, number, time):
    """The uses after `time` became known: what is cached is wanted at the first of them."""
    order = order_of(state, number)
    for block in range(1, order.blocks.size):
        key = order.blocks[block].key
        if key == _UNHASHED or key == _PRIVATE or find(order.blocks, order.buckets, key) != block:
            continue
        rank = next_rank(order, key, time, LAST)
        if rank < np.inf:
            order.nodes[block].priority = -rank
            if order.nodes[block].place >= 0:
                heap.restore(order, block)
