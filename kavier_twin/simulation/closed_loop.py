"""Load from a fixed number of users, each of whom waits for an answer before asking again.

That is how a benchmark at a fixed concurrency loads a server (vLLM's `--max-concurrency`, AIPerf's `--concurrency`):
arrivals depend on how fast the server is, so no list of arrival times can stand for it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation import build
from kavier_twin.simulation.compiler.libraries import load
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.kernels import entries as kernels
from kavier_twin.simulation.kernels.fleet.closed_loop import LAST, NEXT_ROW, SEEN
from kavier_twin.simulation.settings import EngineSettings, FleetSettings
from kavier_twin.simulation.state import OK, Records
from kavier_twin.simulation.workload import Workload


def simulate_closed_loop(
    settings: FleetSettings,
    workload: Workload,
    users: int,
    think_seconds: npt.ArrayLike = 0.0,
    *,
    frontend_seconds: float = 0.0,
    stepping: bool = False,
) -> Fleet:
    """Run a workload in a closed loop on a cold fleet, to its end.

    The first `users` requests arrive when the workload says; every later one `think_seconds` (a number, or one a
    request) after a request ended, in the order of the workload: whoever is free takes the next. The arrival times
    that the workload gives for those are not used; `Fleet.collect` tells the true ones. A request reaches the router
    `frontend_seconds` after its arrival. Deterministic.
    Raises ValueError without users or requests, for a negative or endless think time, and for a request that the
    engine could never serve (a real user would get an error instead of an answer).
    """
    requests = workload.index.size
    think = np.array(np.broadcast_to(np.asarray(think_seconds, np.float64), (requests,)))
    if users < 1 or requests == 0:
        raise ValueError(f"{users} users and {requests} requests: expected at least one of each")
    if not (np.isfinite(think) & (think >= 0.0)).all():
        raise ValueError("think times must be finite and not negative")
    _refuse_unservable(settings.engine, workload)
    users = min(users, requests)
    # The kernel writes arrivals; the caller's arrays stay as they are.
    arrival = workload.arrival.copy()
    workload = workload._replace(arrival=arrival, delivered=arrival + frontend_seconds)
    pending = np.zeros(requests, np.int64)
    pending[:users] = np.arange(users)
    progress = np.zeros(4, np.int64)
    progress[NEXT_ROW] = progress[LAST] = users
    places = np.full((requests, 2), -1, np.int32)
    fleet = Fleet(settings, stepping=stepping, start_seconds=min(0.0, float(arrival[0])))
    load(*build.kernels_of(settings.engine))
    while True:
        status = kernels.run_closed_loop(fleet.state, workload, think, frontend_seconds, pending, progress, places)
        if status == OK:
            break
        fleet.grow(status)
        progress[SEEN] = fleet.state.fleet["outcomes"][0]
    fleet.run()  # nothing is left to do; the clock is brought up to the last end
    return fleet


def simulate_sessions(
    settings: FleetSettings,
    workload: Workload,
    arrival_after: Callable[[int, float], float],
    *,
    frontend_seconds: float = 0.0,
) -> Records:
    """Run sessions in a closed loop on one cold engine: each turn follows the end of the turn before it.

    First turns arrive when the workload says, every later row of a session at `arrival_after(row, finish)`, finish
    being when the row before it ended (seconds). Returns the outcomes in the order of the workload's rows, whose
    `index` must number them. Raises ValueError for more than one replica, and for a request that could never be served.
    """
    if settings.replicas != 1:
        raise ValueError(f"{settings.replicas} replicas: sessions in a closed loop are simulated on one")
    _refuse_unservable(settings.engine, workload)
    follower, firsts = _turns(workload)
    arrival = workload.arrival.copy()
    workload = workload._replace(arrival=arrival, delivered=arrival + frontend_seconds)
    coming = [(float(workload.delivered[row]), row) for row in firsts]
    heapq.heapify(coming)
    fleet = Fleet(settings, start_seconds=min(0.0, float(arrival.min(initial=0.0))))
    ended: list[Records] = []
    while True:
        kernels.advance_until_end(fleet.state, 0, coming[0][0] if coming else math.inf)
        ended.append(fleet.collect())
        for outcome in ended[-1]:
            row = int(follower[outcome["index"]])
            if row >= 0:
                arrival[row] = max(arrival_after(row, float(outcome["finish"])), float(outcome["finish"]))
                workload.delivered[row] = arrival[row] + frontend_seconds
                heapq.heappush(coming, (float(workload.delivered[row]), row))
        if ended[-1].size:
            continue
        if not coming:
            break
        _, row = heapq.heappop(coming)
        fleet.deliver(workload, row, row + 1)
    outcomes = np.concatenate(ended)
    return outcomes[np.argsort(outcomes["index"], kind="stable")]


def _turns(workload: Workload) -> tuple[npt.NDArray[np.int64], list[int]]:
    """By row the next of its session (-1: none), and the first rows of all sessions."""
    follower = np.full(workload.index.size, -1)
    last: dict[int, int] = {}
    firsts = []
    for row, session in enumerate(workload.session.tolist()):
        if session in last:
            follower[last[session]] = row
        else:
            firsts.append(row)
        last[session] = row
    return follower, firsts


def _refuse_unservable(engine: EngineSettings, workload: Workload) -> None:
    output = np.minimum(workload.output, engine.max_model_len - workload.prompt)
    blocks = -(-(workload.prompt + output) // engine.block_size)
    bad = np.flatnonzero((workload.prompt >= engine.max_model_len) | (blocks > engine.num_gpu_blocks - 1))
    if bad.size:
        row = int(bad[0])
        raise ValueError(
            f"request {row} of {int(workload.prompt[row])} prompt and {int(workload.output[row])} output tokens can "
            f"never be served: max_model_len is {engine.max_model_len}, and {engine.num_gpu_blocks - 1} blocks of "
            f"{engine.block_size} tokens are usable"
        )
