"""Many identical engine steps in one closed-form update.

While every running request decodes one token a step and the head of the queue cannot be admitted, nothing but
counters moves. The step time is affine in the sum of contexts, so step j lasts `first + j * slope` and k steps last
k * first + slope * k (k - 1) / 2. A request needs a block every `block_size` steps: those steps are visited one block
at a time, in step order, because the order decides what is evicted and when memory runs out.

The jump stops before the step that completes a request, before the step that runs out of blocks, before the step that
could let the head of the queue in, and at the time given. The rest is an ordinary step.
"""

import numpy as np

from kavier_twin.simulation.kernels.blocks import allocate
from kavier_twin.simulation.kernels.compile import kernel
from kavier_twin.simulation.kernels.requests import account, block_key, register
from kavier_twin.simulation.kernels.scheduler import ADMISSIBLE, NO_MEMORY, add_work, itl_bin, judge
from kavier_twin.simulation.state import ITL_BIN_RATIO, ITL_SMALLEST_SECONDS

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
    while span(first, slope, count) > seconds:
        count -= 1
    while count < _FAR and span(first, slope, count + 1) <= seconds:
        count += 1
    return count


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
def _add_work(replica, steps, sequences, context):
    """Work of `steps` decode steps, the first of which reads `context` tokens."""
    replica.work[0] += steps
    replica.work[2] += float(steps) * sequences
    replica.work[3] += float(steps) * context + sequences * (0.5 * steps * (steps - 1.0))


@kernel
def _sort_by_phase(requests, running, count, size, order, phases, ends):
    """Counting sort of the running requests by the step at which they need their next block.

    `order` gets slots by (step, running order), `phases` the step of each; `ends` is working space.
    """
    ends[:size] = 0
    for place in range(count):
        request = requests[running[place]]
        ends[request.blocks * size - request.computed] += 1
    total = 0
    for phase in range(size):
        amount = ends[phase]
        ends[phase] = total
        total += amount
    for place in range(count):
        slot = running[place]
        request = requests[slot]
        phase = request.blocks * size - request.computed
        order[ends[phase]] = slot
        phases[ends[phase]] = phase
        ends[phase] += 1


@kernel
def _first_step_that_registers(requests, arena, running, count, size, deferred, key, limit):
    """The first of the coming `limit` steps that enters a block with this key into the cache, else `limit`."""
    for place in range(count):
        request = requests[running[place]]
        step = request.blocks * size - request.computed - (0 if deferred else 1)
        number = request.blocks - 1
        if step < 0:
            step += size
            number += 1
        while step < limit:
            if block_key(request, arena, number, size) == key:
                limit = step
            step += size
            number += 1
    return limit


@kernel
def _limit(state, number, ahead):
    """How many steps may be jumped before a request completes, 0 if not all are decoding. Returns (steps, contexts)."""
    replica, requests, running = state.replicas[number], state.requests[number], state.running[number]
    steps, context = _FAR, 0
    if replica.running > state.engines[number].max_num_batched_tokens:
        return 0, 0
    for place in range(replica.running):
        request = requests[running[place]]
        if request.tokens <= request.prompt or request.computed != request.tokens - 1 + ahead:
            return 0, 0
        if request.placeholders != ahead or not np.isnan(request.stalled_since):
            return 0, 0
        context += request.computed + 1
        steps = min(steps, request.prompt + request.output - request.tokens - 1)
    return steps, context


@kernel
def _limit_by_queue(state, number, steps):
    """Cut `steps` to those during which the head of the queue certainly stays out."""
    replica, engine = state.replicas[number], state.engines[number]
    requests, running, arena = state.requests[number], state.running[number], state.arena[number]
    budget = engine.max_num_batched_tokens - replica.running
    if replica.waiting == 0 or replica.running >= engine.max_num_seqs or budget == 0:
        return steps
    head = requests[state.waiting[number][0]]
    verdict, _, _, _, missing = judge(replica, engine, head, state.blocks[number], state.buckets[number], arena, budget)
    if verdict == ADMISSIBLE:
        return 0
    if missing != np.uint64(0):
        steps = _first_step_that_registers(
            requests, arena, running, replica.running, engine.block_size, engine.async_scheduling, missing, steps
        )
    if verdict == NO_MEMORY and not engine.reserve_full_isl:
        # Without the full-prompt gate an eviction that shortens the hit can make the first chunk fit.
        for place in range(replica.running):
            request = requests[running[place]]
            steps = min(steps, request.blocks * engine.block_size - request.computed)
    return steps


@kernel
def jump(state, number, until):
    """Advance by as many whole steps as possible. Returns whether it moved.

    Called at a scheduling point: no batch in flight, or one under asynchronous scheduling.
    """
    replica, engine = state.replicas[number], state.engines[number]
    requests, blocks, buckets = state.requests[number], state.blocks[number], state.buckets[number]
    arena, running, scratch = state.arena[number], state.running[number], state.scratch[number]
    ahead = 1 if engine.async_scheduling else 0
    batch = state.batches[number, replica.oldest]
    flowing = replica.running
    if flowing == 0 or replica.holding > 0 or (ahead and not (replica.decoding and batch.count == flowing)):
        return False
    steps, context = _limit(state, number, ahead)
    if steps <= 0:
        return False
    first = engine.fixed + engine.per_decode_sequence * flowing + engine.per_context_token * context
    slope = engine.per_context_token * flowing
    # `origin` is when the step after the first completion starts: step j completes at origin + span(j + 1 - ahead).
    origin = batch.end if ahead else replica.now
    if ahead and origin > until:
        return False
    steps = min(steps, steps_within(first, slope, until - origin) + ahead)
    steps = _limit_by_queue(state, number, steps)
    if steps <= 0:
        return False

    account(replica, engine, replica.now)
    size, caching = engine.block_size, engine.prefix_caching
    slots = requests.size
    order, phases, ends = scratch[:slots], scratch[slots : 2 * slots], scratch[2 * slots :]
    _sort_by_phase(requests, running, replica.running, size, order, phases, ends)
    base = 0
    while base < steps:
        for at in range(flowing):
            step = base + phases[at]
            if step >= steps:
                break
            if at == 0 or phases[at] != phases[at - 1]:
                together = 1
                while at + together < flowing and phases[at + together] == phases[at]:
                    together += 1
                if replica.free_blocks < together:
                    steps = step
                    break
                if step > 0:
                    account(replica, engine, origin + span(first, slope, float(step - ahead)))
            request = requests[order[at]]
            held = request.blocks
            arena[request.cells + request.chain_length + held] = np.uint64(allocate(replica, blocks, buckets))
            request.blocks = held + 1
            if caching:
                register(request, blocks, buckets, arena, size, held * size)
        base += size
    if steps == 0:
        return False

    for place in range(replica.running):
        request = requests[running[place]]
        request.tokens += steps
        request.computed += steps
        if caching and not ahead and request.computed == request.blocks * size:
            register(request, blocks, buckets, arena, size, request.computed)
    end = origin + span(first, slope, float(steps - ahead))
    account(replica, engine, end)
    if ahead:
        add_work(replica.work, batch.work)
        batch.work[2] = flowing
        batch.work[3] = context + float(steps - 1) * flowing
        state.itl_counts[number, itl_bin(batch.end - replica.last_completion)] += flowing
        batch.end = origin + span(first, slope, float(steps))
    _add_work(replica, steps - ahead, flowing, context)
    _add_latencies(state.itl_counts[number], first, slope, steps - ahead, flowing)
    replica.steps += steps
    replica.computed_tokens += steps * flowing
    replica.output_tokens += steps * flowing
    replica.last_completion = end
    replica.now = end
    return True
