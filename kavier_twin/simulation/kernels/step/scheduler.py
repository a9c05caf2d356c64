"""One engine step: `schedule` decides what runs, `complete` stamps its tokens.

Follows vLLM `v1/core/sched/scheduler.py` (`schedule`, `_preempt_request`, `update_from_output`),
`v1/core/sched/async_scheduler.py` and `v1/core/kv_cache_manager.py` (`allocate_slots`), for full-attention models
without speculative decoding or encoders. KV connectors: `stores.py`, `loads.py`.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel, linked
from kavier_twin.simulation.kernels import TIERS
from kavier_twin.simulation.kernels.cache.eviction.stranded import stranded_blocks
from kavier_twin.simulation.kernels.step import queue
from kavier_twin.simulation.kernels.step.flow import dissolve_flow, join, list_explicit, next_end, retire
from kavier_twin.simulation.kernels.step.requests import (
    account,
    add_blocks,
    close,
    count_hits,
    free_blocks,
    leave_batches,
    leave_running,
    lookup,
    publish,
    register,
    take_hits,
)
from kavier_twin.simulation.kernels.tiers.loads import (
    BEGUN,
    DEFERRED,
    NOTHING,
    begin_load,
    enter_loaded,
    leave_loading,
    look,
    observe,
)
from kavier_twin.simulation.kernels.tiers.stores import hand_over, owes_store, rest
from kavier_twin.simulation.kernels.tiers.transfers import submit_loads
from kavier_twin.simulation.state import (
    FINISHED,
    FREE,
    ITL_BIN_RATIO,
    ITL_BINS,
    ITL_SMALLEST_SECONDS,
    LRU,
    PREEMPTED,
    REJECTED_KV_CAPACITY,
    RUNNING,
    FleetState,
)

ADMISSIBLE = 0
NO_MEMORY = 1
NO_BUDGET = 2  # chunked prefill is off and the prompt does not fit what is left of the step's budget

_ROUNDING = 1.0 - 1e-9  # many steps at once are summed in another order than one by one
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
        + engine.linear_scale * work[5]
    )


@kernel
def linear_seconds(engine, tokens):
    """Seconds of the linear layers in a step of so many tokens: `settings.StepTime.linear_layers`."""
    at, last = engine.knot_tokens, engine.knots - 1
    if last < 0:
        return 0.0
    if tokens <= at[0] or last == 0:
        return engine.knot_seconds[0]
    right = 1
    while right < last and at[right] < tokens:
        right += 1
    left = right - 1
    slope = (engine.knot_seconds[right] - engine.knot_seconds[left]) / (at[right] - at[left])
    return engine.knot_seconds[left] + slope * (tokens - at[left])


@kernel
def shortest_step(engine):
    """No step that does anything is shorter: a single token."""
    token = min(engine.per_prefill_token, engine.per_decode_sequence)
    return (engine.fixed + token + engine.linear_scale * linear_seconds(engine, 1.0)) * _ROUNDING


@kernel
def shortest_decode_step(engine):
    """No step that decodes is shorter: one sequence of one token."""
    return (engine.fixed + engine.per_decode_sequence + engine.per_context_token) * _ROUNDING


@kernel
def add_work(total, work):
    """total += work"""
    for part in range(total.size):
        total[part] += work[part]


@kernel
def copy_work(target, work):
    """target = work (a loop: slice assignment would allocate)"""
    for part in range(target.size):
        target[part] = work[part]


@kernel
def _threshold(replica, engine):
    # vLLM: a long prefill that is alone has nobody to starve.
    if replica.running + replica.waiting + replica.loading > 1:
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
        publish(request, blocks, state.buckets[number], state.holders, state.arena[number])
    free_blocks(state, number, request)
    tier = state.tiers[number]
    if tier.chunks > 0 and request.stores > 0:
        tier.awaited_store = max(tier.awaited_store, request.last_store)
    request.prefilling = 0
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
def _schedule_running(state, number, entries, members, exact, budget):
    """The running pass over `members`: all running requests if `exact`, else those outside the flow.

    Returns (entries, budget left, whether somebody was preempted). Nobody is unless `exact`: see `_may_flow`.
    """
    replica, engine = state.replicas[number], state.engines[number]
    requests, running = state.requests[number], state.running[number]
    size, caching = engine.block_size, engine.prefix_caching
    threshold = _threshold(replica, engine)
    connected = engine.async_scheduling and state.tiers[number].chunks > 0
    count, preempted, gone, lost, place = 0, False, False, False, 0
    while place < (replica.running if exact else replica.explicit) and budget > 0:
        slot = members[place]
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
        while needed > replica.free_blocks:
            at = _victim(replica, engine, requests, running)
            victim = running[at]
            if connected and requests[victim].in_flight > 0:
                # With a connector vLLM does not free blocks that a batch in flight may write: it gets none now.
                gone = True
                break
            alone = replica.running == 1 and replica.loading == 0
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
                lost = True
                break
        if lost and not engine.self_preemption_ends_pass:
            lost = False
            continue
        gone = gone or lost
        if gone:
            break
        if needed > 0:
            add_blocks(state, number, request, needed)
        if caching:
            register(state, number, request, min(request.computed + tokens, request.tokens) // size)
        count = _add_entry(entries, count, slot, tokens)
        budget -= tokens
        place += 1
    if budget == 0 or gone:
        for late in range(place, replica.running if exact else replica.explicit):
            request = requests[members[late]]
            if request.tokens > request.prompt and np.isnan(request.stalled_since):
                request.stalled_since = replica.last_completion
    return count, budget, preempted


@kernel
def _adapter_counts(engine, requests, entries, count, slot):
    """Whether the adapter of a running request counts against `max_loras`."""
    if requests[slot].adapter == 0:
        return False
    if engine.lora_counts_all_running or requests[slot].flowing:
        return True
    for at in range(count):
        if entries[at].slot == slot:
            return True
    return False


@kernel
def _too_many_adapters(state, number, entries, count, adapter):
    """Whether `max_loras` other adapters than this one are in use already."""
    replica, engine, requests = state.replicas[number], state.engines[number], state.requests[number]
    last = np.int64(0)
    for _ in range(engine.max_loras):
        following = np.int64(0)  # the next adapter in the order of their identities
        for place in range(replica.running):
            slot = state.running[number][place]
            if not _adapter_counts(engine, requests, entries, count, slot):
                continue
            other = requests[slot].adapter
            if other == adapter:
                return False
            if other > last and (following == 0 or other < following):
                following = other
        if following == 0:
            return False
        last = following
    return True


@kernel
def _admit_waiting(state, number, entries, count, budget):
    """The waiting pass: head of line first, nobody overtakes. Returns the number of entries."""
    replica, engine = state.replicas[number], state.engines[number]
    requests, blocks, buckets = state.requests[number], state.blocks[number], state.buckets[number]
    arena, waiting = state.arena[number], state.waiting[number]
    size, tier = engine.block_size, state.tiers[number]
    queued, deferred = replica.waiting, 0
    while budget > 0 and replica.waiting > 0 and replica.running < engine.max_num_seqs:
        slot = waiting[0]
        request = requests[slot]
        if engine.max_loras > 0 and request.adapter != 0:
            if _too_many_adapters(state, number, entries, count, request.adapter):
                queue.remove_at(replica, requests, waiting, engine.priority_policy, 0)
                deferred += 1
                waiting[queued - deferred] = slot
                continue
        fetch = begin_load(state, number, slot) if tier.chunks > 0 else NOTHING
        if fetch == DEFERRED or fetch == BEGUN:
            queue.remove_at(replica, requests, waiting, engine.priority_policy, 0)
            if fetch == DEFERRED:
                deferred += 1
                waiting[queued - deferred] = slot  # behind the heap, which is shorter by all that were taken out
            continue
        verdict, tokens, hits, needed = NO_MEMORY, 0, 0, 0
        if fetch == NOTHING:
            verdict, tokens, hits, needed, _ = judge(replica, engine, request, blocks, buckets, arena, budget)
        if verdict != ADMISSIBLE:
            if verdict == NO_MEMORY and replica.running + replica.loading == 0:
                # Every block is free and it still does not fit: it can never run on this engine.
                queue.remove_at(replica, requests, waiting, engine.priority_policy, 0)
                leave_batches(state, number, slot)
                close(state, number, slot, REJECTED_KV_CAPACITY, replica.now)
                continue
            break
        if engine.eviction != LRU and engine.prefix_caching and request.preemptions == 0:
            replica.stranded_tokens += size * stranded_blocks(state, number, request, hits)
        take_hits(state, number, request, hits)
        add_blocks(state, number, request, needed)
        request.computed = hits * size
        if engine.prefix_caching:
            register(state, number, request, min(request.computed + tokens, request.tokens) // size)
        queue.remove_at(replica, requests, waiting, engine.priority_policy, 0)
        if request.preemptions == 0 and not request.counted:
            count_hits(replica, request, request.computed)
            if tier.chunks > 0:
                replica.external_query_tokens += request.tokens - request.computed
        count = _run(state, number, entries, count, slot, tokens)
        budget -= tokens
    for place in range(queued - deferred, queued):
        queue.enqueue(replica, requests, waiting, engine.priority_policy, waiting[place])
    return count


@kernel
def _run(state, number, entries, count, slot, tokens):
    """Let an admitted request run, this many tokens in the batch at hand. Returns the number of entries."""
    replica, request = state.replicas[number], state.requests[number][slot]
    state.running[number][replica.running] = slot
    replica.running += 1
    state.explicit[number][replica.explicit] = slot
    replica.explicit += 1
    request.run_order = replica.next_run_order
    replica.next_run_order += 1
    request.state = RUNNING
    if request.preemptions == 0:
        request.scheduled = replica.now
        copy_work(request.work_scheduled, replica.work)
    if request.computed + tokens < request.tokens:
        request.prefilling = 1
    return _add_entry(entries, count, slot, tokens)


@linked(TIERS)
def _admit_loaded(state: FleetState, number: int, batch: int, count: int, budget: int) -> tuple[int, int, bool]:
    """The requests that a tier has filled blocks for come before those that wait without any.

    Returns (entries, budget left, whether the others may be looked at).
    """
    replica, engine, requests = state.replicas[number], state.engines[number], state.requests[number]
    entries = state.entries[number, batch]
    loading, size, place, arrived = state.tier_slots[number, 0], engine.block_size, 0, True
    while place < replica.loading:
        if budget == 0 or replica.running >= engine.max_num_seqs:
            return count, budget, False
        slot = loading[place]
        request = requests[slot]
        if not request.arrived:
            arrived = False
            place += 1
            continue
        enter_loaded(state, number, slot)
        tokens = request.tokens - request.computed
        threshold = _threshold(replica, engine)
        if 0 < threshold < tokens:
            tokens = threshold
        if not engine.chunked_prefill and tokens > budget:
            return count, budget, False
        tokens = min(tokens, budget)
        needed = max((request.computed + tokens + size - 1) // size - request.blocks, 0)
        room = needed
        if engine.reserve_full_isl:
            whole = (min(request.tokens, engine.max_model_len) + size - 1) // size
            room = max(room, whole - request.blocks)
        if room + (engine.watermark_blocks if replica.running > 0 else 0) > replica.free_blocks:
            for behind in range(place + 1, replica.loading):
                arrived = arrived and requests[loading[behind]].arrived
            if replica.running == 0 and arrived:
                # Nobody runs, nobody loads: there will never be room.
                leave_loading(state, number, slot)
                close(state, number, slot, REJECTED_KV_CAPACITY, replica.now)
                continue
            return count, budget, False
        add_blocks(state, number, request, needed)
        if engine.prefix_caching:
            register(state, number, request, min(request.computed + tokens, request.tokens) // size)
        leave_loading(state, number, slot)
        count = _run(state, number, entries, count, slot, tokens)
        budget -= tokens
    return count, budget, True


@kernel
def _may_flow(state, number):
    """Whether the flow may run this batch as one: nobody's turn and nobody's memory depends on the order.

    True if the flow's requests all come before the others, the budget reaches the flow, and there is memory for all.
    """
    replica, engine, requests = state.replicas[number], state.engines[number], state.requests[number]
    explicit, size = state.explicit[number], engine.block_size
    budget = engine.max_num_batched_tokens - replica.flowing
    if budget < 0:
        return False
    if replica.explicit > 0 and replica.flowing > 0 and requests[explicit[0]].run_order < replica.flow_newest:
        return False
    needed = np.int64(state.phases[number][(replica.scheduled_batches + 1) % size].count)
    for place in range(replica.explicit):
        request = requests[explicit[place]]
        tokens = min(budget, request.tokens + request.placeholders - request.computed)
        needed += max(0, (request.computed + tokens + size - 1) // size - request.blocks)
    return needed <= replica.free_blocks


@kernel
def fills_in_order(engine):
    """Whether it matters in which order the flow's requests take and fill blocks within a batch.

    With LRU a block that fills is nothing to those that are evicted; to other policies it is. Under asynchronous
    scheduling a block enters the cache when its request takes the next one, in running order anyway.
    """
    return engine.eviction != LRU and engine.prefix_caching and not engine.async_scheduling


@kernel
def schedule_flow_in_order(state, number, batch):
    """Blocks of the flow for this batch, request by request in running order: those due, and those that it fills."""
    requests, phases, size = state.requests[number], state.phases[number], state.engines[number].block_size
    due = phases[batch % size].first
    full = phases[(batch + 1) % size].first if size > 1 else -1
    while due >= 0 or full >= 0:
        if full < 0 or (due >= 0 and requests[due].run_order < requests[full].run_order):
            add_blocks(state, number, requests[due], 1)
            if size == 1:
                register(state, number, requests[due], requests[due].blocks)
            due = requests[due].flow_next
        else:
            register(state, number, requests[full], requests[full].blocks)
            full = requests[full].flow_next


@kernel
def _schedule_flow(state, number):
    """Blocks of the flow for the batch about to be scheduled: those due, and those that it fills."""
    replica, engine = state.replicas[number], state.engines[number]
    requests, phases, size = state.requests[number], state.phases[number], engine.block_size
    batch = replica.scheduled_batches + 1
    if fills_in_order(engine):
        schedule_flow_in_order(state, number, batch)
        return
    slot = phases[batch % size].first
    while slot >= 0:
        request = requests[slot]
        add_blocks(state, number, request, 1)
        if engine.prefix_caching and engine.async_scheduling:
            register(state, number, request, request.blocks - 1)
        slot = request.flow_next
    if engine.prefix_caching and not engine.async_scheduling:
        slot = phases[(batch + 1) % size].first
        while slot >= 0:
            request = requests[slot]
            register(state, number, request, request.blocks)
            slot = request.flow_next


@kernel
def _retire_finishing(state, number, entries, count):
    """The flow's requests that get their last token in this batch are listed in it, before the newer ones."""
    replica = state.replicas[number]
    finishing = 0
    while replica.flowing > 0 and next_end(state, number) == replica.scheduled_batches:
        slot = retire(state, number)
        for at in range(count + finishing, finishing, -1):
            entries[at].slot = entries[at - 1].slot
            entries[at].tokens = entries[at - 1].tokens
            entries[at].emits = entries[at - 1].emits
        entries[finishing].slot = slot
        entries[finishing].tokens = 1
        entries[finishing].emits = 1
        finishing += 1
    return finishing


@kernel
def _join_flow(state, number, entries, count):
    """Requests that this batch brings a token, and that are to get more, decode with the flow from now on."""
    requests = state.requests[number]
    joined = False
    for at in range(count):
        request = requests[entries[at].slot]
        if owes_store(state.tiers[number], request, state.engines[number].block_size):
            continue
        if entries[at].emits and request.prompt + request.output - request.computed > 1:
            join(state, number, entries[at].slot)
            joined = True
    if joined:
        list_explicit(state, number)


@kernel
def _something_in_flight(state, number):
    """Whether a batch with a request in it is in flight (under asynchronous scheduling empty ones may be)."""
    replica = state.replicas[number]
    for age in range(replica.in_flight):
        batch = state.batches[number, (replica.oldest + age) % 2]
        if batch.count > 0 or batch.flowing > 0:
            return True
    return False


@kernel
def schedule(state, number):
    """Schedule one batch at the replica's `now` and put it in flight."""
    replica, engine = state.replicas[number], state.engines[number]
    requests = state.requests[number]
    tier = state.tiers[number]
    if tier.chunks > 0:
        look(state, number)
    account(replica, engine, replica.now)
    place = (replica.oldest + replica.in_flight) % 2
    batch, entries = state.batches[number, place], state.entries[number, place]
    batch.count = 0
    batch.flowing = 0
    budget = engine.max_num_batched_tokens
    exact = engine.stepping or not _may_flow(state, number)
    if exact:
        dissolve_flow(state, number)
        count, budget, preempted = _schedule_running(state, number, entries, state.running[number], True, budget)
        list_explicit(state, number)
    else:
        _schedule_flow(state, number)
        budget -= replica.flowing
        count, budget, preempted = _schedule_running(state, number, entries, state.explicit[number], False, budget)
    if not preempted:
        others = True
        if replica.loading > 0:
            count, budget, others = _admit_loaded(state, number, place, count, budget)
        if others:
            count = _admit_waiting(state, number, entries, count, budget)
    flowing = replica.flowing
    news = tier.chunks > 0 and (tier.begun or tier.decided_first != 0 or tier.ended > 0)  # an empty batch carries it
    if count == 0 and flowing == 0 and not preempted and not news and not _something_in_flight(state, number):
        # Live requests, but none can go on: held ones that wait for their ends. Something from outside wakes us.
        replica.parked = 1
        if tier.chunks > 0:
            rest(state, number)
        return
    prefill_tokens, attention, decodes, context = 0, 0.0, flowing, replica.flow_context
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
        # A held request that has all its tokens gets no more when it computes again what a preemption took.
        done = request.held and request.tokens >= request.prompt + request.output
        entry.emits = request.computed == request.tokens + request.placeholders and not done
        if entry.emits:
            request.prefilling = 0
        if entry.emits and engine.async_scheduling:
            request.placeholders += 1
    start = replica.now
    if replica.in_flight > 0:
        start = max(start, state.batches[number, replica.oldest].end)
    batch.polled = replica.now
    if tier.chunks > 0:
        free_from = hand_over(state, number, place, count, start)
        if free_from > start:
            start = free_from
            batch.polled = free_from
    replica.scheduled_batches += 1
    replica.most_running = max(replica.most_running, replica.running)
    replica.most_batch_tokens = max(replica.most_batch_tokens, prefill_tokens + decodes)
    replica.flow_context += flowing
    finishing = _retire_finishing(state, number, entries, count)
    batch.count = count + finishing
    batch.flowing = flowing - finishing
    batch.work[0] = 1.0 if count + flowing > 0 else 0.0
    batch.work[1] = prefill_tokens
    batch.work[2] = decodes
    batch.work[3] = context
    batch.work[4] = attention
    batch.work[5] = linear_seconds(engine, float(prefill_tokens + decodes)) if count + flowing > 0 else 0.0
    if count + flowing > 0:
        replica.steps += 1
        replica.computed_tokens += prefill_tokens + decodes
    batch.end = start + step_seconds(engine, batch.work)
    if tier.chunks > 0:
        submit_loads(state, number, batch.end)
    replica.in_flight += 1
    # Short of memory the flow would be dissolved again at once.
    if not engine.stepping and not preempted and replica.free_blocks >= replica.running:
        _join_flow(state, number, entries[finishing:], count)


@kernel
def complete(state, number):
    """The oldest batch in flight ends: its tokens are stamped, finished requests freed."""
    replica, engine = state.replicas[number], state.engines[number]
    requests = state.requests[number]
    batch, entries = state.batches[number, replica.oldest], state.entries[number, replica.oldest]
    time = batch.end
    account(replica, engine, time)
    add_work(replica.work, batch.work)
    replica.output_tokens += batch.flowing
    flowing = batch.flowing
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
            copy_work(request.work_first_token, replica.work)
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
                # `refresh` may have written `computed` of one that joined the flow since, ahead of `placeholders`.
                computed = request.flow_computed if request.flowing else request.computed
                register(state, number, request, (computed - request.placeholders) // engine.block_size)
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
                leave_running(state, number, slot)
            close(state, number, slot, FINISHED, time)
    if flowing > 0 and time > replica.last_completion:
        state.itl_counts[number, itl_bin(time - replica.last_completion)] += flowing
    batch.count = 0
    batch.flowing = 0
    replica.completed_batches += 1
    replica.last_completion = time
    replica.now = max(replica.now, time)
    replica.oldest = 1 - replica.oldest
    replica.in_flight -= 1
    if state.tiers[number].chunks > 0:
        observe(state, number, batch.polled, time)
        if replica.in_flight + replica.running + replica.waiting + replica.loading == 0:
            rest(state, number)
