"""A request's life outside the scheduler: its slot, its arena cells, its blocks' keys, its end.

One arena piece per request holds its hash chain and, behind it, its block table. Pieces are powers of two with a free
list per size, so that a daemon's arena stays as large as its busiest moment.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel, linked, small_kernel
from kavier_twin.simulation.kernels import POLICIES
from kavier_twin.simulation.kernels.cache.blocks import (
    allocate,
    ask_ahead,
    ask_for_bucket,
    enter,
    find,
    release_table,
    touch,
)
from kavier_twin.simulation.kernels.cache.eviction import dispatch
from kavier_twin.simulation.kernels.cache.eviction.order import order_of
from kavier_twin.simulation.kernels.cache.holders import count_pending
from kavier_twin.simulation.kernels.cache.keys import key_of, private_key
from kavier_twin.simulation.kernels.step import queue
from kavier_twin.simulation.kernels.step.flow import leave
from kavier_twin.simulation.state import (
    FINISHED,
    FREE,
    GROW_ARENA,
    GROW_OUTCOMES,
    GROW_SLOTS,
    LRU,
    OK,
    PREEMPTED,
    PRIVATE,
    REJECTED_LENGTH,
    RUNNING,
    UNHASHED,
    WAITING,
    FleetState,
    Request,
)

_PRIVATE = np.uint64(PRIVATE)
_UNHASHED = np.uint64(UNHASHED)
_ZERO = np.uint64(0)


@kernel
def cell_class(cells):
    """The size class (log2) of an arena piece that holds this many cells."""
    size = 0
    while (1 << size) < cells:
        size += 1
    return size


@kernel
def take_cells(replica, arena, arena_free, size):
    """Offset of a piece of 2**size arena cells, -1 if the arena is full."""
    offset = arena_free[size]
    if offset >= 0:
        arena_free[size] = np.int64(arena[offset])
        return offset
    if replica.arena_top + (1 << size) > arena.size:
        return np.int64(-1)
    offset = replica.arena_top
    replica.arena_top += 1 << size
    return offset


@kernel
def give_cells(arena, arena_free, offset, size):
    """Return a piece. The list of free pieces runs through their first cells."""
    arena[offset] = np.uint64(arena_free[size])
    arena_free[size] = offset


@small_kernel
def account(replica, engine, time):
    """Run the integrals up to `time`. Called before anything they integrate changes."""
    elapsed = time - replica.accounted
    if elapsed > 0.0:
        waiting = replica.waiting + replica.loading
        if replica.running + waiting > 0:
            replica.busy_seconds += elapsed
        replica.running_seconds += elapsed * replica.running
        replica.waiting_seconds += elapsed * waiting
        replica.used_block_seconds += elapsed * (engine.num_blocks - 1 - replica.free_blocks)
        replica.accounted = time


@small_kernel
def block_key(request, arena, block, block_size):
    """Key of the request's block number `block`: from its hash chain, or private where the chain ends."""
    if block < request.known:
        return key_of(arena, request.cells, request.hash_tokens, block, block_size)
    if request.published:
        return private_key(request.uid, block)
    return _PRIVATE


@small_kernel
def keys_from(request, block, block_size):
    """Where the key of block number `block` comes from: (cell of its hash, which block under that hash).

    Walks on with `next_key`; spares two divisions a block.
    """
    last = (block + 1) * block_size - 1
    hash_tokens = max(1, request.hash_tokens)
    return request.cells + last // hash_tokens, last % hash_tokens


@small_kernel
def next_key(cell, within, hash_tokens, block_size):
    """The place (as in `keys_from`) of the following block."""
    within += block_size
    while within >= hash_tokens:
        within -= hash_tokens
        cell += 1
    return cell, within


@linked(POLICIES)
def _enter_by_policy(state: FleetState, number: int, request: Request, old: int, new: int) -> None:
    table = request.cells + request.chain_length
    dispatch.enter_blocks(order_of(state, number), request, state.arena[number], table, old, new)


@small_kernel
def register(state, number, request, full):
    """Enter the first `full` blocks into the prefix cache (vLLM `cache_full_blocks`)."""
    old = request.registered
    if full <= old:
        return
    blocks, buckets, holders, arena = state.blocks[number], state.buckets[number], state.holders, state.arena[number]
    block_size = state.engines[number].block_size
    first, table = np.int64(old), request.cells + request.chain_length
    known = min(full, request.known)
    if first < known:
        hash_tokens = request.hash_tokens
        single = hash_tokens == block_size
        cell, within = keys_from(request, first, block_size)
        if single:
            for ahead in range(1, min(request.known - first, known - first + 1)):
                ask_for_bucket(buckets, arena[cell + ahead])  # of the next block to come, too
        for at in range(first, known):
            sub = 0 if single else within // block_size
            enter(blocks, buckets, holders, np.int64(arena[table + at]), arena[cell] + np.uint64(sub))
            cell, within = next_key(cell, within, hash_tokens, block_size)
        first = known
    for at in range(first, full):
        block = np.int64(arena[table + at])
        if request.published:
            enter(blocks, buckets, holders, block, private_key(request.uid, at))
        else:
            blocks[block].key = _PRIVATE
    request.registered = full
    if state.engines[number].eviction != LRU:
        _enter_by_policy(state, number, request, old, full)


@kernel
def publish(request, blocks, buckets, holders, arena):
    """Make the private blocks findable: the request lost its blocks and will look for them again."""
    table = request.cells + request.chain_length
    request.published = 1
    for number in range(request.registered):
        block = np.int64(arena[table + number])
        if blocks[block].key == _PRIVATE:
            enter(blocks, buckets, holders, block, private_key(request.uid, number))


@kernel
def lookup(request, blocks, buckets, arena, block_size):
    """The longest cached prefix, capped at num_tokens - 1 (vLLM `get_computed_blocks`).

    Writes the blocks found into the block table. Returns (blocks found, how many of them are evictable, key of the
    first missing block or 0 if none is worth waiting for).
    """
    if request.skips_lookup:
        return 0, 0, _ZERO
    table = request.cells + request.chain_length
    most = (request.tokens - 1) // block_size
    known = min(most, request.known)
    hash_tokens = request.hash_tokens
    single = hash_tokens == block_size
    evictable = 0
    cell, within = keys_from(request, 0, block_size)
    for number in range(known):
        if single:
            ask_ahead(blocks, buckets, arena, request.cells, number, known)
        key = arena[cell] + np.uint64(0 if single else within // block_size)
        block = find(blocks, buckets, key)
        if block == 0:
            return number, evictable, key
        if blocks[block].refs == 0:
            evictable += 1
        arena[table + number] = np.uint64(block)
        cell, within = next_key(cell, within, hash_tokens, block_size)
    if not request.published:
        return known, evictable, _ZERO
    for number in range(known, most):
        key = private_key(request.uid, number)
        block = find(blocks, buckets, key)
        if block == 0:
            return number, evictable, key
        if blocks[block].refs == 0:
            evictable += 1
        arena[table + number] = np.uint64(block)
    return most, evictable, _ZERO


@linked(POLICIES)
def _take_hits_by_policy(state: FleetState, number: int, request: Request, hits: int) -> None:
    table = request.cells + request.chain_length
    dispatch.hit_blocks(order_of(state, number), request, state.arena[number], table, hits)


@small_kernel
def take_hits(state, number, request, hits):
    """Hold the first `hits` blocks, which `lookup` wrote into the block table."""
    if state.engines[number].eviction == LRU:
        table = request.cells + request.chain_length
        for at in range(hits):
            touch(state.replicas[number], state.blocks[number], np.int64(state.arena[number, table + at]))
    else:
        _take_hits_by_policy(state, number, request, hits)
    request.blocks = hits
    request.registered = hits


@linked(POLICIES)
def _add_blocks_by_policy(state: FleetState, number: int, request: Request, count: int) -> None:
    end = request.cells + request.chain_length + request.blocks
    dispatch.allocate(order_of(state, number), state.arena[number], end, count)


@small_kernel
def add_blocks(state, number, request, count):
    """Allocate `count` blocks to the end of the block table."""
    if state.engines[number].eviction == LRU:
        end = request.cells + request.chain_length + request.blocks
        blocks, buckets = state.blocks[number], state.buckets[number]
        allocate(state.replicas[number], blocks, buckets, state.holders, state.arena[number], end, count)
    else:
        _add_blocks_by_policy(state, number, request, count)
    request.blocks += count


@linked(POLICIES)
def _free_blocks_by_policy(state: FleetState, number: int, request: Request) -> None:
    table = request.cells + request.chain_length
    dispatch.release_blocks(order_of(state, number), state.arena[number], table, request.blocks)


@small_kernel
def free_blocks(state, number, request):
    """Return all blocks, the tail of the sequence first."""
    if state.engines[number].eviction == LRU:
        table = request.cells + request.chain_length
        release_table(state.replicas[number], state.blocks[number], state.arena[number], table, request.blocks)
    else:
        _free_blocks_by_policy(state, number, request)
    request.blocks = 0
    request.registered = 0


@kernel
def report(fleet, outcomes, replica, request, number, status, time):
    """Add the row of a request that ended."""
    row = outcomes[fleet.outcomes]
    fleet.outcomes += 1
    row.index = request.index
    row.session = request.session
    row.replica = number
    row.status = status
    row.prompt = request.prompt
    row.output = request.tokens - request.prompt
    row.cached = request.cached
    row.external = request.external
    row.preemptions = request.preemptions
    row.arrival = request.arrival
    row.scheduled = request.scheduled
    row.first_token = request.first_token
    row.finish = time
    row.predicted_finish = request.predicted_finish if request.held else time
    for part in range(row.prefill_work.size):
        row.prefill_work[part] = request.work_first_token[part] - request.work_scheduled[part]
        row.decode_work[part] = replica.work[part] - request.work_first_token[part]


@kernel
def close(state, number, slot, status, time):
    """End a request: report it and free what it holds. Its queue places are the caller's."""
    replica = state.replicas[number]
    report(state.fleet[0], state.outcomes, replica, state.requests[number][slot], number, status, time)
    if status == FINISHED:
        replica.finished += 1
    else:
        replica.rejected += 1
    tier = state.tiers[number]
    if tier.chunks > 0 and status == FINISHED:
        # The next batch tells the host tier about it: until then its keys are needed.
        release_request(state, number, slot)
        state.tier_slots[number, 1][tier.ended] = slot
        tier.ended += 1
    else:
        dissolve(state, number, slot)


@kernel
def dissolve(state, number, slot):
    """Free a request's blocks, its cells and its slot."""
    release_request(state, number, slot)
    give_back(state, number, slot)


@kernel
def release_request(state, number, slot):
    """A request is live no more: free its blocks."""
    state.fleet[0].live -= 1
    request = state.requests[number][slot]
    free_blocks(state, number, request)
    request.state = FREE


@kernel
def give_back(state, number, slot):
    """Return the cells and the slot of a request that is live no more."""
    replica, request = state.replicas[number], state.requests[number][slot]
    count_pending(state, number, slot, -1)
    give_cells(state.arena[number], state.arena_free[number], request.cells, request.cell_class)
    state.slots[number][replica.free_slots] = slot
    replica.free_slots += 1


@kernel
def count_hits(replica, request, local):
    """Enter the prefix hits of a request's first admission into the counters, once."""
    request.counted = 1
    request.cached = local
    if request.skips_lookup:  # vLLM records no query
        return
    replica.query_tokens += request.tokens
    replica.hit_tokens += local


@kernel
def cells_needed(engine, tier, chain_length, tokens):
    """Arena cells for a request of so many tokens in all: its chain, its block table, its marks on chunks."""
    marks = tokens // (tier.blocks_per_chunk * engine.block_size) if tier.chunks > 0 else 0
    return max(1, chain_length + (tokens + engine.block_size - 1) // engine.block_size + marks)


@kernel
def clear_marks(state, number, slot):
    """No chunk is marked yet. Marks lie at the end of a request's piece, behind all else: see `stores.marks_cell`."""
    request, arena = state.requests[number][slot], state.arena[number]
    for cell in range(request.chain_length + request.blocks, 1 << np.int64(request.cell_class)):
        arena[request.cells + cell] = _ZERO


@kernel
def push(state, number, workload, row):
    """A request reaches a replica. Returns (status, slot); any status but OK means: grow, and push again."""
    fleet = state.fleet[0]
    replica, engine = state.replicas[number], state.engines[number]
    if replica.free_slots == 0:
        return GROW_SLOTS, -1
    if fleet.outcomes + fleet.live + 1 > state.outcomes.size:
        return GROW_OUTCOMES, -1
    requests, arena = state.requests[number], state.arena[number]
    prompt = workload.prompt[row]
    output = max(1, min(workload.output[row], engine.max_model_len - prompt))
    chain_start, chain_end = workload.chain_starts[row], workload.chain_starts[row + 1]
    chain_length = chain_end - chain_start
    size = cell_class(cells_needed(engine, state.tiers[number], chain_length, prompt + output))
    cells = take_cells(replica, arena, state.arena_free[number], size)
    if cells < 0:
        return GROW_ARENA, -1
    time = workload.delivered[row]
    account(replica, engine, time)
    replica.free_slots -= 1
    slot = state.slots[number][replica.free_slots]
    request = requests[slot]
    request.prompt = prompt
    request.output = output
    request.tokens = prompt
    request.computed = 0
    request.placeholders = 0
    request.in_flight = 0
    request.stale = 0
    request.blocks = 0
    request.registered = 0
    request.state = WAITING
    request.published = 0
    request.held = workload.held[row]
    request.flowing = 0
    request.priority = workload.priority[row]
    request.sequence = replica.next_sequence
    request.index = workload.index[row]
    request.uid = replica.next_uid
    request.session = workload.session[row]
    request.adapter = workload.adapter[row]
    request.skips_lookup = workload.skips_lookup[row]
    request.cells = cells
    request.cell_class = size
    request.chain_length = chain_length
    request.hash_tokens = workload.hash_tokens[row]
    request.covered = min(workload.covered[row], prompt + output)
    request.known = request.covered // engine.block_size
    request.cached = 0
    request.external = 0
    request.counted = 0
    request.prefilling = 0
    request.probed = 0
    request.stored = 0
    request.stores = 0
    request.tier_rank = 0
    request.arrived = 0
    request.preemptions = 0
    request.arrival = workload.arrival[row]
    request.scheduled = np.nan
    request.first_token = np.nan
    request.stalled_since = np.nan
    request.predicted_finish = np.nan
    for part in range(request.work_scheduled.size):
        request.work_scheduled[part] = np.nan
        request.work_first_token[part] = np.nan
    for link in range(chain_length):
        arena[cells + link] = workload.chain[chain_start + link]
    count_pending(state, number, slot, 1)
    if state.tiers[number].chunks > 0:
        clear_marks(state, number, slot)
    replica.next_sequence += 1
    replica.next_uid += 1
    replica.received += 1
    state.quiet_until[number] = -np.inf
    fleet.live += 1
    if replica.parked or (replica.in_flight == 0 and replica.running + replica.waiting + replica.loading == 0):
        replica.now = max(replica.now, time)
        replica.parked = 0
    if prompt >= engine.max_model_len:
        close(state, number, slot, REJECTED_LENGTH, time)
        return OK, -1
    queue.enqueue(replica, requests, state.waiting[number], engine.priority_policy, slot)
    return OK, slot


@kernel
def leave_running(state, number, slot):
    """Take a slot out of the running lists, keeping their order (they are sorted by `run_order`)."""
    replica, requests, running = state.replicas[number], state.requests[number], state.running[number]
    order = requests[slot].run_order
    low, high = 0, replica.running
    while low < high:
        middle = (low + high) // 2
        if requests[running[middle]].run_order < order:
            low = middle + 1
        else:
            high = middle
    for after in range(low, replica.running - 1):
        running[after] = running[after + 1]
    replica.running -= 1
    explicit = state.explicit[number]
    for place in range(replica.explicit):
        if explicit[place] == slot:
            for after in range(place, replica.explicit - 1):
                explicit[after] = explicit[after + 1]
            replica.explicit -= 1
            break


@kernel
def leave_batches(state, number, slot):
    """Strike a slot from the batches in flight (its entry stays, without a request)."""
    for place in range(2):
        entries = state.entries[number, place]
        for at in range(state.batches[number, place].count):
            if entries[at].slot == slot:
                entries[at].slot = -1


@kernel
def withdraw(state, number, slot):
    """Take a live request out of every list of the scheduler (an abort, or an end that comes from outside)."""
    replica, requests = state.replicas[number], state.requests[number]
    request = requests[slot]
    if request.state == RUNNING:
        if request.flowing:
            leave(state, number, slot)
        leave_running(state, number, slot)
    elif request.state == WAITING or request.state == PREEMPTED:
        queue.remove(replica, requests, state.waiting[number], state.engines[number].priority_policy, slot)
    leave_batches(state, number, slot)
    if request.held and request.tokens >= request.prompt + request.output:
        replica.holding -= 1
        if replica.holding == 0:
            replica.hold_until = -np.inf
    replica.parked = 0
    state.quiet_until[number] = -np.inf
