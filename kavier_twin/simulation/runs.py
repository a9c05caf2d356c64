"""Whole workloads on a cold fleet, from their beginning to their end."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.lib import recfunctions as rfn

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import Records
from kavier_twin.simulation.workload import Workload


def simulate(
    settings: FleetSettings, workload: Workload, *, stepping: bool = False, sample_seconds: float = 0.0
) -> Fleet:
    """Run a workload to its end on a cold fleet."""
    start = float(workload.arrival[0]) if workload.arrival.size else 0.0
    fleet = Fleet(settings, stepping=stepping, start_seconds=start)
    if sample_seconds > 0.0:
        fleet.sample_every(sample_seconds)
    fleet.feed(workload)
    fleet.run()
    return fleet


def simulate_parts(
    settings: FleetSettings, parts: Iterable[Workload], *, stepping: bool = False, sample_seconds: float = 0.0
) -> tuple[Fleet, Records]:
    """Run a workload that comes in parts, each later than the one before, holding one part at a time.

    Returns the fleet and the outcomes in the order in which they ended, without their work vectors: half the memory.
    """
    fleet: Fleet | None = None
    ended = _without_work(np.zeros(0, layout.OUTCOME))
    count = 0

    def take(outcomes: Records) -> None:
        """Into an array that grows in place: neither parts nor a copy are held beside it."""
        nonlocal count
        if count + outcomes.size > ended.size:
            ended.resize(count + outcomes.size + ended.size // 4, refcheck=False)
        ended[count : count + outcomes.size] = _without_work(outcomes)
        count += outcomes.size

    for part in parts:
        if part.arrival.size == 0:
            continue
        start = float(part.delivered[0])
        if fleet is None:
            fleet = Fleet(settings, stepping=stepping, start_seconds=start)
            if sample_seconds > 0.0:
                fleet.sample_every(sample_seconds)
        fleet.run(start)
        take(fleet.collect())
        fleet.feed(part)
    if fleet is None:
        fleet = Fleet(settings, stepping=stepping)
    fleet.run()
    take(fleet.collect())
    return fleet, ended[:count]


def _without_work(outcomes: Records) -> Records:
    kept = [name for name in layout.OUTCOME.names or () if name not in ("prefill_work", "decode_work")]
    return rfn.repack_fields(outcomes[kept])
