"""Moving one replica through time, and the events that reach it from outside."""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel, linked
from kavier_twin.simulation.kernels import ENGINE, POLICIES, TIERS
from kavier_twin.simulation.kernels.cache.blocks import enter, remove
from kavier_twin.simulation.kernels.cache.eviction import ttl
from kavier_twin.simulation.kernels.cache.eviction.order import order_of
from kavier_twin.simulation.kernels.cache.eviction.stranded import stranded_blocks
from kavier_twin.simulation.kernels.cache.holders import count_pending, discount_copy
from kavier_twin.simulation.kernels.cache.keys import private_key
from kavier_twin.simulation.kernels.step import queue
from kavier_twin.simulation.kernels.step.flow import dissolve_flow, leave, list_explicit, refresh
from kavier_twin.simulation.kernels.step.jump import jump
from kavier_twin.simulation.kernels.step.requests import (
    account,
    add_blocks,
    block_key,
    cell_class,
    cells_needed,
    close,
    count_hits,
    dissolve,
    give_cells,
    lookup,
    register,
    take_cells,
    take_hits,
    withdraw,
)
from kavier_twin.simulation.kernels.step.scheduler import complete, linear_seconds, schedule
from kavier_twin.simulation.kernels.tiers.chunks import disk_of, host_of, rename
from kavier_twin.simulation.kernels.tiers.loads import break_off, observe
from kavier_twin.simulation.kernels.tiers.stores import chunk_key, rest
from kavier_twin.simulation.kernels.tiers.transfers import observe_disk
from kavier_twin.simulation.state import FINISHED, GROW_ARENA, LOADING, LRU, OK, PRIVATE, RUNNING, TTL, FleetState

_PRIVATE = np.uint64(PRIVATE)


@linked(POLICIES)
def _expire(state: FleetState, number: int, time: float) -> None:
    ttl.expire(order_of(state, number), time)


@kernel
def _next_event(state, number, until):
    """Schedule or complete one batch, or jump over many, of those that are due by `until`. Returns whether one was."""
    replica, engine = state.replicas[number], state.engines[number]
    depth = 2 if engine.async_scheduling else 1
    can_schedule = (
        replica.in_flight < depth
        and not replica.parked
        and replica.now >= replica.hold_until
        and replica.running + replica.waiting + replica.loading > 0
        and replica.now < until
    )
    if can_schedule:
        if engine.eviction == TTL:
            _expire(state, number, replica.now)
        if engine.stepping or replica.in_flight != depth - 1 or not jump(state, number, until):
            schedule(state, number)
    elif replica.in_flight > 0 and state.batches[number, replica.oldest].end <= until:
        complete(state, number)
    elif replica.in_flight == 0 and replica.now < replica.hold_until < until:
        replica.now = replica.hold_until
    elif replica.in_flight == 0 and replica.parked and state.tiers[number].wake < until:
        replica.now = max(replica.now, state.tiers[number].wake)
        replica.parked = 0
    else:
        return False
    return True


@linked(ENGINE)
def advance(state: FleetState, number: int, until: float) -> None:
    """Run a replica up to `until`: batches that end by then complete, batches that start before then are scheduled.

    An arrival at exactly `until` therefore still reaches the scheduling decision of that moment, as in vLLM.
    """
    replica, engine = state.replicas[number], state.engines[number]
    while _next_event(state, number, until):
        pass
    account(replica, engine, min(until, max(replica.now, until)) if until < np.inf else replica.now)
    if engine.eviction == TTL:
        _expire(state, number, until if until < np.inf else replica.now)


@linked(ENGINE)
def advance_until_end(state: FleetState, number: int, until: float) -> None:
    """Run a replica up to `until`, or to the moment one of its requests ends if that comes before."""
    ended = state.fleet[0].outcomes
    while state.fleet[0].outcomes == ended and _next_event(state, number, until):
        pass


@kernel
def _refit(state, number, slot, chain_length, output):
    """Give a live request room for a longer hash chain or output. Returns OK or GROW_ARENA (then nothing changed)."""
    engine, arena, tier = state.engines[number], state.arena[number], state.tiers[number]
    request = state.requests[number][slot]
    # It may hold more blocks than that: those of tokens that were never real are only freed with it.
    cells = cells_needed(engine, tier, chain_length, max(request.prompt + output, request.blocks * engine.block_size))
    size = max(request.cell_class, cell_class(cells))
    if size != request.cell_class or chain_length != request.chain_length:
        target = take_cells(state.replicas[number], arena, state.arena_free[number], size)
        if target < 0:
            return GROW_ARENA
        source = request.cells
        for link in range(request.chain_length):
            arena[target + link] = arena[source + link]
        for block in range(request.blocks):
            arena[target + chain_length + block] = arena[source + request.chain_length + block]
        if tier.chunks > 0:
            room = (1 << np.int64(size)) - chain_length - request.blocks
            kept = (1 << np.int64(request.cell_class)) - request.chain_length - request.blocks
            for mark in range(room):
                end = target + (1 << np.int64(size)) - 1
                old = source + (1 << np.int64(request.cell_class)) - 1
                arena[end - mark] = arena[old - mark] if mark < kept else np.uint64(0)
        give_cells(arena, state.arena_free[number], source, request.cell_class)
        request.cells = target
        request.cell_class = size
        request.chain_length = chain_length
    return OK


@kernel
def set_output(state, number, slot, output, final):
    """Change how many tokens a live request will generate. Returns OK or GROW_ARENA (then nothing changed).

    Never below what is delivered and in flight, unless it is `final`: the caller ends the request at once.
    """
    replica, request = state.replicas[number], state.requests[number][slot]
    if request.flowing:
        leave(state, number, slot)
    output = max(1, min(output, state.engines[number].max_model_len - request.prompt))
    if not final:
        output = max(output, request.computed + 1 - request.prompt, request.tokens - request.prompt)
    status = _refit(state, number, slot, request.chain_length, output)
    if status == OK:
        if request.held:
            replica.holding += (request.tokens >= request.prompt + output) - (
                request.tokens >= request.prompt + request.output
            )
        request.output = output
        if request.state == RUNNING:
            list_explicit(state, number)
        if not final:
            replica.parked = 0
        state.quiet_until[number] = -np.inf
    return status


@kernel
def learn_chain(state, number, slot, chain, covered):
    """The content of prompt and output became known: identify the blocks that were private until now.

    `chain` is the whole chain of keys (`chain_keys`), of prompt and output. Returns OK or GROW_ARENA (then nothing
    changed).
    """
    engine, arena = state.engines[number], state.arena[number]
    blocks, buckets = state.blocks[number], state.buckets[number]
    request = state.requests[number][slot]
    if request.hash_tokens <= 0 or chain.size < request.chain_length:
        return OK
    status = _refit(state, number, slot, chain.size, request.output)
    if status != OK:
        return status
    count_pending(state, number, slot, -1)
    for link in range(chain.size):
        arena[request.cells + link] = chain[link]
    recall_load(state, number, slot)
    first = request.known
    request.covered = covered
    request.known = covered // engine.block_size
    count_pending(state, number, slot, 1)
    table = request.cells + request.chain_length
    for at in range(first, min(request.registered, request.known)):
        block = np.int64(arena[table + at])
        if blocks[block].key != _PRIVATE:
            discount_copy(state.holders, blocks[block].key)
            remove(blocks, buckets, block)
        key = block_key(request, arena, at, engine.block_size)
        enter(blocks, buckets, state.holders, block, key)
    if state.tiers[number].chunks > 0:
        _rename_chunks(state, number, slot, first)
    return OK


@linked(TIERS)
def _rename_chunks(state: FleetState, number: int, slot: int, first: int) -> None:
    """The request's blocks from `first` on have keys that tell their content now, in the tiers too."""
    tier, request, arena = state.tiers[number], state.requests[number][slot], state.arena[number]
    for chunk in range(first // tier.blocks_per_chunk, request.known // tier.blocks_per_chunk):
        key = chunk_key(tier, request, arena, chunk, state.engines[number].block_size)
        private = private_key(request.uid, (chunk + 1) * tier.blocks_per_chunk - 1)
        rename(host_of(state, number), private, key)
        if tier.disk_chunks > 0:
            rename(disk_of(state, number), private, key)


@kernel
def _catch_up(state, number, slot, time):
    """Reality was faster: run the steps that the request still needs, in no time.

    All running requests advance together, as they did in reality. Stops early where the request cannot advance
    (another one waits for its own end, or the request is not running).
    """
    replica, engine, request = state.replicas[number], state.engines[number], state.requests[number][slot]
    depth = 2 if engine.async_scheduling else 1
    patience = request.prompt + request.output - request.tokens + 2 * depth + request.prompt
    while request.tokens < request.prompt + request.output and patience > 0:
        patience -= 1
        if replica.in_flight < depth and request.state == RUNNING:
            replica.now = max(replica.now, time)
            schedule(state, number)
            if replica.parked:
                break
            state.batches[number, (replica.oldest + replica.in_flight - 1) % 2].end = time
        if replica.in_flight == depth:
            state.batches[number, replica.oldest].end = min(state.batches[number, replica.oldest].end, time)
            complete(state, number)
        elif request.state != RUNNING:
            break


@kernel
def finish_now(state, number, slot, time):
    """End a live request now, as a finish record says it did.

    The caller advanced the replica to `time` and set the request's true output. If the simulation is behind, it
    catches up, all requests together; what then is still missing is completed for this request alone (a request still
    waiting is admitted on the spot), so that the cache holds what the real one holds.
    """
    replica, engine = state.replicas[number], state.engines[number]
    blocks, buckets, arena = state.blocks[number], state.buckets[number], state.arena[number]
    request = state.requests[number][slot]
    if request.flowing:
        leave(state, number, slot)
    size = engine.block_size
    parked, replica.parked = replica.parked, 0
    account(replica, engine, time)
    if not request.held:  # it ends here, in none of the steps that catch up
        request.held = 1
        replica.holding += request.tokens >= request.prompt + request.output
    if request.tokens < request.prompt + request.output:
        expected = _expected_finish(replica, engine, request, time)
        # More than all memory, and the steps would reject it.
        if request.state == RUNNING and request.prompt + request.output - 1 <= size * (engine.num_blocks - 1):
            _catch_up(state, number, slot, time)
    else:
        expected = request.predicted_finish
    admitted = request.state == RUNNING
    recall_load(state, number, slot)
    withdraw(state, number, slot)
    request.predicted_finish = expected
    if not admitted:
        request.blocks = 0
        request.registered = 0
        if engine.prefix_caching:
            hits, _, _ = lookup(request, blocks, buckets, arena, size)
            if engine.eviction != LRU and request.preemptions == 0:
                replica.stranded_tokens += size * stranded_blocks(state, number, request, hits)
            take_hits(state, number, request, hits)
        if request.preemptions == 0:
            request.scheduled = time
            if not request.counted:
                count_hits(replica, request, request.blocks * size)
    final = request.prompt + request.output - 1
    needed = (final + size - 1) // size - request.blocks
    if needed > 0:
        add_blocks(state, number, request, min(needed, replica.free_blocks))
    if engine.prefix_caching:
        register(state, number, request, min(final // size, request.blocks))
    if np.isnan(request.first_token):
        request.first_token = time
        replica.prompt_tokens += request.prompt
    replica.output_tokens += request.prompt + request.output - request.tokens
    request.tokens = request.prompt + request.output
    close(state, number, slot, FINISHED, time)
    if replica.in_flight == 0 or parked:  # a parked one may have a batch in flight, emptied by a preemption
        replica.now = max(replica.now, time)
    refresh(state, number)


@kernel
def recall_load(state, number, slot):
    """Back to the queue with a request that loads, its blocks freed; others are left as they are."""
    if state.requests[number][slot].state == LOADING:
        _recall(state, number, slot)


@linked(TIERS)
def _recall(state: FleetState, number: int, slot: int) -> None:
    replica, requests = state.replicas[number], state.requests[number]
    break_off(state, number, slot)
    queue.enqueue(replica, requests, state.waiting[number], state.engines[number].priority_policy, slot)
    replica.parked = 0
    state.quiet_until[number] = -np.inf


@kernel
def _expected_finish(replica, engine, request, time):
    """When a request that is behind would end: its remaining tokens at the pace of a decode step of today's batch."""
    left = request.prompt + request.output - request.tokens
    running = max(1, replica.running)
    step = (
        engine.fixed
        + engine.per_decode_sequence * running
        + engine.linear_scale * linear_seconds(engine, float(running))
    )
    return time + left * step


@kernel
def abandon(state, number, slot, time):
    """Drop a live request without a trace: it will start again elsewhere, or be reported lost by the caller."""
    account(state.replicas[number], state.engines[number], time)
    recall_load(state, number, slot)
    withdraw(state, number, slot)
    dissolve(state, number, slot)
    state.replicas[number].received -= 1


@kernel
def settle(state, number):
    """Complete the batches in flight without scheduling more, every request spelled out."""
    dissolve_flow(state, number)
    while state.replicas[number].in_flight > 0:
        complete(state, number)


@kernel
def settle_tiers(state, number):
    """Let a settled replica's transfers be complete, and its requests that load go back to the queue."""
    replica, tier, loading = state.replicas[number], state.tiers[number], state.tier_slots[number, 0]
    if tier.chunks == 0:
        return
    while replica.loading > 0:
        recall_load(state, number, loading[replica.loading - 1])
    rest(state, number)
    observe(state, number, np.inf, replica.now)
    observe_disk(state, number, np.inf)
