"""The control plane: what happens rarely to a fleet and takes its time, as SimPy processes.

What a process has still to do is a plain record, a `Plan`, and its generator holds nothing beside it. Every run of a
fleet makes the processes anew from the plans, so copies of state and plans go on exactly as the fleet itself would.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import simpy

from kavier_twin.simulation.replica_state import ReplicaState
from kavier_twin.simulation.replicas import Replicas

Process = Generator[simpy.Event, Any, None]


class Clock:
    """The time of one run, up to and including `until_seconds`."""

    def __init__(self, fleet: Replicas, plans: Sequence[Plan], until_seconds: float) -> None:
        self.until_seconds = until_seconds
        self._fleet = fleet
        # Fractions are exact: where a run starts must not matter.
        start = Fraction(min(plan.next_seconds for plan in plans))
        self._environment = simpy.Environment(start)  # type: ignore[arg-type]  # any number will do
        for plan in plans:
            self._environment.process(plan.process(fleet, self))
        self._waiting: list[Plan] = []  # in the order in which they began to wait: at equal times the first acts first

    def run(self) -> list[Plan]:
        """Bring the fleet through the plans. Returns those that go on after this run."""
        while self._environment.peek() <= min(self.until_seconds, sys.float_info.max):
            self._environment.step()
            self._fleet.retire()
        return self._waiting

    def reach(self, plan: Plan) -> Process:
        """Wait until the plan goes on, and bring the fleet up to then."""
        self._waiting.append(plan)
        yield self._environment.timeout(Fraction(plan.next_seconds) - self._environment.now)
        self._waiting.remove(plan)
        self._fleet.advance(plan.next_seconds)


@dataclass(eq=False)
class Plan(ABC):
    """What is still to happen. A process waits for `next_seconds`, acts, and writes down what follows and when."""

    next_seconds: float

    @abstractmethod
    def process(self, fleet: Replicas, clock: Clock) -> Process:
        """Carry it out."""


@dataclass(eq=False)
class Once(Plan):
    """One method of the fleet is called with these arguments."""

    act: Callable[..., None]
    arguments: Sequence[Any] = ()

    def process(self, fleet: Replicas, clock: Clock) -> Process:
        yield from clock.reach(self)
        self.act(fleet, *self.arguments)


@dataclass(eq=False)
class Restart(Plan):
    """Replicas restart, so many at a time: they are drained for so long, stopped, and started with nothing cached."""

    replicas: Sequence[int]  # those whose restart has not ended
    at_a_time: int
    drain_seconds: float
    startup_seconds: float
    stage: ReplicaState = ReplicaState.READY  # of the first `at_a_time`

    def process(self, fleet: Replicas, clock: Clock) -> Process:
        while self.replicas:
            if self.stage == ReplicaState.READY:
                yield from clock.reach(self)
                for replica in self._group(fleet):
                    fleet.accept(replica, False)
                self.stage = ReplicaState.DRAINING
                self.next_seconds += self.drain_seconds
            if self.stage == ReplicaState.DRAINING:
                yield from clock.reach(self)
                for replica in self._group(fleet):
                    fleet.stop(replica)
                self.stage = ReplicaState.STARTING
                self.next_seconds += self.startup_seconds
            yield from clock.reach(self)
            for replica in self._group(fleet):
                fleet.accept(replica, True)
            self.replicas = self.replicas[self.at_a_time :]
            self.stage = ReplicaState.READY

    def _group(self, fleet: Replicas) -> list[int]:
        """Those whose turn it is and that have not failed or left meanwhile."""
        return [replica for replica in self.replicas[: self.at_a_time] if fleet.has(replica)]


@dataclass(eq=False)
class Replacement(Plan):
    """Replicas are replaced one after the other: a new one starts, and when it serves, an old one is let go."""

    replicas: Sequence[int]  # those still to be replaced
    startup_seconds: float

    def process(self, fleet: Replicas, clock: Clock) -> Process:
        while self.replicas:
            yield from clock.reach(self)
            fleet.add()
            if fleet.has(self.replicas[0]):
                fleet.let_go(self.replicas[0])
            self.replicas = self.replicas[1:]
            self.next_seconds += self.startup_seconds


@dataclass(eq=False)
class Sampling(Plan):
    """Samples are taken every so often; in a run without an end, until the fleet is idle."""

    every_seconds: float

    def process(self, fleet: Replicas, clock: Clock) -> Process:
        while True:
            yield from clock.reach(self)
            fleet.sample()
            if clock.until_seconds == math.inf and fleet.idle:
                return
            self.next_seconds += self.every_seconds
