"""A closed loop: a user's next request arrives when the last one ended and the user thought for a while.

Arrivals depend on ends, so no replica may run past the end of a request whose successor could reach it. Each round
moves only the replica that could end a request first, up to the moment at which another one could or to the next
arrival, and stops it at its own next end: conservative synchronisation, as Chandy and Misra ("Distributed simulation",
IEEE TSE 1979) bound each process by the others' lookahead. With one replica that is one jump an end.
"""

import numpy as np

from kavier_twin.simulation.kernels.compile import kernel
from kavier_twin.simulation.kernels.fleet import arrive
from kavier_twin.simulation.kernels.flow import next_end
from kavier_twin.simulation.kernels.reference import by_reference
from kavier_twin.simulation.kernels.replica import advance_until_end
from kavier_twin.simulation.kernels.requests import OK
from kavier_twin.simulation.kernels.scheduler import shortest_step

# What `progress` holds.
NEXT_ROW = 0  # the next request that a user will send
FIRST = 1  # `pending[FIRST:LAST]` are the rows that are to arrive, in order of arrival
LAST = 2
SEEN = 3  # leading rows of `outcomes` whose users know that their request ended

_ROUNDING = 1.0 - 1e-9  # many steps at once are summed in another order than one by one


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
    shortest = shortest_step(state.engines[number]) * _ROUNDING
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
    state, workload = by_reference(state), by_reference(workload)
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
            _, status, _ = arrive(state, workload, row, row + 1, places)
            if status != OK:
                return status
            progress[FIRST] += 1
        else:
            advance_until_end(state, number, min(second, due))
