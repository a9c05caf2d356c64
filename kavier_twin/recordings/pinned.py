"""Replaying a recording whose requests end when they really ended.

Between two real ends the engine's pace is set so that the next one fits: what is known of a recording (and, within
its delay, of a live stream) is when each request ended. The end itself then corrects what is left: a simulation
that is behind catches up, one that is ahead waits.
"""

from __future__ import annotations

import heapq

import numpy as np

from kavier_twin.mirror.calibration.requests import Observed, with_frontend
from kavier_twin.mirror.pace import Pace
from kavier_twin.simulation.fleet import Fleet, Live
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import RUNNING, WAITING

HOLD_SECONDS = 0.1  # how long an engine waits with a request that is ahead before the others go on
_PACE_SLACK = (0.2, 20.0)  # how far the pace between two ends may leave the tracked one


def replay_pinned(settings: FleetSettings, observed: Observed, frontend_seconds: float = 0.0) -> Fleet:
    """Run the recording on a cold fleet; requests without an observed end run free."""
    fleet = Fleet(settings)
    fleet.state.engines["hold_seconds"] = HOLD_SECONDS
    pace = Pace(settings.step_time)
    ends = observed.workload.arrival + observed.e2e_seconds
    workload = with_frontend(observed.workload, frontend_seconds)
    workload = workload._replace(held=np.isfinite(ends).astype(workload.held.dtype))
    fleet.foresee(workload)
    ends = np.maximum(ends, workload.delivered)
    rows = [(float(time), 1, row) for row, time in enumerate(workload.delivered)]
    rows += [(float(time), 2, row) for row, time in enumerate(ends) if np.isfinite(time)]
    rows.sort()
    coming = [(time, row) for time, kind, row in rows if kind == 2]
    heapq.heapify(coming)
    live: dict[int, Live] = {}
    for time, kind, row in rows:
        fleet.run(time)
        if kind == 1:
            replica, slot = map(int, fleet.deliver(workload, row, row + 1)[0])
            if slot >= 0:
                live[row] = Live(int(workload.index[row]), replica, slot)
        elif row in live:
            heapq.heappop(coming)
            outcome = fleet.finish(live.pop(row), int(workload.output[row]), None, 0)
            decode_seconds = float(observed.e2e_seconds[row] - observed.ttft_seconds[row])
            pace.observe(time, decode_seconds, outcome["decode_work"])
        pace.apply(fleet, _pace_to(fleet, pace, live, coming, time))
    fleet.run()
    return fleet


def _pace_to(fleet: Fleet, pace: Pace, live: dict[int, Live], coming: list[tuple[float, int]], now: float) -> float:
    """The factor at which the next request to end would end in time."""
    if not coming or coming[0][1] not in live:
        return pace.factor
    end, row = coming[0]
    replica, slot = live[row].replica, live[row].slot
    requests = fleet.state.requests[replica]
    if requests["state"][slot] != RUNNING:
        return pace.factor
    running = requests[requests["state"] == RUNNING]
    prefill = float(np.maximum(running["prompt"] - running["computed"], 0).sum())
    prefill += 0.25 * float(requests["prompt"][requests["state"] == WAITING].sum())  # what hits leave to compute
    left = float(requests["prompt"][slot] + requests["output"][slot] - requests["tokens"][slot])
    step_time = fleet.settings.step_time
    linear = left * step_time.linear_seconds(float(running.size))
    work = np.array([left, prefill, left * running.size, left * float(running["tokens"].sum()), 0.0, linear])
    modelled = float(step_time.coefficients() @ work)
    if modelled <= 0.0:
        return pace.factor
    low, high = _PACE_SLACK
    return min(high * pace.factor, max(low * pace.factor, (end - now) / modelled))
