"""Sessions in a closed loop on a fleet: requests that come when another has ended and its user has thought."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.kernels import entries as kernels
from kavier_twin.simulation.kernels.fleet import closed_loop as layout
from kavier_twin.simulation.state import COMING, FleetState, Loop, Workload
from kavier_twin.simulation.workload import writable


class Turns(NamedTuple):
    """Which rows of a workload wait for the end of another request. Those rows' arrivals are not used."""

    after: npt.NDArray[np.int64]  # [n] the `index` of the request it waits for, -1: it arrives when the workload says
    think_seconds: npt.NDArray[np.float64]  # [n] from that request's end to the arrival
    frontend_seconds: float  # from the arrival to the delivery


class SessionLoad:
    """A workload some of whose rows wait for others, as far as it has come.

    Raises ValueError for a row that waits for itself or a later one, for two that wait for the same request, and for a
    think time that is negative or endless.
    """

    def __init__(self, workload: Workload, turns: Turns) -> None:
        waiting = np.flatnonzero(turns.after >= 0)
        after, think = turns.after[waiting], turns.think_seconds[waiting]
        if not (np.isfinite(think) & (think >= 0.0)).all():
            raise ValueError("think times must be finite and not negative")
        if (after >= workload.index[waiting]).any() or np.unique(after).size != after.size:
            raise ValueError("a turn follows one request before it, and each request has one next turn at most")
        first, last = (int(after.min()), int(after.max())) if after.size else (0, -1)
        follower = np.full(last + 1 - first, -1)
        follower[after - first] = waiting
        # The kernels write arrivals; the caller's arrays stay as they are.
        arrival, delivered = workload.arrival.copy(), workload.delivered.copy()
        arrival[waiting] = delivered[waiting] = np.inf
        self.workload = writable(workload)._replace(arrival=arrival, delivered=delivered)
        self.loop = Loop(
            first_index=first,
            follower=follower,
            think_seconds=np.array(turns.think_seconds, np.float64),
            frontend_seconds=float(turns.frontend_seconds),
            opens=np.flatnonzero(turns.after < 0),
            coming=np.zeros(2 * waiting.size + 1, COMING),
            progress=np.zeros(3, np.int64),
            places=np.full((workload.index.size, 2), -1, np.int32),
        )

    @property
    def done(self) -> bool:
        """Nothing will come any more."""
        progress = self.loop.progress
        return bool(progress[layout.OPEN] == self.loop.opens.size and progress[layout.COMING] == 0)

    def deliver(self, state: FleetState, until_seconds: float) -> tuple[int, int]:
        """See `kernels.deliver_turns`."""
        return kernels.deliver_turns(state, self.workload, self.loop, until_seconds)

    def take_note(self, state: FleetState) -> None:
        """The outcomes so far are about to be taken away."""
        kernels.hear_of_ends(state, self.workload, self.loop)
        self.loop.progress[layout.HEARD] = 0

    def fork(self) -> SessionLoad:
        """A copy that goes on as this one would."""
        twin = SessionLoad.__new__(SessionLoad)
        written = ("coming", "progress", "places")
        twin.loop = self.loop._replace(**{name: getattr(self.loop, name).copy() for name in written})
        workload = self.workload
        twin.workload = workload._replace(arrival=workload.arrival.copy(), delivered=workload.delivered.copy())
        return twin
