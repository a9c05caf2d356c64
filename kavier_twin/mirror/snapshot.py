"""What the mirror hands to the forecaster: the fleet as it is now, and the stream as it was lately."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.workload import Workload

COUNT_SECONDS = 10.0  # width of the buckets in `ArrivalCounts.fine`
COARSE_COUNT_SECONDS = 60.0  # and in `.coarse`


def _none() -> npt.NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class ArrivalCounts:
    """Requests that arrived, in whole buckets of event time, oldest first.

    A bucket begins at a multiple of its width; the last one ends at the last such multiple before the snapshot.
    """

    fine: npt.NDArray[np.int64] = field(default_factory=_none)  # hours
    coarse: npt.NDArray[np.int64] = field(default_factory=_none)  # weeks


@dataclass(frozen=True)
class Snapshot:
    """A moment of one pool. Nothing in it changes any more.

    `fleet` is a fork whose live requests still have their assumed output lengths: a forecast draws them. `recent`
    holds the requests seen over the last `recent_seconds`, in order of arrival, with the output length of those that
    finished and 0 for those in flight, and `ended_seconds` when each of them ended (NaN: not yet; None: nobody told any
    end). `recent.index` is the fleet's number of those that are live in it, and no other's; `recent.session` numbers
    sessions as the fleet does (a request without one has a number of its own, below zero). `arrivals` counts the
    requests of a longer past. Times are the stream's event time, seconds.
    """

    pool: str
    time_seconds: float
    fleet: Fleet
    recent: Workload
    recent_seconds: float
    frontend_seconds: float
    calibrated: bool
    arrivals: ArrivalCounts = field(default_factory=ArrivalCounts)
    ended_seconds: npt.NDArray[np.float64] | None = None
