"""Many identical engine steps in one closed-form update.

While every running request decodes with the flow and the head of the queue cannot be admitted, nothing but counters
moves. The step time is affine in the sum of contexts, so step j lasts `first + j * slope` and k steps last
k * first + slope * k (k - 1) / 2. A request needs a block every `block_size` steps: those steps are visited one block
at a time, in step order, because the order decides what is evicted and when memory runs out.

The jump stops before the step that completes a request, before the step that runs out of blocks, before the step that
could let the head of the queue in, at the time given, and where a transfer between memory tiers is complete. The rest
is an ordinary step.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.step.flow import computed_now, next_end
from kavier_twin.simulation.kernels.step.requests import account, add_blocks, block_key, register
from kavier_twin.simulation.kernels.step.scheduler import (
    ADMISSIBLE,
    NO_MEMORY,
    add_work,
    fills_in_order,
    itl_bin,
    judge,
    linear_seconds,
    schedule_flow_in_order,
)
from kavier_twin.simulation.kernels.tiers.loads import may_go_on
from kavier_twin.simulation.kernels.tiers.transfers import next_done
from kavier_twin.simulation.state import ITL_BIN_RATIO, ITL_SMALLEST_SECONDS, TTL

_FAR = 1 << 40


@kernel
def span(first, slope, steps):
    """Seconds that `steps` steps last when the first lasts `first` and each next one `slope` longer."""
    return first * steps + slope * (0.5 * steps * (steps - 1.0))


@kernel
def steps_within(first, slope, seconds):
    """How many whole steps fit into `seconds`."""
    if seconds < first:
        return 0
    if seconds == np.inf or first <= 0.0:
        return _FAR
    if slope <= 0.0:
        steps = seconds / first
    else:
        half = first - 0.5 * slope
        steps = (np.sqrt(half * half + 2.0 * slope * seconds) - half) / slope
    count = int(min(steps, float(_FAR)))
    while span(first, slope, float(count)) > seconds:
        count -= 1
    while count < _FAR and span(first, slope, float(count + 1)) <= seconds:
        count += 1
    return count


@kernel
def end_of(origin, first, slope, steps):
    """When `steps` steps end of which the first begins at `origin`.

    Steps of equal length are added one by one, as the reference does: an arrival may come at exactly the end of one,
    and then rounding would decide who is admitted.
    """
    if slope != 0.0:
        return origin + span(first, slope, float(steps))
    for _ in range(steps):
        origin += first
    return origin


@kernel
def _steps_until(origin, first, slope, until, most):
    """How many steps, at most `most`, end by `until`."""
    steps = min(most, steps_within(first, slope, until - origin))
    if slope == 0.0 and until < np.inf:
        while steps > 0 and end_of(origin, first, slope, steps) > until:
            steps -= 1
        while steps < most and end_of(origin, first, slope, steps + 1) <= until:
            steps += 1
    return steps


@kernel
def _add_latencies(counts, first, slope, steps, sequences):
    """Histogram of the gaps of `steps` steps, `sequences` tokens each, bin by bin instead of step by step."""
    done = 0
    while done < steps:
        at = itl_bin(first + done * slope)
        reach = steps
        if slope > 0.0:
            edge = ITL_SMALLEST_SECONDS * ITL_BIN_RATIO ** (at + 1)
            reach = min(steps, max(done + 1, int(np.ceil((edge - first) / slope))))
        counts[at] += (reach - done) * sequences
        done = reach


@kernel
def _add_work(replica, steps, sequences, context, linear):
    """Work of `steps` decode steps, the first of which reads `context` tokens."""
    replica.work[0] += steps
    replica.work[2] += float(steps) * sequences
    replica.work[3] += float(steps) * context + sequences * (0.5 * steps * (steps - 1.0))
    replica.work[5] += steps * linear


@kernel
def _first_batch_that_registers(state, number, key, steps):
    """The first of the coming `steps` batches that enters a block with this key into the cache, else `steps`."""
    replica, requests, flow = state.replicas[number], state.requests[number], state.flow[number]
    arena, engine = state.arena[number], state.engines[number]
    size = engine.block_size
    for place in range(replica.flowing):
        request = requests[flow[place]]
        step = request.blocks * size - computed_now(replica, request) - (0 if engine.async_scheduling else 1)
        block = request.blocks - 1
        if step < 0:
            step += size
            block += 1
        while step < steps:
            if block_key(request, arena, block, size) == key:
                steps = step
            step += size
            block += 1
    return steps


@kernel
def _limit_by_queue(state, number, steps):
    """Cut `steps` to those during which the head of the queue certainly stays out."""
    replica, engine = state.replicas[number], state.engines[number]
    budget = engine.max_num_batched_tokens - replica.running
    if replica.waiting == 0 or replica.running >= engine.max_num_seqs or budget == 0:
        return steps
    if engine.max_loras > 0:  # the head may be passed over, and somebody behind it be let in
        return 0
    head = state.requests[number][state.waiting[number][0]]
    verdict, _, _, _, missing = judge(
        replica, engine, head, state.blocks[number], state.buckets[number], state.arena[number], budget
    )
    if verdict == ADMISSIBLE:
        return 0
    if missing != np.uint64(0):
        steps = _first_batch_that_registers(state, number, missing, steps)
    if verdict == NO_MEMORY and not engine.reserve_full_isl:
        # Without the full-prompt gate an eviction that shortens the hit can make the first chunk fit. So can time.
        if engine.eviction == TTL:
            return 0
        phases = state.phases[number]
        for step in range(min(steps, engine.block_size)):
            if phases[(replica.scheduled_batches + 1 + step) % engine.block_size].count > 0:
                return step
    return steps


@kernel
def jump(state, number, until):
    """Advance by as many whole steps as possible. Returns whether it moved.

    Called at a scheduling point: no batch in flight, or one under asynchronous scheduling.
    """
    replica, engine = state.replicas[number], state.engines[number]
    flowing = replica.flowing
    if flowing == 0 or flowing != replica.running or flowing > engine.max_num_batched_tokens:
        return False
    ahead = 1 if engine.async_scheduling else 0
    batch = state.batches[number, replica.oldest]
    # `origin` is when the step after the first completion starts: step j completes at origin + span(j + 1 - ahead).
    origin = batch.end if ahead else replica.now
    if ahead and (batch.count > 0 or batch.flowing != flowing or origin > until):
        return False
    tier = state.tiers[number]
    guarded = False
    if tier.chunks > 0:
        # A batch that has to tell the tiers something, or where somebody may be admitted from them, is a step.
        open_seats = replica.running < engine.max_num_seqs and flowing < engine.max_num_batched_tokens
        if (
            tier.decided_first != 0
            or tier.ended > 0
            or (open_seats and (replica.waiting > 0 or may_go_on(state, number)))
        ):
            return False
        until = min(until, next_done(state, number))
        if origin > until:
            return False
        # A block that a store still reads may have to be waited for.
        guarded = tier.oldest_store < tier.next_store
    linear = linear_seconds(engine, float(flowing))
    first = (
        engine.fixed
        + engine.per_decode_sequence * flowing
        + engine.per_context_token * replica.flow_context
        + engine.linear_scale * linear
    )
    slope = engine.per_context_token * flowing
    steps = next_end(state, number) - 1 - replica.scheduled_batches
    if steps <= 0:
        return False
    steps = _steps_until(origin, first, slope, until, steps - ahead) + ahead
    steps = _limit_by_queue(state, number, steps)
    if steps <= 0:
        return False

    account(replica, engine, replica.now)
    requests, phases = state.requests[number], state.phases[number]
    size, caching, in_order = engine.block_size, engine.prefix_caching, fills_in_order(engine)
    # Not from `now`: a parked replica whose request got more to generate goes on from when it stopped.
    batches, began = replica.scheduled_batches, replica.accounted
    at, unused_block_seconds = (batches + 1) % size - 1, 0.0
    for step in range(steps):
        at = at + 1 if at + 1 < size else 0
        phase = phases[at]
        if phase.count == 0:
            if in_order:
                schedule_flow_in_order(state, number, batches + 1 + step)
            continue
        if phase.count > replica.free_blocks or guarded:
            steps = step
            break
        if step > 0:
            unused_block_seconds += phase.count * max(0.0, origin + span(first, slope, float(step - ahead)) - began)
        if in_order:
            schedule_flow_in_order(state, number, batches + 1 + step)
            continue
        slot = phase.first
        while slot >= 0:
            request = requests[slot]
            add_blocks(state, number, request, 1)
            if caching:
                register(state, number, request, request.blocks - 1)
            slot = request.flow_next
    if steps == 0:
        return False
    if caching and not ahead and not in_order:
        slot = phases[(batches + 1 + steps) % size].first
        while slot >= 0:
            request = requests[slot]
            register(state, number, request, request.blocks)
            slot = request.flow_next

    context = replica.flow_context
    replica.scheduled_batches += steps
    replica.completed_batches += steps
    replica.flow_context += steps * flowing
    end = end_of(origin, first, slope, steps - ahead)
    account(replica, engine, end)
    replica.used_block_seconds -= unused_block_seconds  # until they were allocated
    if ahead:
        add_work(replica.work, batch.work)
        batch.work[2] = flowing
        batch.work[3] = context + float(steps - 1) * flowing
        batch.work[5] = linear
        state.itl_counts[number, itl_bin(batch.end - replica.last_completion)] += flowing
        batch.end = end_of(origin, first, slope, steps)
    _add_work(replica, steps - ahead, flowing, context, linear)
    _add_latencies(state.itl_counts[number], first, slope, steps - ahead, flowing)
    replica.steps += steps
    replica.computed_tokens += steps * flowing
    replica.output_tokens += steps * flowing
    replica.last_completion = end
    replica.now = end
    return True
