"""Feeding a fleet: arrivals in time order, each to the replica the router picks."""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.eviction import belady
from kavier_twin.simulation.kernels.fleet.router import route
from kavier_twin.simulation.kernels.step.flow import refresh
from kavier_twin.simulation.kernels.step.replica import advance
from kavier_twin.simulation.kernels.step.requests import push
from kavier_twin.simulation.state import BELADY, NO_REPLICA, OK


@kernel
def refresh_all(state):
    for number in range(state.replicas.size):
        refresh(state, number)


@kernel
def arrive_one(state, workload, row, places):
    """Deliver one row of a workload. Returns (status, replica): see `arrive`.

    `tokens` and `computed` of requests in the flow are not written for readers outside the kernels.
    """
    time = workload.delivered[row]
    number = route(state, workload, row, time)
    if number < 0:
        return NO_REPLICA, np.int64(-1)
    advance(state, number, time)
    status, slot = push(state, number, workload, row)
    if status != OK:
        # The turn was taken: a second try must come out the same.
        state.fleet[0].turn = number
        return status, np.int64(number)
    if state.engines[number].eviction == BELADY and state.replicas.size > 1:
        for other in range(state.replicas.size):
            advance(state, other, time)
        belady.passed(state, row, workload, number if slot >= 0 else -1)
    places[row, 0] = number
    places[row, 1] = slot
    return OK, np.int64(number)


@kernel
def arrive(state, workload, start, stop, places):
    """Deliver rows [start, stop) of a workload sorted by delivery."""
    row, status = start, OK
    while row < stop:
        status, _ = arrive_one(state, workload, row, places)
        if status != OK:
            break
        row += 1
    refresh_all(state)
    return row, status


@kernel
def advance_all(state, until):
    """Run every replica up to `until` (infinity: until all their requests ended)."""
    for number in range(state.replicas.size):
        advance(state, number, until)
    refresh_all(state)
