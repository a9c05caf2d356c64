"""What the mirror has shown and what reality said of it: errors, trust, and the account of what was applied.

The mirror folds parts of the past again when a record comes late. Evidence is not folded again: what was predicted
first is what is compared, and what was handed on once is not handed on again.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, Final

from kavier_twin.mirror.applied import Applied, Arrived, Dropped, Ended, GivenUp, Restarted, Sized
from kavier_twin.mirror.fidelity.doubts import Doubts
from kavier_twin.mirror.fidelity.gauges import Gauges
from kavier_twin.mirror.fidelity.trust import Judge, TrustSettings
from kavier_twin.mirror.fidelity.windows import Windows, WindowScore
from kavier_twin.mirror.lengths import Simulated
from kavier_twin.mirror.timeline import Entry
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.telemetry import RequestFinished, RequestSeen

JUDGE_EVERY_SECONDS: Final = 10
_REMEMBERED: Final = 10_000  # requests that ended without a record


class Evidence:
    """Collects what is compared and handed on while a fold moves on."""

    def __init__(self, bucket_seconds: float, trust: TrustSettings) -> None:
        self.windows = Windows(bucket_seconds)
        self.gauges = Gauges()
        self.judge = Judge(trust)
        self.doubts = Doubts(trust.max_error)
        self.scores: tuple[WindowScore, ...] = ()  # as of the last judgement
        self.counts: Counter[str] = Counter()  # records by result
        self.applied: list[Applied] = []  # since they were last taken
        # Gets the fleet before its first request and at every second.
        self.beside: Callable[[Fleet], None] | None = None
        self._looked_seconds = -math.inf
        self._without_record: OrderedDict[str, None] = OrderedDict()  # requests given up or dropped

    def take_applied(self) -> list[Applied]:
        """What was applied since this was last asked."""
        taken, self.applied = self.applied, []
        return taken

    def began(self, fleet: Fleet) -> None:
        """The fleet begins."""
        if self.beside is not None:
            self.beside(fleet)

    def look(self, second: int, fleet: Fleet, load: tuple[int, int, float]) -> None:
        """At every whole second: gauges beside what engines reported, and now and then what all errors amount to."""
        replicas = int(fleet.state.replicas["alive"].sum())
        self.gauges.record(second, load, replicas)
        if second <= self._looked_seconds:
            return
        self._looked_seconds = second
        self.applied.append(Sized(float(second), replicas))
        pairs = self.gauges.due(second)
        for pair in pairs:
            self.windows.add(pair.kpi, pair.time_seconds, pair.mirrored, pair.observed)
        self.doubts.gauges(pairs)
        self.doubts.records(second, self.counts)
        if self.beside is not None:
            self.beside(fleet)
        if second % JUDGE_EVERY_SECONDS == 0:
            self.scores = self.windows.scores(second)
            self.judge.judge(self.scores)

    def count(self, entry: Entry, result: str) -> None:
        """Count what became of a record, once."""
        if not entry.counted:
            entry.counted = True
            self.counts[result] += 1

    def arrived(self, entry: Entry, seen: RequestSeen, replica: int) -> None:
        """A request is under way on a replica."""
        if not entry.booked:
            entry.booked = True
            self.applied.append(Arrived(seen.id, seen.time_seconds, seen, replica))

    def ended(
        self,
        entry: Entry,
        finished: RequestFinished,
        seen: RequestSeen | None,
        simulated: Simulated | None,
        frontend_seconds: float,
    ) -> None:
        """The record of an end was applied; a request of which nothing is remembered tells nothing."""
        if not entry.booked:
            entry.booked = True
            if finished.id in self._without_record:
                del self._without_record[finished.id]
                self.counts["ended_after_all"] += 1
            cached = None if simulated is None else simulated.cached_tokens
            if seen is not None:
                self.applied.append(Ended(seen.time_seconds, seen.prompt_tokens, finished, cached))
            elif simulated is not None:
                self.applied.append(Ended(simulated.arrival, simulated.prompt_tokens, finished, cached))
            else:
                self.applied.append(Dropped(finished.id))
        if not entry.scored and seen is not None and simulated is not None:
            entry.scored = True
            self._score(seen, finished, simulated, frontend_seconds)

    def refused(self, entry: Entry) -> None:
        """The record tells that no engine took the request."""
        if not entry.booked and isinstance(entry.event, RequestFinished):
            entry.booked = True
            self.counts["refused"] += 1
            self.applied.append(Dropped(entry.event.id))

    def given_up(self, event: GivenUp) -> None:
        """A request ended without a record."""
        if self._end_without_record(event.id):
            self.counts["never_finished"] += 1
            self.applied.append(event)

    def dropped(self, event: Dropped, reason: str) -> None:
        """A request is gone, and did not end."""
        if self._end_without_record(event.id):
            if reason:
                self.counts[reason] += 1
            self.applied.append(event)

    def restarted(self, event: Restarted) -> None:
        """A replica lost its cache."""
        self.applied.append(event)

    def forgotten(self, entry: Entry) -> None:
        """An event is so old that nothing can change it any more."""
        if isinstance(entry.event, RequestFinished) and not entry.booked:
            self.count(entry, "unknown_request")

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "windows": self.windows.save(),
            "gauges": self.gauges.save(),
            "judge": self.judge.save(),
            "scores": [astuple(score) for score in self.scores],
            "counts": dict(self.counts),
            "looked_seconds": self._looked_seconds,
            "without_record": list(self._without_record),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        self.windows.restore(saved["windows"])
        self.gauges.restore(saved["gauges"])
        self.judge.restore(saved["judge"])
        self.scores = tuple(WindowScore(*score) for score in saved["scores"])
        self.counts = Counter(saved["counts"])
        self._looked_seconds = saved["looked_seconds"]
        self._without_record = OrderedDict.fromkeys(saved["without_record"])

    def _end_without_record(self, identity: str) -> bool:
        if identity in self._without_record:
            return False
        self._without_record[identity] = None
        if len(self._without_record) > _REMEMBERED:
            self._without_record.popitem(last=False)
        return True

    def _score(
        self, seen: RequestSeen, finished: RequestFinished, simulated: Simulated, frontend_seconds: float
    ) -> None:
        """Predictions as they stood before this record, beside what it says."""
        arrival, time = simulated.arrival, finished.time_seconds
        ttft = simulated.first_token - arrival
        finish = predicted_finish(simulated, finished.output_tokens)
        if finished.ttft_seconds is not None:
            self.windows.add("ttft_seconds", time, ttft, finished.ttft_seconds)
        if finished.e2e_seconds is not None:
            self.windows.add("e2e_seconds", time, finish - arrival, finished.e2e_seconds)
        if finished.ttft_seconds is not None and finished.e2e_seconds is not None and finished.output_tokens > 1:
            decode_seconds = finished.e2e_seconds - finished.ttft_seconds
            tokens = finished.output_tokens - 1
            self.windows.add("tpot_seconds", time, (finish - arrival - ttft) / tokens, decode_seconds / tokens)
        if finished.queue_seconds is not None:
            queue = simulated.scheduled - arrival - frontend_seconds  # as vLLM, which counts within the engine
            self.windows.add("queue_seconds", time, queue, finished.queue_seconds)
        if finished.cached_tokens is not None and simulated.cached_tokens is not None:
            cached, prompt = simulated.cached_tokens, seen.prompt_tokens
            self.windows.add("prefix_cache_hit_ratio", time, cached, finished.cached_tokens, prompt)
        self.windows.add_end(finish, time, finished.output_tokens)


def predicted_finish(simulated: Simulated, output_tokens: int) -> float:
    """When the simulation would have ended a request of this length, at the pace it gave the request so far."""
    first, generated = simulated.first_token, simulated.generated_tokens
    if not math.isfinite(first):
        return math.nan
    if generated < 2:
        return max(first, simulated.at) if output_tokens > 1 else first
    return first + (output_tokens - 1) * (simulated.at - first) / (generated - 1)
