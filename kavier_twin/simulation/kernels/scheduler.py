"""One engine step: `schedule` decides what runs, `complete` stamps its tokens.

Follows vLLM 0.32 `v1/core/sched/scheduler.py` (`schedule`, `_preempt_request`, `update_from_output`),
`v1/core/sched/async_scheduler.py` and `v1/core/kv_cache_manager.py` (`allocate_slots`), for full-attention models
without speculative decoding, encoders or KV connectors.
"""

import numpy as np

from kavier_twin.simulation.kernels import queue
from kavier_twin.simulation.kernels.blocks import touch
from kavier_twin.simulation.kernels.compile import kernel
from kavier_twin.simulation.kernels.requests import (
    account,
    add_blocks,
    close,
    free_blocks,
    leave_batches,
    lookup,
    publish,
    register,
)
from kavier_twin.simulation.state import (
    FINISHED,
    FREE,
    ITL_BIN_RATIO,
    ITL_BINS,
    ITL_SMALLEST_SECONDS,
    PREEMPTED,
    REJECTED_KV_CAPACITY,
    RUNNING,
)

ADMISSIBLE = 0
NO_MEMORY = 1
NO_BUDGET = 2  # chunked prefill is off and the prompt does not fit what is left of the step's budget

_ITL_SCALE = 1.0 / np.log(ITL_BIN_RATIO)


@kernel
def itl_bin(seconds):
    """Histogram bin of an inter-token latency."""
    if seconds <= ITL_SMALLEST_SECONDS:
        return 0
    return min(ITL_BINS - 1, int(np.log(seconds / ITL_SMALLEST_SECONDS) * _ITL_SCALE))


@kernel
def step_seconds(engine, work):
    """How long the work of one batch takes: `settings.StepTime`."""
    return (
        engine.fixed * work[0]
        + engine.per_prefill_token * work[1]
        + engine.per_decode_sequence * work[2]
        + engine.per_context_token * work[3]
        + engine.per_prefill_attention * work[4]
    )


@kernel
def add_work(total, work):
    """total += work"""
    for part in range(total.size):
        total[part] += work[part]


@kernel
def _threshold(replica, engine):
    # vLLM: a long prefill that is alone has nobody to starve.
    if replica.running + replica.waiting > 1:
        return engine.long_prefill_token_threshold
    return 0


@kernel
def judge(replica, engine, request, blocks, buckets, arena, budget):
    """Whether a waiting request may be admitted now, with this much of the step's token budget left.

    Returns (verdict, tokens to schedule, prefix hits in blocks, blocks to allocate, key of the first missing block).
    """
    size = engine.block_size
    hits, evictable, missing = 0, 0, np.uint64(0)
    if engine.prefix_caching:
        hits, evictable, missing = lookup(request, blocks, buckets, arena, size)
    tokens = request.tokens - hits * size
    threshold = _threshold(replica, engine)
    if 0 < threshold < tokens:
        tokens = threshold
    if not engine.chunked_prefill and tokens > budget:
        return NO_BUDGET, 0, hits, 0, missing
    tokens = min(tokens, budget)
    watermark = engine.watermark_blocks if replica.running > 0 else 0
    if engine.reserve_full_isl:
        whole = (min(request.tokens, engine.max_model_len) + size - 1) // size
        if max(whole - hits, 0) + evictable + watermark > replica.free_blocks:
            return NO_MEMORY, 0, hits, 0, missing
    needed = max((hits * size + tokens + size - 1) // size - hits, 0)
    if needed + evictable + watermark > replica.free_blocks:
        return NO_MEMORY, 0, hits, 0, missing
    return ADMISSIBLE, tokens, hits, needed, missing


@kernel
def preempt(state, number, slot):
    """Recompute preemption: all blocks go, the request goes to the front of the queue."""
    replica, engine = state.replicas[number], state.engines[number]
    requests, blocks = state.requests[number], state.blocks[number]
    request = requests[slot]
    if engine.prefix_caching:
        publish(request, blocks, state.buckets[number], state.arena[number], engine.block_size)
    free_blocks(replica, request, blocks, state.arena[number])
    request.state = PREEMPTED
    request.computed = 0
    request.stale = request.in_flight
    request.placeholders = 0
    request.preemptions += 1
    replica.preemptions += 1
    replica.front_sequence -= 1
    request.sequence = replica.front_sequence
    if request.tokens > request.prompt and np.isnan(request.stalled_since):
        request.stalled_since = replica.last_completion
    queue.enqueue(replica, requests, state.waiting[number], engine.priority_policy, slot)


@kernel
def _victim(replica, engine, requests, running):
    """Place in the running list of the request to preempt."""
    worst = replica.running - 1
    if engine.priority_policy:
        worst = 0
        for place in range(1, replica.running):
            a, b = requests[running[place]], requests[running[worst]]
            if a.priority > b.priority or (a.priority == b.priority and a.arrival > b.arrival):
                worst = place
    return worst


@kernel
def _add_entry(entries, count, slot, tokens):
    entry = entries[count]
    entry.slot = slot
    entry.tokens = tokens
    entry.emits = 0
    return count + 1


@kernel
def _strike_entry(entries, count, slot):
    """Remove a victim that was already in this step. Returns the tokens that go back to the budget, or -1."""
    for at in range(count):
        if entries[at].slot == slot:
            tokens = entries[at].tokens
            for after in range(at, count - 1):
                entries[after].slot = entries[after + 1].slot
                entries[after].tokens = entries[after + 1].tokens
            return tokens
    return -1


@kernel
def _schedule_running(state, number, entries):
    """The running pass. Returns (entries, budget left, whether somebody was preempted)."""
    replica, engine = state.replicas[number], state.engines[number]
    requests, blocks, buckets = state.requests[number], state.blocks[number], state.buckets[number]
    arena, running = state.arena[number], state.running[number]
    size, caching = engine.block_size, engine.prefix_caching
    budget = engine.max_num_batched_tokens
    threshold = _threshold(replica, engine)
    count, preempted, place = 0, False, 0
    while place < replica.running and budget > 0:
        slot = running[place]
        request = requests[slot]
        last = request.prompt + request.output
        if request.held and request.tokens >= last:
            place += 1
            continue
        # Asynchronous scheduling: the batch in flight already brings the last token.
        if request.placeholders > 0 and request.computed + 2 - request.placeholders >= last:
            place += 1
            continue
        tokens = request.tokens + request.placeholders - request.computed
        if 0 < threshold < tokens:
            tokens = threshold
        tokens = min(tokens, budget)
        needed = (request.computed + tokens + size - 1) // size - request.blocks
        gone = False
        while needed > replica.free_blocks:
            at = _victim(replica, engine, requests, running)
            victim = running[at]
            alone = replica.running == 1
            for after in range(at, replica.running - 1):
                running[after] = running[after + 1]
            replica.running -= 1
            if at < place:
                place -= 1
            refund = _strike_entry(entries, count, victim)
            if refund >= 0:
                count -= 1
                budget += refund
            preempted = True
            if alone:
                # Nobody else holds a block and it still does not fit: vLLM would try for ever.
                requests[victim].state = FREE
                leave_batches(state, number, victim)
                close(state, number, victim, REJECTED_KV_CAPACITY, replica.now)
            else:
                preempt(state, number, victim)
            if victim == slot:
                gone = True
                break
        if gone:
            break
        if needed > 0:
            add_blocks(replica, request, blocks, buckets, arena, needed)
        if caching:
            register(request, blocks, buckets, arena, size, min(request.computed + tokens, request.tokens))
        count = _add_entry(entries, count, slot, tokens)
        budget -= tokens
        place += 1
    if budget == 0:
        for late in range(place, replica.running):
            request = requests[running[late]]
            if request.tokens > request.prompt and np.isnan(request.stalled_since):
                request.stalled_since = replica.last_completion
    return count, budget, preempted


@kernel
def _admit_waiting(state, number, entries, count, budget):
    """The waiting pass: head of line first, nobody overtakes. Returns the number of entries."""
    replica, engine = state.replicas[number], state.engines[number]
    requests, blocks, buckets = state.requests[number], state.blocks[number], state.buckets[number]
    arena, running, waiting = state.arena[number], state.running[number], state.waiting[number]
    size = engine.block_size
    while budget > 0 and replica.waiting > 0 and replica.running < engine.max_num_seqs:
        slot = waiting[0]
        request = requests[slot]
        verdict, tokens, hits, needed, _ = judge(replica, engine, request, blocks, buckets, arena, budget)
        if verdict != ADMISSIBLE:
            if verdict == NO_MEMORY and replica.running == 0:
                # Every block is free and it still does not fit: it can never run on this engine.
                queue.remove_at(replica, requests, waiting, engine.priority_policy, 0)
                leave_batches(state, number, slot)
                close(state, number, slot, REJECTED_KV_CAPACITY, replica.now)
                continue
            break
        table = request.cells + request.chain_length
        for block in range(hits):
            touch(replica, blocks, np.int64(arena[table + block]))
        request.blocks = hits
        request.registered = hits
        add_blocks(replica, request, blocks, buckets, arena, needed)
        request.computed = hits * size
        if engine.prefix_caching:
            register(request, blocks, buckets, arena, size, min(request.computed + tokens, request.tokens))
        queue.remove_at(replica, requests, waiting, engine.priority_policy, 0)
        running[replica.running] = slot
        replica.running += 1
        request.state = RUNNING
        if request.preemptions == 0:
            request.scheduled = replica.now
            request.work_scheduled[:] = replica.work
            request.cached = request.computed
            replica.query_tokens += request.tokens
            replica.hit_tokens += request.computed
        count = _add_entry(entries, count, slot, tokens)
        budget -= tokens
    return count


@kernel
def schedule(state, number):
    """Schedule one batch at the replica's `now` and put it in flight."""
    replica, engine = state.replicas[number], state.engines[number]
    requests = state.requests[number]
    account(replica, engine, replica.now)
    place = (replica.oldest + replica.in_flight) % 2
    batch, entries = state.batches[number, place], state.entries[number, place]
    batch.count = 0
    count, budget, preempted = _schedule_running(state, number, entries)
    if not preempted:
        count = _admit_waiting(state, number, entries, count, budget)
    if count == 0 and not preempted and replica.in_flight == 0:
        replica.parked = 1
        return
    prefill_tokens, attention, decodes, context = 0, 0.0, 0, 0
    for at in range(count):
        entry = entries[at]
        request = requests[entry.slot]
        tokens, before = entry.tokens, request.computed
        if tokens == 1 and before >= request.prompt:
            decodes += 1
            context += before + 1
        else:
            prefill_tokens += tokens
            attention += float(tokens) * before + 0.5 * float(tokens) * (tokens + 1)
        request.computed = before + tokens
        request.in_flight += tokens
        entry.emits = request.computed == request.tokens + request.placeholders
        if entry.emits and engine.async_scheduling:
            request.placeholders += 1
    batch.work[0] = 1.0 if count > 0 else 0.0
    batch.work[1] = prefill_tokens
    batch.work[2] = decodes
    batch.work[3] = context
    batch.work[4] = attention
    if count > 0:
        replica.steps += 1
        replica.computed_tokens += prefill_tokens + decodes
    start = replica.now
    if replica.in_flight > 0:
        start = max(start, state.batches[number, replica.oldest].end)
    batch.end = start + step_seconds(engine, batch.work)
    batch.count = count
    replica.in_flight += 1
    replica.decoding = decodes == count and count == replica.running


@kernel
def complete(state, number):
    """The oldest batch in flight ends: its tokens are stamped, finished requests freed."""
    replica, engine = state.replicas[number], state.engines[number]
    requests, blocks, buckets = state.requests[number], state.blocks[number], state.buckets[number]
    arena, running = state.arena[number], state.running[number]
    batch, entries = state.batches[number, replica.oldest], state.entries[number, replica.oldest]
    time = batch.end
    account(replica, engine, time)
    add_work(replica.work, batch.work)
    flowing, closed = 0, 0
    for at in range(batch.count):
        slot, tokens = entries[at].slot, entries[at].tokens
        if slot < 0:
            continue
        request = requests[slot]
        request.in_flight -= tokens
        stale = request.stale > 0
        if stale:
            request.stale -= tokens
        if not entries[at].emits:
            continue
        request.tokens += 1
        replica.output_tokens += 1
        if request.tokens == request.prompt + 1:
            request.first_token = time
            request.work_first_token[:] = replica.work
            replica.prompt_tokens += request.prompt
        elif np.isnan(request.stalled_since):
            flowing += 1
        else:
            state.itl_counts[number, itl_bin(time - request.stalled_since)] += 1
            request.stalled_since = np.nan
        if engine.async_scheduling:
            if not stale:
                request.placeholders -= 1
            if request.state == RUNNING and engine.prefix_caching:
                register(request, blocks, buckets, arena, engine.block_size, request.computed - request.placeholders)
        if stale and request.state == PREEMPTED:
            request.stalled_since = time
        if request.tokens >= request.prompt + request.output:
            if request.held:
                request.predicted_finish = time
                replica.holding += 1
                replica.hold_until = time + engine.hold_seconds
                continue
            if request.state == PREEMPTED:
                queue.remove(replica, requests, state.waiting[number], engine.priority_policy, slot)
            else:
                closed += 1
            close(state, number, slot, FINISHED, time)
    if flowing > 0 and time > replica.last_completion:
        state.itl_counts[number, itl_bin(time - replica.last_completion)] += flowing
    if closed > 0:
        kept = 0
        for place in range(replica.running):
            slot = running[place]
            if requests[slot].state != FREE:
                running[kept] = slot
                kept += 1
        replica.running = kept
    batch.count = 0
    replica.last_completion = time
    replica.now = max(replica.now, time)
    replica.oldest = 1 - replica.oldest
    replica.in_flight -= 1
    if closed > 0:
        replica.decoding = 0
