"""The flow: running requests that decode one token in every batch, kept as one instead of one by one.

A request joins after the batch that brings its last token outside the flow was scheduled, and leaves when the batch
with its last token is. In between nothing of it moves but counters that follow from two numbers, so a batch costs the
flow nothing per request: `scheduled_batches` and `completed_batches` count, `flow_context` grows by the number of
requests, and only the requests whose next block is due (`phases`) or whose last batch has come (a heap) are touched.

Whenever order within a batch could matter (memory runs short, the budget does not reach round, somebody outside
asks), the flow is dissolved: its requests become ordinary ones, and the ordinary step decides.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel


@kernel
def _ends_before(requests, a, b):
    if requests[a].flow_end != requests[b].flow_end:
        return requests[a].flow_end < requests[b].flow_end
    return requests[a].run_order < requests[b].run_order


@kernel
def _rise(requests, flow, place):
    slot = flow[place]
    while place > 0:
        parent = (place - 1) // 2
        if not _ends_before(requests, slot, flow[parent]):
            break
        flow[place] = flow[parent]
        place = parent
    flow[place] = slot


@kernel
def _sink(requests, flow, count, place):
    slot = flow[place]
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        if child + 1 < count and _ends_before(requests, flow[child + 1], flow[child]):
            child += 1
        if not _ends_before(requests, flow[child], slot):
            break
        flow[place] = flow[child]
        place = child
    flow[place] = slot


@kernel
def phase_of(request, block_size):
    """Batches modulo `block_size` in which the request needs its next block."""
    return (request.flow_start + 1 - request.flow_computed) % block_size


@kernel
def computed_now(replica, request):
    """vLLM's num_computed_tokens of a request in the flow."""
    return request.flow_computed + np.int32(replica.scheduled_batches - request.flow_start)


@kernel
def tokens_now(replica, request):
    """vLLM's num_tokens of a request in the flow: delivered so far."""
    return max(
        request.flow_tokens, request.flow_computed + np.int32(1 + replica.completed_batches - request.flow_start)
    )


@kernel
def join(state, number, slot):
    """Let a request decode with the flow from the next batch on. The batch just scheduled brings it a token."""
    replica, requests, request = state.replicas[number], state.requests[number], state.requests[number][slot]
    phases, block_size = state.phases[number], state.engines[number].block_size
    request.flowing = 1
    request.flow_computed = request.computed
    request.flow_tokens = request.tokens
    request.flow_start = replica.scheduled_batches
    request.flow_end = request.flow_start + (request.prompt + request.output - request.computed - 1)
    replica.flow_context += request.computed + 1
    replica.flow_newest = max(replica.flow_newest, request.run_order)
    state.flow[number][replica.flowing] = slot
    replica.flowing += 1
    _rise(requests, state.flow[number], replica.flowing - 1)
    # Within a phase by running order. New ones are mostly the newest: look from the back.
    phase = phases[phase_of(request, block_size)]
    after = phase.last
    while after >= 0 and requests[after].run_order > request.run_order:
        after = requests[after].flow_prev
    before = requests[after].flow_next if after >= 0 else phase.first
    request.flow_prev = after
    request.flow_next = before
    if after >= 0:
        requests[after].flow_next = slot
    else:
        phase.first = slot
    if before >= 0:
        requests[before].flow_prev = slot
    else:
        phase.last = slot
    phase.count += 1


@kernel
def _unlink(state, number, slot):
    """Take a request out of the flow's sums and of its phase (not of the heap)."""
    replica, requests, request = state.replicas[number], state.requests[number], state.requests[number][slot]
    phase = state.phases[number][phase_of(request, state.engines[number].block_size)]
    before, after = request.flow_prev, request.flow_next
    if before >= 0:
        requests[before].flow_next = after
    else:
        phase.first = after
    if after >= 0:
        requests[after].flow_prev = before
    else:
        phase.last = before
    phase.count -= 1
    request.flowing = 0
    replica.flow_context -= computed_now(replica, request) + 1


@kernel
def _take_at(state, number, place):
    replica, requests, flow = state.replicas[number], state.requests[number], state.flow[number]
    replica.flowing -= 1
    last = replica.flowing
    if place < last:
        flow[place] = flow[last]
        _sink(requests, flow, last, place)
        _rise(requests, flow, place)
    if last == 0:
        replica.flow_newest = -1


@kernel
def next_end(state, number):
    """Number of the batch in which the next request of the flow gets its last token."""
    return state.requests[number][state.flow[number][0]].flow_end


@kernel
def _spell_out(state, number, slot):
    """Write the fields of a request that leaves the flow, and its entries in the batches in flight."""
    replica, request = state.replicas[number], state.requests[number][slot]
    batches = np.int32(replica.scheduled_batches - max(replica.completed_batches, request.flow_start))
    request.computed = computed_now(replica, request)
    request.tokens = tokens_now(replica, request)
    request.in_flight += batches
    if state.engines[number].async_scheduling:
        request.placeholders += batches
    for age in range(replica.in_flight):
        if replica.completed_batches + 1 + age > request.flow_start:
            place = (replica.oldest + age) % 2
            batch = state.batches[number, place]
            entry = state.entries[number, place, batch.count]
            entry.slot = slot
            entry.tokens = 1
            entry.emits = 1
            batch.count += 1
            batch.flowing -= 1


@kernel
def retire(state, number):
    """Take the request whose last batch is just being scheduled out of the flow. Returns its slot.

    `scheduled_batches` counts that batch, `in_flight` does not yet: the caller lists the request in it.
    """
    slot = state.flow[number][0]
    _unlink(state, number, slot)
    _spell_out(state, number, slot)
    _take_at(state, number, 0)
    return slot


@kernel
def leave(state, number, slot):
    """Take one request out of the flow before its end."""
    replica, requests = state.replicas[number], state.requests[number]
    flow, explicit = state.flow[number], state.explicit[number]
    for place in range(replica.flowing):
        if flow[place] == slot:
            _unlink(state, number, slot)
            _take_at(state, number, place)
            break
    _spell_out(state, number, slot)
    place = replica.explicit
    while place > 0 and requests[explicit[place - 1]].run_order > requests[slot].run_order:
        explicit[place] = explicit[place - 1]
        place -= 1
    explicit[place] = slot
    replica.explicit += 1


@kernel
def _sort_entries(requests, entries, count):
    """Bring a batch's entries into running order (an insertion sort: they nearly are)."""
    for at in range(1, count):
        slot, tokens, emits = entries[at].slot, entries[at].tokens, entries[at].emits
        place = at
        while (
            slot >= 0
            and place > 0
            and entries[place - 1].slot >= 0
            and requests[entries[place - 1].slot].run_order > requests[slot].run_order
        ):
            entries[place].slot = entries[place - 1].slot
            entries[place].tokens = entries[place - 1].tokens
            entries[place].emits = entries[place - 1].emits
            place -= 1
        entries[place].slot = slot
        entries[place].tokens = tokens
        entries[place].emits = emits


@kernel
def dissolve_flow(state, number):
    """Make every request of the flow an ordinary one."""
    replica, requests, running = state.replicas[number], state.requests[number], state.running[number]
    if replica.flowing > 0:
        for place in range(replica.running):
            slot = running[place]
            if requests[slot].flowing:
                _spell_out(state, number, slot)
                requests[slot].flowing = 0
        for age in range(replica.in_flight):
            place = (replica.oldest + age) % 2
            _sort_entries(requests, state.entries[number, place], state.batches[number, place].count)
        phases = state.phases[number]
        for phase in range(phases.size):
            phases[phase].first = -1
            phases[phase].last = -1
            phases[phase].count = 0
        replica.flowing = 0
        replica.flow_context = 0
        replica.flow_newest = -1
    list_explicit(state, number)


@kernel
def list_explicit(state, number):
    """Write the list of running requests outside the flow anew, without those that need no further batch."""
    replica, requests = state.replicas[number], state.requests[number]
    running, explicit = state.running[number], state.explicit[number]
    count = 0
    for place in range(replica.running):
        request = requests[running[place]]
        if not request.flowing and request.tokens + request.placeholders < request.prompt + request.output:
            explicit[count] = running[place]
            count += 1
    replica.explicit = count


@kernel
def refresh(state, number):
    """Write `tokens` and `computed` of the flow's requests, for readers outside the kernels."""
    replica, requests, flow = state.replicas[number], state.requests[number], state.flow[number]
    for place in range(replica.flowing):
        request = requests[flow[place]]
        request.tokens = tokens_now(replica, request)
        request.computed = computed_now(replica, request)
