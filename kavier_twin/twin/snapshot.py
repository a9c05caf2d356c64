"""What the mirror hands to the forecaster: the fleet as it is now, and the stream as it was lately."""

from __future__ import annotations

from dataclasses import dataclass

from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.workload import Workload


@dataclass(frozen=True)
class Snapshot:
    """A moment of one pool. Nothing in it changes any more.

    `fleet` is a fork whose live requests still have their assumed output lengths: a forecast draws them. `recent`
    holds the requests seen over the last `recent_seconds`, in order of arrival, with the output length of those that
    finished and 0 for those in flight; `recent.session` numbers sessions (a request without one has a number of its
    own, below zero). Times are the stream's event time, seconds.
    """

    pool: str
    time_seconds: float
    fleet: Fleet
    recent: Workload
    recent_seconds: float
    frontend_seconds: float
    calibrated: bool
