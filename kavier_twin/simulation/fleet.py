"""A simulated fleet: what is planned for it, and its way through time.

The control plane pulls the data plane forward: before a process acts, the arrivals up to its time are delivered and
every replica is brought up to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.data_plane import Live, Peaks
from kavier_twin.simulation.lifecycle import Clock, Once, Plan, Sampling
from kavier_twin.simulation.replicas import Replicas

__all__ = ["Fleet", "Live", "Peaks"]


class Fleet(Replicas):
    """A simulated pool of replicas behind a router.

    Deterministic: the same settings and workload give the same bytes. Not thread-safe; a fork is independent.
    """

    _plans: Sequence[Plan] = ()

    def plan(self, plan: Plan) -> None:
        """Let this happen when its time comes. Raises ValueError for a time that has passed."""
        if plan.next_seconds < self.now_seconds:
            raise ValueError(f"planned for {plan.next_seconds} s, before the fleet's clock {self.now_seconds} s")
        self._plans = [*self._plans, plan]

    def at(self, time_seconds: float, act: Callable[..., None], *arguments: Any) -> None:
        """Call one of this class's methods then: `fleet.at(6.0, Fleet.crash, 0)`."""
        self.plan(Once(time_seconds, act, arguments))

    def sample_every(self, seconds: float) -> None:
        """Add to `samples` now and every so often while there is something to do."""
        self.plan(Sampling(self.now_seconds, seconds))

    def run(self, until_seconds: float = math.inf) -> None:
        """Advance to `until_seconds`; without it, until every request fed has ended and every plan is carried out."""
        if any(plan.next_seconds <= until_seconds for plan in self._plans):
            self._plans = Clock(self, self._plans, until_seconds).run()
        self.advance(until_seconds)

    def fork(self) -> Fleet:
        """An independent copy that continues exactly as this one would."""
        twin = copy(self)
        twin.state = layout.copy_state(self.state)
        twin.samples = self.samples.copy()
        twin._sessions = None if self._sessions is None else self._sessions.fork()
        twin._collected = list(self._collected)
        twin._plans = [copy(plan) for plan in self._plans]
        return twin
