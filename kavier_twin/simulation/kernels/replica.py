"""Moving one replica through time, and the events that reach it from outside."""

import numpy as np

from kavier_twin.simulation.kernels.blocks import touch
from kavier_twin.simulation.kernels.compile import kernel
from kavier_twin.simulation.kernels.jump import jump
from kavier_twin.simulation.kernels.requests import (
    GROW_ARENA,
    OK,
    account,
    add_blocks,
    cell_class,
    chain_key,
    close,
    give_cells,
    lookup,
    register,
    take_cells,
    withdraw,
)
from kavier_twin.simulation.kernels.scheduler import complete, schedule
from kavier_twin.simulation.state import FINISHED, LOST, RUNNING


@kernel
def advance(state, number, until):
    """Run a replica up to `until`: batches that end by then complete, batches that start before then are scheduled.

    An arrival at exactly `until` therefore still reaches the scheduling decision of that moment, as in vLLM.
    """
    replica, engine = state.replicas[number], state.engines[number]
    depth = 2 if engine.async_scheduling else 1
    while True:
        can_schedule = (
            replica.in_flight < depth
            and not replica.parked
            and replica.running + replica.waiting > 0
            and replica.now < until
        )
        if can_schedule:
            if engine.stepping or replica.in_flight != depth - 1 or not jump(state, number, until):
                schedule(state, number)
        elif replica.in_flight > 0 and state.batches[number, replica.oldest].end <= until:
            complete(state, number)
        else:
            break
    account(replica, engine, min(until, max(replica.now, until)) if until < np.inf else replica.now)


@kernel
def set_output(state, number, slot, output):
    """Change how many tokens a live request will generate. Returns OK or GROW_ARENA (then nothing changed)."""
    replica, engine = state.replicas[number], state.engines[number]
    arena, request = state.arena[number], state.requests[number][slot]
    output = max(1, min(output, engine.max_model_len - request.prompt))
    cells = request.chain_length + (request.prompt + output + engine.block_size - 1) // engine.block_size
    return _resize(state, number, request, request.chain_length, cells, output, replica, arena)


@kernel
def _resize(state, number, request, chain_length, cells, output, replica, arena):
    old_length, held = request.chain_length, request.blocks
    size = max(request.cell_class, cell_class(cells))
    if size != request.cell_class or chain_length != old_length:
        target = take_cells(replica, arena, state.arena_free[number], size)
        if target < 0:
            return GROW_ARENA
        source = request.cells
        for link in range(min(old_length, chain_length)):
            arena[target + link] = arena[source + link]
        for block in range(held):
            arena[target + chain_length + block] = arena[source + old_length + block]
        give_cells(arena, state.arena_free[number], source, request.cell_class)
        request.cells = target
        request.cell_class = size
        request.chain_length = chain_length
    request.output = output
    replica.parked = 0
    replica.quiet_until = -np.inf
    return OK


@kernel
def learn_chain(state, number, slot, chain, covered):
    """The content of prompt and output became known: identify the blocks that were private until now.

    `chain` is the whole chain of hashes as the trace gives them. Returns OK or GROW_ARENA (then nothing changed).
    """
    replica, engine = state.replicas[number], state.engines[number]
    blocks, buckets, arena = state.blocks[number], state.buckets[number], state.arena[number]
    request = state.requests[number][slot]
    if request.hash_tokens <= 0 or chain.size <= request.chain_length:
        return OK
    cells = chain.size + (request.prompt + request.output + engine.block_size - 1) // engine.block_size
    status = _resize(state, number, request, chain.size, cells, request.output, replica, arena)
    if status != OK:
        return status
    parent = np.uint64(0)
    for link in range(chain.size):
        parent = chain_key(parent, chain[link])
        arena[request.cells + link] = parent
    first = request.covered // engine.block_size
    request.covered = covered
    registered = request.registered
    if registered > first and not request.published:
        request.registered = first
        register(request, blocks, buckets, arena, engine.block_size, registered * engine.block_size)
    return OK


@kernel
def finish_now(state, number, slot, time):
    """End a live request now, as a finish record says it did: tokens not yet generated are completed first.

    The caller advanced the replica to `time`. A request still waiting is admitted on the spot, so that the cache
    holds what the real one holds.
    """
    replica, engine = state.replicas[number], state.engines[number]
    blocks, buckets, arena = state.blocks[number], state.buckets[number], state.arena[number]
    request = state.requests[number][slot]
    size = engine.block_size
    account(replica, engine, time)
    admitted = request.state == RUNNING
    withdraw(state, number, slot)
    if not admitted:
        request.blocks = 0
        request.registered = 0
        if engine.prefix_caching:
            hits, _, _ = lookup(request, blocks, buckets, arena, size)
            table = request.cells + request.chain_length
            for block in range(hits):
                touch(replica, blocks, np.int64(arena[table + block]))
            request.blocks = hits
            request.registered = hits
        if request.preemptions == 0:
            request.scheduled = time
            request.cached = request.blocks * size
            replica.query_tokens += request.prompt
            replica.hit_tokens += request.cached
    final = request.prompt + request.output - 1
    needed = (final + size - 1) // size - request.blocks
    if needed > 0:
        add_blocks(replica, request, blocks, buckets, arena, min(needed, replica.free_blocks))
    if engine.prefix_caching:
        register(request, blocks, buckets, arena, size, min(final, request.blocks * size))
    if np.isnan(request.first_token):
        request.first_token = time
        replica.prompt_tokens += request.prompt
    replica.output_tokens += request.prompt + request.output - request.tokens
    request.tokens = request.prompt + request.output
    close(state, number, slot, FINISHED, time)
    if replica.in_flight == 0:
        replica.now = max(replica.now, time)


@kernel
def abandon(state, number, slot, time):
    """End a live request without completing it: its replica is gone."""
    account(state.replicas[number], state.engines[number], time)
    withdraw(state, number, slot)
    close(state, number, slot, LOST, time)
