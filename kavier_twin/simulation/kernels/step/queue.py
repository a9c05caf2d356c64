"""The waiting queue of one replica: a binary heap of request slots in scheduling order.

fcfs orders by a sequence number (a preempted request gets one below all others: vLLM's `appendleft`), `priority` by
(priority, arrival, request id as text), vLLM 0.32 `v1/request.py` `Request.__lt__`.
"""

from kavier_twin.simulation.compiler.kernel import kernel


@kernel
def _digits(number):
    count = 1
    while number >= 10:
        number //= 10
        count += 1
    return count


@kernel
def text_before(a, b):
    """Whether the decimal text of `a` sorts before that of `b` ("10" before "9"). Both are >= 0."""
    digits_a, digits_b = _digits(a), _digits(b)
    x, y = a, b
    for _ in range(digits_a, digits_b):
        x *= 10
    for _ in range(digits_b, digits_a):
        y *= 10
    if x != y:
        return x < y
    return digits_a < digits_b


@kernel
def before(requests, by_priority, a, b):
    """Whether slot `a` is scheduled before slot `b`."""
    if by_priority:
        if requests[a].priority != requests[b].priority:
            return requests[a].priority < requests[b].priority
        if requests[a].arrival != requests[b].arrival:
            return requests[a].arrival < requests[b].arrival
        return text_before(requests[a].index, requests[b].index)
    return requests[a].sequence < requests[b].sequence


@kernel
def _rise(requests, waiting, by_priority, place):
    slot = waiting[place]
    while place > 0:
        parent = (place - 1) // 2
        if not before(requests, by_priority, slot, waiting[parent]):
            break
        waiting[place] = waiting[parent]
        place = parent
    waiting[place] = slot


@kernel
def _sink(requests, waiting, count, by_priority, place):
    slot = waiting[place]
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        if child + 1 < count and before(requests, by_priority, waiting[child + 1], waiting[child]):
            child += 1
        if not before(requests, by_priority, waiting[child], slot):
            break
        waiting[place] = waiting[child]
        place = child
    waiting[place] = slot


@kernel
def enqueue(replica, requests, waiting, by_priority, slot):
    """Add a slot to the queue."""
    waiting[replica.waiting] = slot
    replica.waiting += 1
    _rise(requests, waiting, by_priority, replica.waiting - 1)


@kernel
def remove_at(replica, requests, waiting, by_priority, place):
    """Take the slot at this place of the heap out (0 is the head)."""
    replica.waiting -= 1
    last = replica.waiting
    if place == last:
        return
    waiting[place] = waiting[last]
    _sink(requests, waiting, last, by_priority, place)
    _rise(requests, waiting, by_priority, place)


@kernel
def remove(replica, requests, waiting, by_priority, slot):
    """Take a slot out wherever it stands."""
    for place in range(replica.waiting):
        if waiting[place] == slot:
            remove_at(replica, requests, waiting, by_priority, place)
            return


@kernel
def reorder(replica, requests, waiting, by_priority):
    """Restore the heap after the order changed (a switch of scheduling policy)."""
    for place in range(replica.waiting // 2 - 1, -1, -1):
        _sink(requests, waiting, replica.waiting, by_priority, place)
