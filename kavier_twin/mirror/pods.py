"""Which replica stands for which pod, as pods start, restart, fall silent and stop.

Pods are known from the stream (`RequestSeen.pod`) and from metrics (`EngineSample.pod`); everything happens in event
time, so the fleet stays a function of the log.

The first pods take the places of the configured replicas; more pods join as new ones. A pod is heard when a request
reaches or leaves it, and with every sample. One that is silent for `pod_silent_seconds` while the others are heard
`HEARD_AROUND` times each is drained: it gets no more requests and has stopped once those it has have ended. So is a
configured replica that no pod claims. A pod that restarted begins anew with a cold cache.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

from kavier_twin.simulation.fleet import Fleet
from kavier_twin.telemetry import EngineSample

HEARD_AROUND: Final = 20  # requests spread evenly miss a pod for so many rounds once in e^20
RESTART_SECONDS: Final = 5.0  # by which a process's start must differ: nodes' clocks do too


class PodSeen(NamedTuple):
    """What one engine's metrics say of its pod. Unknown numbers are -inf."""

    time_seconds: float
    pod: str
    rank: str  # data-parallel
    started_seconds: float  # of its process
    tokens: float  # counted since

    @staticmethod
    def of(sample: EngineSample) -> PodSeen:
        """From a sample that names its pod."""
        counters = [count for count in (sample.prompt_tokens, sample.generation_tokens) if count is not None]
        return PodSeen(
            sample.time_seconds,
            sample.pod,
            sample.engine,
            -math.inf if sample.started_seconds is None else sample.started_seconds,
            sum(counters) if counters else -math.inf,
        )


class Restart(NamedTuple):
    """A replica whose process began anew: what reached it before `since_seconds` is gone."""

    replica: int
    since_seconds: float


@dataclass
class _Engine:
    replica: int
    started_seconds: float = -math.inf
    sampled_seconds: float = -math.inf
    tokens: float = -math.inf


@dataclass
class _Pod:
    engines: dict[str, _Engine]  # by data-parallel rank, "" while only the stream told of the pod
    heard_seconds: float = -math.inf
    heard_count: int = 0  # hearings of all pods by then


class Pods:
    """The pods of a fleet of so many `configured` replicas. The fleet is handed in, as it may be replaced."""

    def __init__(self, configured: int, silent_seconds: float, most_replicas: int) -> None:
        self._silent_seconds = silent_seconds
        self._most_replicas = most_replicas
        self._pods: OrderedDict[str, _Pod] = OrderedDict()  # the longest silent first
        self._draining: dict[str, _Pod] = {}
        self._spare = list(range(configured))  # that no pod has claimed
        self._heard_count = 0
        self._first_named_seconds = math.nan
        self._pod_of: dict[int, str] = {}

    def replica_of(self, pod: str, rank: str | None = None) -> int | None:
        """The replica that stands for a pod's engine (its first, unless told otherwise); None for one not known."""
        found = self._pods.get(pod) or self._draining.get(pod)
        engines = found.engines if found else {}
        return next((engine.replica for known, engine in engines.items() if rank in (None, known)), None)

    def name_of(self, replica: int) -> str:
        """The pod that a replica stands for; empty where none has claimed it."""
        return self._pod_of.get(replica, "")

    def names(self) -> dict[int, str]:
        """Pods by replica."""
        return dict(self._pod_of)

    def serve(self, fleet: Fleet, time_seconds: float, pod: str) -> int:
        """The replica that a request for this pod goes to: of several ranks the least loaded. -1: the router decides.

        That is so where there are too many pods to mirror another.
        """
        found = self._hear(fleet, time_seconds, pod, "")
        if found is None:
            return -1
        if len(found.engines) == 1:
            return next(iter(found.engines.values())).replica
        replicas = fleet.state.replicas
        load = replicas["running"] + replicas["waiting"] + replicas["loading"]
        return min((engine.replica for engine in found.engines.values()), key=lambda number: (load[number], number))

    def ended(self, time_seconds: float, replica: int) -> None:
        """A request ended on this replica."""
        pod = self._pods.get(self._pod_of.get(replica, ""))
        if pod is not None:
            self._touch(time_seconds, self._pod_of[replica], pod)

    def sighted(self, fleet: Fleet, seen: PodSeen) -> Restart | None:
        """Take in what metrics say of a pod. Tells if it restarted."""
        known = self._pods.get(seen.pod)
        if known and seen.rank in known.engines and known.engines[seen.rank].sampled_seconds >= seen.time_seconds:
            return None  # told before
        pod = self._hear(fleet, seen.time_seconds, seen.pod, seen.rank)
        if pod is None:
            return None
        if seen.rank not in pod.engines:
            if "" in pod.engines:
                pod.engines[seen.rank] = pod.engines.pop("")
            elif not self._add(fleet, seen.pod, pod, seen.rank):
                return None
        engine = pod.engines[seen.rank]
        restart = None
        if math.isfinite(engine.started_seconds) and math.isfinite(seen.started_seconds):
            if seen.started_seconds > engine.started_seconds + RESTART_SECONDS:
                restart = Restart(engine.replica, seen.started_seconds)
        elif math.isfinite(seen.tokens) and seen.tokens < engine.tokens:
            restart = Restart(engine.replica, engine.sampled_seconds)
        engine.started_seconds = max(engine.started_seconds, seen.started_seconds)
        engine.sampled_seconds = seen.time_seconds
        engine.tokens = seen.tokens
        return restart

    def drain_the_silent(self, fleet: Fleet, time_seconds: float) -> None:
        """Drain pods that are silent while others are heard, and forget those that have stopped."""
        around = HEARD_AROUND * len(self._pods)
        while self._pods:
            name, pod = next(iter(self._pods.items()))
            if self._heard_count - pod.heard_count < around or self._spoke_within(time_seconds, pod.heard_seconds):
                break
            self._draining[name] = self._pods.pop(name)
            for engine in pod.engines.values():
                fleet.dismiss(engine.replica)
        if (
            self._spare
            and self._heard_count >= around
            and not self._spoke_within(time_seconds, self._first_named_seconds)
        ):
            for replica in self._spare:
                fleet.dismiss(replica)
            self._spare = []
        if self._draining:
            fleet.retire()
            self._forget_the_stopped(fleet)

    def copy(self) -> Pods:
        """An independent one."""
        twin = Pods(0, self._silent_seconds, self._most_replicas)
        twin.restore(self.save())
        return twin

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "pods": [[name, asdict(pod)] for name, pod in self._pods.items()],
            "draining": [[name, asdict(pod)] for name, pod in self._draining.items()],
            "spare": list(self._spare),
            "heard_count": self._heard_count,
            "first_named_seconds": self._first_named_seconds,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        self._pods = OrderedDict((name, _pod_of(pod)) for name, pod in saved["pods"])
        self._draining = {name: _pod_of(pod) for name, pod in saved["draining"]}
        self._spare = list(saved["spare"])
        self._heard_count = saved["heard_count"]
        self._first_named_seconds = saved["first_named_seconds"]
        self._pod_of = {
            replica: name for name, pod in [*self._pods.items(), *self._draining.items()] for replica in _replicas(pod)
        }

    def _forget_the_stopped(self, fleet: Fleet) -> None:
        """Engines whose replicas have stopped: each place may be another pod's by the time its own speaks again."""
        for name, pod in list(self._draining.items()):
            for rank, engine in list(pod.engines.items()):
                if not fleet.has(engine.replica):
                    del pod.engines[rank], self._pod_of[engine.replica]
            if not pod.engines:
                del self._draining[name]

    def _spoke_within(self, time_seconds: float, heard_seconds: float) -> bool:
        return not time_seconds - heard_seconds > self._silent_seconds

    def _hear(self, fleet: Fleet, time_seconds: float, name: str, rank: str) -> _Pod | None:
        """The pod, which joins if it is new. None where there are too many."""
        pod = self._pods.get(name)
        if self._draining:
            self._forget_the_stopped(fleet)
        if pod is None and name in self._draining:
            pod = self._pods[name] = self._draining.pop(name)
            for replica in _replicas(pod):
                fleet.recall(replica)
        if pod is None:
            pod = _Pod({})
            if not self._add(fleet, name, pod, rank):
                return None
            self._pods[name] = pod
            if math.isnan(self._first_named_seconds):
                self._first_named_seconds = time_seconds
        self._touch(time_seconds, name, pod)
        return pod

    def _touch(self, time_seconds: float, name: str, pod: _Pod) -> None:
        self._heard_count += 1
        pod.heard_seconds, pod.heard_count = time_seconds, self._heard_count
        self._pods.move_to_end(name)

    def _add(self, fleet: Fleet, name: str, pod: _Pod, rank: str) -> bool:
        """A replica for another engine of a pod. Returns whether there is room for it."""
        if self._spare:
            replica = self._spare.pop(0)
        elif fleet.replicas_alive < self._most_replicas:
            replica = fleet.admit()
        else:
            return False
        pod.engines[rank] = _Engine(replica)
        self._pod_of[replica] = name
        return True


def _replicas(pod: _Pod) -> list[int]:
    return [engine.replica for engine in pod.engines.values()]


def _pod_of(saved: dict[str, Any]) -> _Pod:
    return _Pod(**{**saved, "engines": {rank: _Engine(**engine) for rank, engine in saved["engines"].items()}})
