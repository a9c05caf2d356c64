"""A closed loop: a user's next request arrives when the last one ended and the user thought for a while.

Arrivals depend on ends, so no replica may run past the end of a request whose successor could reach it. Each round
moves only the replica that could end a request first, up to the moment at which another one could or to the next
arrival, and stops it at its own next end: conservative synchronisation, as Chandy and Misra ("Distributed simulation",
IEEE TSE 1979) bound each process by the others' lookahead. With one replica that is one jump an end.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.fleet.arrivals import arrive, arrive_one, refresh_all
from kavier_twin.simulation.kernels.step.flow import next_end, tokens_now
from kavier_twin.simulation.kernels.step.replica import advance, advance_until_end
from kavier_twin.simulation.kernels.step.scheduler import shortest_step
from kavier_twin.simulation.state import NO_REPLICA, OK

# What `progress` holds.
NEXT_ROW = 0  # the next request that a user will send
FIRST = 1  # `pending[FIRST:LAST]` are the rows that are to arrive, in order of arrival
LAST = 2
SEEN = 3  # leading rows of `outcomes` whose users know that their request ended


@kernel
def _left(request):
    """Tokens that a request is still to be given."""
    return np.int64(request.prompt + request.output - request.tokens)


@kernel
def _earliest_end(state, number):
    """A time before which no live request of the replica can end, infinity if it has none.

    A batch brings a request at most one token and lasts at least `shortest_step`.
    """
    replica, requests = state.replicas[number], state.requests[number]
    if replica.running + replica.waiting + replica.loading == 0:
        return np.inf
    batches = np.int64(1) << 40
    if replica.flowing > 0:
        batches = next_end(state, number) - replica.completed_batches
    if replica.running > replica.flowing + replica.explicit:
        batches = np.int64(1)  # somebody's last token is in flight
    for place in range(replica.explicit):
        batches = min(batches, _left(requests[state.explicit[number, place]]))
    for place in range(replica.waiting):
        batches = min(batches, _left(requests[state.waiting[number, place]]))
    for place in range(replica.loading):
        batches = min(batches, _left(requests[state.tier_slots[number, 0, place]]))
    shortest = shortest_step(state.engines[number])
    if replica.in_flight == 0:
        return replica.now + batches * shortest
    return state.batches[number, replica.oldest].end + (batches - 1) * shortest


@kernel
def _send_next(state, workload, think, frontend_seconds, pending, progress):
    """The users whose requests ended will send their next ones, if there are more."""
    for at in range(progress[SEEN], state.fleet[0].outcomes):
        row = progress[NEXT_ROW]
        if row < workload.index.size:
            progress[NEXT_ROW] += 1
            time = state.outcomes[at].finish + think[row]
            workload.arrival[row] = time
            workload.delivered[row] = time + frontend_seconds
            place = progress[LAST]
            while place > progress[FIRST] and workload.arrival[pending[place - 1]] > time:
                pending[place] = pending[place - 1]
                place -= 1
            pending[place] = row
            progress[LAST] += 1
    progress[SEEN] = state.fleet[0].outcomes


@kernel
def run_closed_loop(state, workload, think, frontend_seconds, pending, progress, places):
    """Send all requests of the workload and run until the last has ended.

    `pending` [rows] begins with the rows whose arrival is known, by arrival. The arrival of every other row is
    written when the request before it ended, `think[row]` seconds later; it reaches the router `frontend_seconds` after
    that. `places` is for `arrive`. Returns a status: any but OK names what must grow before calling again.
    """
    while True:
        _send_next(state, workload, think, frontend_seconds, pending, progress)
        row, due = np.int64(-1), np.inf
        if progress[FIRST] < progress[LAST]:
            row = pending[progress[FIRST]]
            due = workload.delivered[row]
        first, second, number = np.inf, np.inf, -1
        for other in range(state.replicas.size):
            end = _earliest_end(state, other)
            if end < first:
                first, second, number = end, first, other
            elif end < second:
                second = end
        if due <= first:
            if row < 0:
                return OK
            _, status = arrive(state, workload, row, row + 1, places)
            if status != OK:
                return status
            progress[FIRST] += 1
        else:
            advance_until_end(state, number, min(second, due))


# --- turns among requests that wait for nobody (simulation/turns.py) ------------------------------------------------
#
# Here many replicas serve requests of which most have no next turn for a while. What is to come stands in one heap: a
# turn whose time is known, or the time before which the turn after a live request cannot come. Up to the first of these
# times nothing unforeseen arrives anywhere, so only the replica that the first one waits for must be looked at.

OPEN = 0  # `opens[:progress[OPEN]]` are delivered
COMING = 1  # entries of `coming`
HEARD = 2  # leading rows of `outcomes` that are known to have ended


@kernel
def _copy_coming(coming, target, source):
    coming[target].time = coming[source].time
    coming[target].row = coming[source].row
    coming[target].replica = coming[source].replica
    coming[target].slot = coming[source].slot


@kernel
def _before(time, row, slot, other):
    """Whether a turn comes before another. At the same time bounds come first, then lower rows."""
    if time != other.time:
        return time < other.time
    if (slot < 0) != (other.slot < 0):
        return slot >= 0
    return row < other.row


@kernel
def _push(loop, time, row, replica, slot):
    coming = loop.coming
    place = loop.progress[COMING]
    loop.progress[COMING] += 1
    while place > 0 and _before(time, row, slot, coming[(place - 1) // 2]):
        _copy_coming(coming, place, (place - 1) // 2)
        place = (place - 1) // 2
    coming[place].time = time
    coming[place].row = row
    coming[place].replica = replica
    coming[place].slot = slot


@kernel
def _pop(loop):
    coming = loop.coming
    loop.progress[COMING] -= 1
    count = loop.progress[COMING]
    last, place = coming[count], 0
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        other = coming[min(child + 1, count - 1)]
        if _before(other.time, other.row, other.slot, coming[child]):
            child += 1
        if not _before(coming[child].time, coming[child].row, coming[child].slot, last):
            break
        _copy_coming(coming, place, child)
        place = child
    _copy_coming(coming, place, count)


@kernel
def _follower(loop, index):
    """The row that waits for the request with this index, -1 if there is none."""
    place = index - loop.first_index
    return loop.follower[place] if 0 <= place < loop.follower.size else np.int64(-1)


@kernel
def hear_of_ends(state, workload, loop):
    """Turns after the requests that ended since the last time have a time now."""
    for at in range(loop.progress[HEARD], state.fleet[0].outcomes):
        row = _follower(loop, state.outcomes[at].index)
        if row >= 0:
            time = state.outcomes[at].finish + loop.think_seconds[row]
            workload.arrival[row] = time
            workload.delivered[row] = time + loop.frontend_seconds
            _push(loop, workload.delivered[row], row, -1, -1)
    loop.progress[HEARD] = state.fleet[0].outcomes


@kernel
def _await_end(state, loop, row, number, slot):
    """Note when `row` can come at the earliest, which waits for a live request of a replica that is up to date.

    A held request ends when told from outside, and one that nothing can wake does not end.
    """
    replica, request = state.replicas[number], state.requests[number][slot]
    if request.held or (replica.parked and replica.in_flight == 0 and state.tiers[number].wake == np.inf):
        return
    tokens = tokens_now(replica, request) if request.flowing else request.tokens
    batches = max(np.int64(1), np.int64(request.prompt + request.output - tokens))
    shortest = shortest_step(state.engines[number])
    if replica.in_flight == 0:
        end = replica.now + batches * shortest
    else:
        end = state.batches[number, replica.oldest].end + (batches - 1) * shortest
    _push(loop, end + loop.think_seconds[row] + loop.frontend_seconds, row, number, slot)


@kernel
def _await_ends(state, loop, number, slots, count):
    for place in range(count):
        row = _follower(loop, state.requests[number, slots[place]].index)
        if row >= 0:
            _await_end(state, loop, row, number, slots[place])


@kernel
def _await_all(state, loop):
    """Look anew at what turns wait for: requests may have ended, changed their length or begun again elsewhere."""
    count, loop.progress[COMING] = loop.progress[COMING], 0
    for place in range(count):
        if loop.coming[place].slot < 0:
            _push(loop, loop.coming[place].time, loop.coming[place].row, -1, -1)
    for number in range(state.replicas.size):
        replica = state.replicas[number]
        _await_ends(state, loop, number, state.running[number], replica.running)
        _await_ends(state, loop, number, state.waiting[number], replica.waiting)
        _await_ends(state, loop, number, state.tier_slots[number, 0], replica.loading)


@kernel
def deliver_turns(state, workload, loop, until):
    """Deliver all rows that come before `until`, those that wait for an end included; replicas are up to date before.

    Returns (row, status), status being OK, a name of what must grow before calling again, or NO_REPLICA for a row that
    none would take; that row is done with.
    """
    hear_of_ends(state, workload, loop)
    _await_all(state, loop)
    progress, status, row = loop.progress, OK, np.int64(-1)
    while True:
        if progress[HEARD] < state.fleet[0].outcomes:
            hear_of_ends(state, workload, loop)
        row, due = np.int64(-1), np.inf
        if progress[OPEN] < loop.opens.size:
            row = loop.opens[progress[OPEN]]
            due = workload.delivered[row]
        is_open = progress[COMING] == 0 or due <= loop.coming[0].time
        if not is_open:
            due = loop.coming[0].time
        if due >= until:
            break
        if not is_open:
            first = loop.coming[0]
            row = first.row
            if first.slot >= 0:
                number, slot = first.replica, first.slot
                _pop(loop)
                if workload.delivered[row] == np.inf:
                    advance(state, number, due)
                    hear_of_ends(state, workload, loop)
                    if workload.delivered[row] == np.inf:
                        _await_end(state, loop, row, number, slot)
                continue
        status, number = arrive_one(state, workload, row, loop.places)
        if status != OK and status != NO_REPLICA:
            break
        if is_open:
            progress[OPEN] += 1
        else:
            _pop(loop)
        if status != OK:
            break
        follower = _follower(loop, workload.index[row])
        if follower >= 0 and loop.places[row, 1] >= 0:
            _await_end(state, loop, follower, number, loop.places[row, 1])
    refresh_all(state)
    return row, status
