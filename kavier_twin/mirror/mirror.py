"""The mirror: one pool's fleet, simulated in step with all that is known to have happened to it.

Every event has its place in a timeline, wherever and however late it comes from. The state is folded over the events
in order (`fold.Fold`). Forks of it are kept; when an event comes late, the newest fork before it is taken up again and
folded once more. So the state is a function of the set of events, bit for bit, as long as none is later than
`late_seconds`. What was predicted first is what is compared with reality (`evidence.Evidence`).

The fold stands a moment behind the newest event, so that most events are in order when they are applied. What the
fleet looks like now is seen on a fork (`present`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Final

from kavier_twin.mirror.answers import Answers
from kavier_twin.mirror.applied import Applied
from kavier_twin.mirror.calibration.online import Change
from kavier_twin.mirror.calibration.requests import Calibration
from kavier_twin.mirror.evidence import JUDGE_EVERY_SECONDS, Evidence
from kavier_twin.mirror.fidelity.doubts import Doubts
from kavier_twin.mirror.fidelity.gauges import KEPT_SECONDS, Gauges
from kavier_twin.mirror.fidelity.trust import Judge
from kavier_twin.mirror.fidelity.windows import Windows, WindowScore
from kavier_twin.mirror.fold import Fold
from kavier_twin.mirror.fold import MirrorSettings as MirrorSettings
from kavier_twin.mirror.phantoms import Delays, EngineLoad, between, key_of, requests_inside, take_over
from kavier_twin.mirror.pods import Pods
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.mirror.timeline import Adopted, Fitted, Timeline
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.kpis import Counters
from kavier_twin.simulation.policies import Override, apply_overrides
from kavier_twin.simulation.settings import FleetSettings, StepTime
from kavier_twin.simulation.state import state_bytes
from kavier_twin.telemetry import (
    CarbonSample,
    EngineSample,
    GpuSample,
    KvEventBatch,
    RequestFinished,
    RequestRecord,
    RequestSeen,
    TelemetryRecord,
)

FORK_EVERY_SECONDS: Final = 5
COVERAGE_SECONDS: Final = 60.0  # over which arrivals by records and by engines' counters are compared
COVERAGE_LAG_SECONDS: Final = 60.0  # that records may take until they are missed
_KEPT_EVERY_SECONDS: Final = ((30.0, 5.0), (120.0, 15.0), (math.inf, 60.0))  # up to an age, forks of these multiples
MOST_FORK_BYTES: Final = 512 * 2**20
FEWEST_FORKS: Final = 3


class Mirror:
    """Keeps one pool's fleet in step. Not thread-safe: the daemon serialises calls."""

    def __init__(
        self,
        settings: MirrorSettings,
        fleet: FleetSettings,
        *,
        calibrated: bool = False,
        frontend_seconds: float = 0.0,
    ) -> None:
        self.settings = settings
        self.configured = fleet
        self.fold = Fold(settings, fleet, calibrated=calibrated, frontend_seconds=frontend_seconds)
        self.timeline = Timeline(settings.ordering_seconds)
        self.evidence = Evidence(settings.bucket_seconds, settings.trust)
        self.folded_again = 0  # times
        self.delays = Delays()
        self.answers = Answers()
        self._forks: list[tuple[float, Fold]] = [(-math.inf, self.fold.fork())]  # by time, oldest first
        self._looks_ahead = False

    # --- taking records in ----------------------------------------------------------------------------------------

    def ingest(self, record: TelemetryRecord) -> None:
        """Take one record in; what became of it is counted in `ingested`."""
        counts = self.evidence.counts
        if isinstance(record, EngineSample):
            self.gauges.offer(record)
            self._expect(record)
        if isinstance(record, RequestSeen):
            self.delays.add(self.timeline.clock_seconds, record.time_seconds)
        if isinstance(record, EngineSample | CarbonSample):
            self.timeline.observe(record)
            counts["accepted"] += 1
        elif isinstance(record, GpuSample):  # observed beside the simulation
            counts["accepted"] += 1
        elif isinstance(record, KvEventBatch):
            counts["accepted"] += 1
            for ended in self.answers.take(record):
                self.timeline.offer(ended)
        elif isinstance(record, RequestRecord):
            self._offer(record.seen())
            finished = record.finished()
            if finished is not None and finished.time_seconds - record.time_seconds > self.settings.give_up_seconds:
                counts["future_time"] += 1  # it would have been given up by then
            elif finished is not None:
                self._offer(finished, foretold=True)
        else:
            self._offer(record)

    def _offer(self, record: RequestSeen | RequestFinished, *, foretold: bool = False) -> None:
        """Put it in its place; what KV events tell of an answer completes its end."""
        ended = None
        if isinstance(record, RequestSeen):
            ended = self.answers.seen(record)
        else:
            record = self.answers.finished(record)
        self.ingested.update(self.timeline.offer(record, foretold=foretold))
        if ended is not None:
            self.timeline.offer(ended)

    def advance(self, now_seconds: float | None = None, *, go_back: bool = True) -> list[Applied]:
        """Apply what is due. `now_seconds` (event time) lets time pass where no record comes.

        Unless told to `go_back`, events that came late wait for a later call. Returns what was applied.
        """
        if self._looks_ahead:
            self._look_ahead_to(self.timeline.watermark_seconds if now_seconds is None else now_seconds)
            return []
        if now_seconds is not None:
            self.evidence.counts.update(self.timeline.pass_to(now_seconds))
        if go_back and self.timeline.dirty_seconds < math.inf:
            self._go_back()
        self._fold_to(self.timeline.watermark_seconds, whole=now_seconds is not None)
        self._forget()
        return self.evidence.take_applied()

    def end(self) -> list[Applied]:
        """Apply all that was taken in: no record will ever come. Returns what was applied."""
        last = self.timeline.last_seconds
        if not math.isfinite(last):
            return []
        self.evidence.counts.update(self.timeline.confirm())
        if self.timeline.dirty_seconds < math.inf:
            self._go_back()
        self._fold_to(self.timeline.last_seconds, whole=False)
        return self.evidence.take_applied()

    def adopt(self, overrides: Mapping[str, Override]) -> None:
        """The engines turned out to be set so. Raises PolicyError for what cannot be."""
        settings = apply_overrides(self.fold.fleet.settings, overrides)
        if math.isfinite(self.time_seconds):
            self.timeline.put(Adopted(self.time_seconds, dict(overrides)))
            self._fold_to(self.time_seconds, whole=False)
        else:
            self.fold.fleet = Fleet(settings, start_seconds=-math.inf)
            self._forks = [(-math.inf, self.fold.fork())]

    def use(self, step_time: StepTime, frontend_seconds: float, calibration: Calibration | None = None) -> None:
        """Go on with these coefficients, which were fitted outside."""
        if math.isfinite(self.time_seconds):
            self.timeline.put(Fitted(self.time_seconds, step_time, frontend_seconds, calibration))
            self._fold_to(self.time_seconds, whole=False)
        else:
            self.fold.calibration = calibration
            self.fold.use(step_time, frontend_seconds)
            self._forks = [(-math.inf, self.fold.fork())]

    def fork(self) -> Mirror:
        """A copy that can be moved on to the present without a trace in this one. It takes no records in."""
        twin = copy(self)
        twin.fold, twin.timeline = self.fold.fork(looks_ahead=True), self.timeline.fork()
        twin._forks, twin._looks_ahead = [], True
        return twin

    def present(self, now_seconds: float) -> Mirror:
        """A fork as of now: with the events that are still waited with."""
        twin = self.fork()
        for engine, load in self.fold.loads.items():
            newest = self.timeline.newest(load.last)
            recorded = self.timeline.recorded(engine[1], load.last.time_seconds, newest.time_seconds)
            twin.fold.expect(now_seconds, self.delays, newest, load.live + recorded.arrivals - recorded.ends)
        twin._look_ahead_to(now_seconds)
        return twin

    # --- what can be seen -----------------------------------------------------------------------------------------

    @property
    def fleet(self) -> Fleet:
        """The simulated fleet."""
        return self.fold.fleet

    @property
    def pods(self) -> Pods:
        """Which replica stands for which pod."""
        return self.fold.pods

    @property
    def time_seconds(self) -> float:
        """Event time the mirror stands at; -inf before the first record."""
        return self.fold.time_seconds

    @property
    def newest_seconds(self) -> float:
        """Event time of the newest record of a request taken in."""
        return self.timeline.newest_seconds

    @property
    def buffered(self) -> int:
        """Events taken in and not yet applied."""
        return self.timeline.buffered

    @property
    def ingested(self) -> Counter[str]:
        """Records by result."""
        return self.evidence.counts

    @property
    def beside(self) -> Callable[[Fleet], None] | None:
        """Gets the fleet before its first request and at every second."""
        return self.evidence.beside

    @beside.setter
    def beside(self, look: Callable[[Fleet], None] | None) -> None:
        self.evidence.beside = look

    @property
    def windows(self) -> Windows:
        """Predictions compared with what was observed, by minute."""
        return self.evidence.windows

    @property
    def gauges(self) -> Gauges:
        """What engines said of themselves beside the mirror."""
        return self.evidence.gauges

    @property
    def judge(self) -> Judge:
        """What is to be trusted."""
        return self.evidence.judge

    @property
    def doubts(self) -> Doubts:
        """What takes trust at once."""
        return self.evidence.doubts

    @property
    def scores(self) -> tuple[WindowScore, ...]:
        """All errors as of the last judgement."""
        return self.evidence.scores

    @property
    def finished(self) -> int:
        """Requests that ended."""
        return self.fold.finished

    @property
    def calibration(self) -> Calibration | None:
        """The last fit of step times."""
        return self.fold.calibration

    @property
    def calibrated(self) -> bool:
        """Whether step times were fitted or given."""
        return self.fold.calibrated

    @property
    def frontend_seconds(self) -> float:
        """Time from a request's arrival until the engine's scheduler sees it."""
        return self.fold.frontend_seconds

    @property
    def calibrated_seconds(self) -> float:
        """Event time of the last fit, in Unix seconds for live sources."""
        return self.fold.calibrated_seconds

    @property
    def calibration_failures(self) -> Mapping[str, int]:
        """Fits that could not be made, by reason."""
        failures = self.fold.calibration_failures
        return {"too_few_latencies": failures} if failures else {}

    @property
    def speed_changes(self) -> int:
        """Jumps of the fleet's speed that calibration met."""
        return self.fold.speed_changes

    @property
    def last_change(self) -> Change | None:
        """The last of them."""
        return self.fold.last_change

    @property
    def pace(self) -> float:
        """How much longer the real engine's steps last than the coefficients say (1: as long)."""
        return self.fold.pace.factor

    def counters(self) -> Counters:
        """Cumulative counts of the mirrored fleet."""
        return self.fold.counters()

    def load(self) -> tuple[int, int, float]:
        """Running and waiting requests and KV usage (0..1) of the mirrored fleet now."""
        return self.fold.load()

    def snapshot(self) -> Snapshot | None:
        """A fork for the forecaster; None before the first record."""
        return self.fold.snapshot()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def kept_fork(self, most_events: int) -> tuple[float, Fold]:
        """The oldest kept fork with at most so many events since, or the newest. It must not be changed."""
        for time_seconds, fold in self._forks:
            if self.timeline.events_since(time_seconds) <= most_events:
                return time_seconds, fold
        return self._forks[-1]

    def resume(self, fold: Fold, fork_seconds: float, reached_seconds: float) -> None:
        """Go on from a kept fork and the restored events since it."""
        self.fold, self._forks = fold, [(fork_seconds, fold.fork())]
        self.timeline.go_back(fork_seconds)
        self._fold_to(reached_seconds, whole=True)

    # --- folding --------------------------------------------------------------------------------------------------

    def _fold_to(self, until_seconds: float, *, whole: bool) -> None:
        """Apply the events up to a time, and with `whole` let the whole seconds up to it pass."""
        made_up = self.fold.made_up
        while True:
            entry = self.timeline.due(until_seconds)
            if made_up and made_up[0][0] <= min(until_seconds, math.inf if entry is None else entry.time_seconds):
                self._pass_to(made_up[0][0])
                self.fold.apply_made_up()
                continue
            if entry is None:
                break
            self._pass_to(entry.time_seconds)
            self.timeline.position += 1
            event = entry.event
            if not self.timeline.is_refused(event):
                self.fold.apply(entry, None if self._looks_ahead else self.evidence)
            elif isinstance(event, RequestFinished) and not self._looks_ahead:
                self.evidence.refused(entry)
            if self.settings.phantoms and isinstance(event, EngineSample) and requests_inside(event) is not None:
                self._follow(event)
        if whole and math.isfinite(self.time_seconds):
            self._pass_to(until_seconds)
        self.timeline.applied(self.time_seconds)

    def _look_ahead_to(self, now_seconds: float) -> None:
        self.timeline.pass_to(now_seconds)
        self._fold_to(now_seconds, whole=True)
        if now_seconds > self.time_seconds > -math.inf:
            self.fold.run_to(now_seconds)

    def _pass_to(self, time_seconds: float) -> None:
        """Let the whole seconds up to a time pass."""
        fold, evidence = self.fold, None if self._looks_ahead else self.evidence
        if not math.isfinite(fold.time_seconds):
            fold.start(time_seconds)
            if evidence is not None:
                evidence.began(fold.fleet)
        last = math.floor(time_seconds)
        second = math.floor(fold.time_seconds) + 1
        while second <= last:
            if fold.idle and second < last - KEPT_SECONDS:
                second = last - KEPT_SECONDS  # of a long silence, as much as gauges are remembered
            fold.tick(second, evidence)
            if evidence is not None:
                evidence.look(second, fold.fleet, fold.load())
                if second % JUDGE_EVERY_SECONDS == 0 and self.settings.phantoms:
                    begin = second - COVERAGE_LAG_SECONDS - COVERAGE_SECONDS
                    evidence.doubts.arrivals(*self.timeline.arrivals(begin, second - COVERAGE_LAG_SECONDS))
                if second % FORK_EVERY_SECONDS == 0:
                    self._keep_fork(second)
            second += 1

    def _follow(self, sample: EngineSample) -> None:
        """Make up what no record tells of until the engine's next sample, as far as that is there."""
        fold, engine = self.fold, key_of(sample)
        before = fold.loads.get(engine)
        if self._looks_ahead:
            fold.agree(sample)
        elif before is not None and before.made_up_until < sample.time_seconds:
            recorded = self.timeline.recorded(engine[1], before.last.time_seconds, sample.time_seconds)
            interval = between(before, sample, recorded, fold.phantoms_of(engine))
            if not interval.empty:  # the sample was not there yet when the one before it was applied
                self.timeline.fold_again_from(before.last.time_seconds)
            take_over(before, sample, interval)
        load = EngineLoad(sample, fold.live_of(engine)) if before is None else replace(before, last=sample)
        load.live = fold.live_of(engine)
        fold.loads[engine] = load
        following = self.timeline.following(sample)
        if following is not None:
            recorded = self.timeline.recorded(engine[1], sample.time_seconds, following.time_seconds)
            fold.make_up(load, following, recorded)

    def _expect(self, sample: EngineSample) -> None:
        """Fold again with what a new sample tells of the time since the last one of its engine, if records do not."""
        engine = key_of(sample)
        before = self.fold.loads.get(engine)
        if before is None or not before.made_up_until < sample.time_seconds > before.last.time_seconds:
            return
        recorded = self.timeline.recorded(engine[1], before.last.time_seconds, sample.time_seconds)
        if not between(before, sample, recorded, self.fold.phantoms_of(engine)).empty:
            self.timeline.fold_again_from(before.last.time_seconds)

    def _go_back(self) -> None:
        """Fold again from before the earliest event that came late."""
        dirty = self.timeline.dirty_seconds
        while len(self._forks) > 1 and self._forks[-1][0] > dirty:
            self._forks.pop()
        time_seconds, kept = self._forks[-1]
        reached = self.time_seconds
        self.fold = kept.fork()
        self.timeline.go_back(time_seconds)
        self.folded_again += 1
        self._fold_to(reached, whole=True)

    def _keep_fork(self, second: float) -> None:
        """Keep a fork, and fewer of the older ones, as far back as events may be late or wait to be folded again."""
        kept = [(second, self.fold.fork())]
        oldest = min(second - self.settings.late_seconds, self.timeline.dirty_seconds)
        for time, fold in reversed(self._forks):
            every = next(every for age, every in _KEPT_EVERY_SECONDS if second - time <= age)
            if not math.isfinite(time) or time % every == 0.0:
                kept.append((time, fold))
            if time <= oldest:
                break
        most = max(FEWEST_FORKS, MOST_FORK_BYTES // max(1, state_bytes(self.fleet.state)))
        self._forks = kept[:most][::-1]

    def _forget(self) -> None:
        """What lies before every fork cannot change any more."""
        for entry in self.timeline.forget(self._forks[0][0]):
            self.evidence.forgotten(entry)
