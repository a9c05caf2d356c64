"""The mirror: one pool's fleet, simulated in step with the stream of its requests.

A request seen is pushed into the simulated fleet, held: only its finish record ends it. What the simulation said until
then (TTFT, end, queue, prefix hits) is scored against the record before the record corrects the simulation, so every
error is that of a prediction. Output lengths are unknown until the end and no decision uses them.

The mirror is a function of the records and their order, bit for bit: no clock moves it. What it looks like now, where
the last record is some time ago, is seen on a fork.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Final

import numpy as np

from kavier_twin.simulation.fleet import Fleet, Live
from kavier_twin.simulation.kpis import Counters
from kavier_twin.simulation.policies import Override, apply_overrides
from kavier_twin.simulation.settings import FleetSettings, StepTime
from kavier_twin.simulation.state import FREE, WAITING
from kavier_twin.simulation.workload import Workload, covered_tokens, make_workload, workload_of
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
from kavier_twin.twin.calibration import MINIMUM_REQUESTS, Calibration, CalibrationError, Observed, calibrate
from kavier_twin.twin.fidelity import Fidelity
from kavier_twin.twin.gauges import KEPT_SECONDS, Gauges
from kavier_twin.twin.lengths import Lengths, Simulated
from kavier_twin.twin.online import Change, Online, Row
from kavier_twin.twin.pace import Pace
from kavier_twin.twin.pods import Pods, PodSeen
from kavier_twin.twin.rate_history import RateHistory
from kavier_twin.twin.snapshot import Snapshot
from kavier_twin.twin.stream import MAX_JUMP_SECONDS, OrderedStream
from kavier_twin.twin.trust import DEFAULT_TRUST, Judge, TrustSettings
from kavier_twin.twin.windows import BUCKET_SECONDS, Windows, WindowScore

JUDGE_EVERY_SECONDS: Final = 10


@dataclass(frozen=True)
class MirrorSettings:
    """How a pool is mirrored. Times in seconds of event time."""

    pool: str = "default"
    lateness_seconds: float = 2.0
    recent_seconds: float = 1_800.0
    recent_requests: int = 5_000
    calibrate_after_requests: int = 100
    recalibrate_every_requests: int = 50
    prior: StepTime | None = None  # where calibration stays unless the stream says otherwise (`fit`)
    floor: StepTime | None = None  # what it cannot go below
    longest_hold_seconds: float = 0.1  # that a replica waits which was ahead of an end
    give_up_seconds: float = 3_600.0  # a request without a finish record for so long is dropped
    pod_silent_seconds: float = 300.0  # a pod of which nothing is heard for so long, while others are, leaves
    most_replicas: int = 256  # pods beyond are not mirrored, which bounds the memory
    trust: TrustSettings = DEFAULT_TRUST
    bucket_seconds: float = BUCKET_SECONDS  # what the last hour is told in


@dataclass(frozen=True)
class Seen:
    """What is remembered of a request while it is recent."""

    seen: RequestSeen
    finished: RequestFinished | None = None


class Mirror:
    """Keeps one pool's fleet in step. Not thread-safe: the daemon serialises calls."""

    def __init__(self, settings: MirrorSettings, fleet: FleetSettings, *, calibrated: bool = False) -> None:
        self.settings = settings
        self.fleet = Fleet(fleet, start_seconds=-math.inf)
        self.fidelity = Fidelity()
        self.windows = Windows(settings.bucket_seconds)
        self.gauges = Gauges()
        self.judge = Judge(settings.trust)
        self.scores: tuple[WindowScore, ...] = ()  # as of the last judgement
        self.calibration: Calibration | None = None
        self.calibrated = calibrated
        self.frontend_seconds = 0.0
        self.ingested: Counter[str] = Counter()  # records by result
        self.finished = 0
        # Gets the fleet before its first request and at every second; not that of a fork.
        self.beside: Callable[[Fleet], None] | None = None
        self.configured = fleet
        self.pods = Pods(fleet.replicas, settings.pod_silent_seconds, settings.most_replicas)
        self._stream = OrderedStream(settings.lateness_seconds)
        self._recent: dict[str, Seen] = {}  # by id, oldest first
        self._running: dict[str, Live] = {}
        self._next_index = 0
        self._lengths = Lengths()
        self._finished_at_calibration = 0
        self.calibrated_seconds = math.nan  # event time of the last calibration
        self.calibration_failures: Counter[str] = Counter()  # by reason
        self.speed_changes = 0  # jumps of the fleet's speed that calibration met
        self.last_change: Change | None = None
        self._online = Online()
        self._pace = Pace(fleet.step_time)
        self._arrivals = RateHistory()
        self._is_fork = False

    # --- taking records in ----------------------------------------------------------------------------------------

    def ingest(self, record: TelemetryRecord) -> None:
        """Take one record in; what became of it is counted in `ingested`."""
        if isinstance(record, EngineSample):
            if record.pod:
                self._stream.offer_sighting(PodSeen.of(record))
            self.gauges.offer(record)
        if isinstance(record, EngineSample | GpuSample | KvEventBatch):  # observed beside the simulation
            self.ingested["accepted"] += 1
            return
        if isinstance(record, CarbonSample):
            self._take_carbon(record)
            self.ingested["accepted"] += 1
            return
        if isinstance(record, RequestRecord):
            self.ingested.update(self._stream.offer(record.seen()))
            finished = record.finished()
            if finished is not None and finished.time_seconds - record.time_seconds > self.settings.give_up_seconds:
                self.ingested["future_time"] += 1  # it would have been given up by then
            elif finished is not None:
                self.ingested.update(self._stream.offer(finished, foretold=True))
            return
        self.ingested.update(self._stream.offer(record))

    def _take_carbon(self, sample: CarbonSample) -> None:
        """What the grid emits now takes the place of what the settings say, for forecasts from here on."""
        footprint = self.fleet.settings.footprint
        if footprint is not None:
            unix_seconds = footprint.time_zero.timestamp() + sample.time_seconds
            carbon = footprint.carbon.with_point(unix_seconds, sample.gco2_per_kwh)
            footprint = footprint.model_copy(update={"carbon": carbon})
            self.fleet.settings = self.fleet.settings.model_copy(update={"footprint": footprint})

    def advance(self, now_seconds: float | None = None) -> int:
        """Process what is due. `now_seconds` (event time) lets time pass where no record comes. Returns events."""
        if now_seconds is not None:
            self.ingested.update(self._stream.confirm(now_seconds + MAX_JUMP_SECONDS))
            self._stream.raise_floor(now_seconds - self.settings.lateness_seconds)
        events = self._stream.due()
        for event in events:
            self._step_to(event.time_seconds)
            self._drop_the_lost()
            if isinstance(event, RequestSeen):
                self._arrive(event)
            elif isinstance(event, RequestFinished):
                self._finish(event)
            else:
                self._sight(event)
            self.pods.leave_the_silent(self.fleet, self.time_seconds)
        # Only events and the caller's clock move the fleet: where a step is cut must not depend on the order in which
        # records happened to come, lest it round differently.
        if now_seconds is not None and math.isfinite(self.time_seconds):
            self._step_to(self._stream.watermark_seconds)
            self._drop_the_lost()
        return len(events)

    def adopt(self, overrides: Mapping[str, Override]) -> None:
        """The engines turned out to be set so. Raises PolicyError for what cannot be."""
        settings = apply_overrides(self.fleet.settings, overrides)
        if math.isfinite(self.time_seconds):
            self.fleet.apply(overrides)
            self._pace.apply(self.fleet)
        else:
            self.fleet = Fleet(settings, start_seconds=-math.inf)

    def end(self) -> None:
        """Process all that was taken in: no record will ever come."""
        last, lateness = self._stream.last_seconds, self.settings.lateness_seconds
        if math.isfinite(last):
            now = last + lateness
            self.advance(now if now - lateness >= last else math.nextafter(now, math.inf))

    def fork(self) -> Mirror:
        """A copy that can be moved on to the present without a trace in this one.

        It takes no records in, and does not calibrate.
        """
        twin = copy(self)
        twin.fleet = self.fleet.fork()
        twin.fidelity, twin.windows, twin.gauges = self.fidelity.fork(), self.windows.fork(), self.gauges.fork()
        twin.judge = copy(self.judge)
        twin.ingested = Counter(self.ingested)
        twin._stream = self._stream.fork()
        twin._recent, twin._running = self._recent.copy(), self._running.copy()
        twin._pace = self._pace.fork()
        twin._lengths = self._lengths.fork()
        twin._arrivals = self._arrivals.fork()
        twin.pods = self.pods.copy()
        twin._is_fork = True
        twin.beside = None
        return twin

    # --- what can be seen -----------------------------------------------------------------------------------------

    @property
    def time_seconds(self) -> float:
        """Event time the mirror stands at; -inf before the first record."""
        return self.fleet.now_seconds

    @property
    def newest_seconds(self) -> float:
        """Event time of the newest record taken in."""
        return self._stream.newest_seconds

    @property
    def buffered(self) -> int:
        """Records taken in and not yet due."""
        return self._stream.buffered

    @property
    def pace(self) -> float:
        """How much longer the real engine's steps last than the coefficients say (1: as long)."""
        return self._pace.factor

    def counters(self) -> Counters:
        """Cumulative counts of the mirrored fleet."""
        return Counters.of(self.fleet.state, self.fleet.now_seconds)

    def load(self) -> tuple[int, int, float]:
        """Running and waiting requests and KV usage (0..1) of the mirrored fleet now."""
        there = self.fleet.state.replicas["alive"] == 1
        replicas, engines = self.fleet.state.replicas[there], self.fleet.state.engines[there]
        usable = int((engines["num_blocks"] - 1).sum())
        used = usable - int(replicas["free_blocks"].sum())
        return (
            int(replicas["running"].sum()),
            int((replicas["waiting"] + replicas["loading"]).sum()),
            used / max(usable, 1),
        )

    def snapshot(self) -> Snapshot | None:
        """A fork for the forecaster; None before the first record."""
        if not math.isfinite(self.time_seconds):
            return None
        earliest = self.time_seconds - self.settings.recent_seconds
        recent = [entry for entry in self._recent.values() if entry.seen.time_seconds >= earliest]
        start = recent[0].seen.time_seconds if recent else self.time_seconds
        fleet = self.fleet.fork()
        if self.calibrated:  # the pace is of the last seconds only, and partly the mirror's own noise
            self._pace.apply(fleet, 1.0)
        return Snapshot(
            pool=self.settings.pool,
            time_seconds=self.time_seconds,
            fleet=fleet,
            recent=self._numbered(recent),
            recent_seconds=min(self.settings.recent_seconds, max(self.time_seconds - start, 1e-9)),
            frontend_seconds=self.frontend_seconds,
            calibrated=self.calibrated,
            arrivals=self._arrivals.until(self.time_seconds),
            ended_seconds=np.array([e.finished.time_seconds if e.finished else math.nan for e in recent], np.float64),
        )

    def _numbered(self, entries: list[Seen]) -> Workload:
        """Requests as arrays, live ones with their number in the fleet, the others with numbers below zero."""
        index = [
            live.index if (live := self._running.get(entry.seen.id)) is not None else -1 - row
            for row, entry in enumerate(entries)
        ]
        return _workload(entries)._replace(index=np.array(index, np.int64))

    # --- events ---------------------------------------------------------------------------------------------------

    def _step_to(self, time_seconds: float) -> None:
        if not math.isfinite(self.fleet.now_seconds):
            self._start(time_seconds)
        if time_seconds > self.fleet.now_seconds:
            last = math.floor(time_seconds)
            # Of a long silence, as much as gauges are remembered.
            for second in range(max(math.floor(self.time_seconds), last - KEPT_SECONDS) + 1, last + 1):
                self._run_to(second)
                self._look(second)
            self._run_to(time_seconds)

    def _run_to(self, time_seconds: float) -> None:
        self.fleet.run(time_seconds)
        self._extend()

    def _look(self, second: int) -> None:
        """At every second: gauges beside what engines reported, lengths, and now and then what all errors amount to."""
        self.gauges.record(second, self.load(), int(self.fleet.state.replicas["alive"].sum()))
        for pair in self.gauges.due(second):
            self.windows.add(*pair)
        if self.beside is not None:
            self.beside(self.fleet)
        self._look_at_lengths()
        if second % JUDGE_EVERY_SECONDS == 0:
            self.scores = self.windows.scores(second)
            self.judge.judge(self.scores)

    def _start(self, time_seconds: float) -> None:
        self.fleet = Fleet(self.fleet.settings, start_seconds=time_seconds)
        if self.beside is not None:
            self.beside(self.fleet)

    def _extend(self) -> None:
        """Requests that reached the length assumed for them go on: reality has not ended them."""
        if not self.fleet.state.replicas["holding"].any():
            return
        for live in self.fleet.live():
            request = self.fleet.state.requests[live.replica, live.slot]
            if request["tokens"] >= request["prompt"] + request["output"]:
                self.fleet.set_output(live, 2 * int(request["output"]))
        self.fleet.state.replicas["hold_until"] = -np.inf

    def _look_at_lengths(self) -> None:
        """Requests that have run for too long are let go; the others get room in time, so that none has to wait."""
        for identity, live in list(self._running.items()):
            if not self._is_there(live):
                continue
            request = self.fleet.state.requests[live.replica, live.slot]
            generated, limit = int(request["tokens"] - request["prompt"]), self._lengths.limit_tokens(identity)
            if limit is not None and generated >= limit:
                self._let_go(identity, live, limit)
            elif 2 * generated > request["output"]:
                self.fleet.set_output(live, 2 * int(request["output"]))

    def _arrive(self, seen: RequestSeen) -> None:
        self._recent.pop(seen.id, None)  # an id used again
        self._recent[seen.id] = Seen(seen)
        self._arrivals.add(seen.time_seconds)
        if len(self._recent) > self.settings.recent_requests:
            del self._recent[next(iter(self._recent))]
        self._next_index += 1
        replica = self.pods.serve(self.fleet, self.time_seconds, seen.pod) if seen.pod else -1
        if replica < 0 and seen.pod:
            self.ingested["too_many_pods"] += 1
        assumed = self._lengths.assumed_tokens()
        workload = _arrival(seen, assumed, self._next_index, replica)
        delivered = workload._replace(delivered=np.maximum(workload.arrival + self.frontend_seconds, self.time_seconds))
        # The frontend's time passes before the scheduler sees it; events in between have their own turn.
        replica, slot = map(int, self.fleet.deliver(delivered, 0, 1)[0])
        if slot >= 0:
            self._running[seen.id] = Live(self._next_index, replica, slot)

    def _sight(self, seen: PodSeen) -> None:
        """A pod's metrics: one that restarted lost its cache and the requests that it had."""
        restart = self.pods.sighted(self.fleet, seen)
        if restart is None:
            return
        requests = self.fleet.state.requests[restart.replica]
        names = {live.index: name for name, live in self._running.items() if live.replica == restart.replica}
        again = [i for i, n in names.items() if requests[self._running[n].slot]["arrival"] >= restart.since_seconds]
        for live in self.fleet.begin_anew(restart.replica, again):
            self._running[names.pop(live.index)] = live
        for name in names.values():
            del self._running[name]
        self.ingested["replica_restarted"] += len(names)

    def _is_there(self, live: Live) -> bool:
        """Whether it runs: one that grew until the cache could not hold it has ended, and its slot is another's."""
        request = self.fleet.state.requests[live.replica, live.slot]
        return bool(request["state"] != FREE and request["index"] == live.index)

    def _finish(self, finished: RequestFinished) -> None:
        entry = self._recent.get(finished.id)
        live = self._running.pop(finished.id, None)
        let_go = self._lengths.came_after_all(finished.id) if live is None else None
        if live is None and let_go is None and (entry is None or entry.finished is not None):
            self.ingested["unknown_request"] += 1
            return
        self.finished += 1
        self._lengths.ended(finished.output_tokens, late=finished.time_seconds < self.time_seconds)
        if entry is not None:
            self._recent[finished.id] = Seen(entry.seen, finished)
        if let_go is not None:
            self.ingested["ended_after_all"] += 1
            if entry is not None:
                self._score(entry.seen, finished, let_go)
            return
        if live is None or not self._is_there(live):
            self.ingested["not_simulated"] += 1
            return
        self.pods.ended(self.time_seconds, live.replica)
        if entry is None:  # so long ago that its content is forgotten
            self.fleet.finish(live, finished.output_tokens, None, 0)
            self.fleet.collect()
            return
        # Without a pod's name the router decided, perhaps not as the real one did.
        placed = bool(entry.seen.pod) or self.fleet.state.replicas.size == 1
        self._score(entry.seen, finished, self._simulated(live))
        self._correct(entry.seen, finished, live, placed=placed)
        self._pace.apply(self.fleet)
        self.fleet.collect()
        self._maybe_calibrate(placed=placed)

    def _simulated(self, live: Live) -> Simulated:
        """What was simulated of a request until now."""
        request = self.fleet.state.requests[live.replica, live.slot]
        return Simulated(
            at=self.time_seconds,
            arrival=float(request["arrival"]),
            scheduled=float(request["scheduled"]),
            first_token=float(request["first_token"]),
            generated_tokens=int(request["tokens"] - request["prompt"]),
            cached_tokens=int(request["cached"]) if request["state"] not in (FREE, WAITING) else None,
        )

    def _score(self, seen: RequestSeen, finished: RequestFinished, simulated: Simulated) -> None:
        """Predictions as they stood before this record, beside what it says."""
        arrival, time = simulated.arrival, finished.time_seconds
        ttft = simulated.first_token - arrival
        finish = _predicted_finish(simulated, finished.output_tokens)
        if finished.ttft_seconds is not None:
            self._pair("ttft_seconds", time, ttft, finished.ttft_seconds)
        if finished.e2e_seconds is not None:
            self._pair("e2e_seconds", time, finish - arrival, finished.e2e_seconds)
        if finished.ttft_seconds is not None and finished.e2e_seconds is not None and finished.output_tokens > 1:
            decode_seconds = finished.e2e_seconds - finished.ttft_seconds
            tokens = finished.output_tokens - 1
            self.windows.add("tpot_seconds", time, (finish - arrival - ttft) / tokens, decode_seconds / tokens)
        if finished.queue_seconds is not None:
            self._pair("queue_seconds", time, simulated.scheduled - arrival, finished.queue_seconds)
        if finished.cached_tokens is not None and simulated.cached_tokens is not None:
            cached, prompt = simulated.cached_tokens, seen.prompt_tokens
            self.fidelity.add_cache(cached, finished.cached_tokens, prompt)
            self.windows.add("prefix_cache_hit_ratio", time, cached, finished.cached_tokens, prompt)
        self.windows.add_end(finish, time, finished.output_tokens)

    def _pair(self, kpi: str, time_seconds: float, predicted: float, observed: float) -> None:
        self.fidelity.add(kpi, predicted, observed)
        self.windows.add(kpi, time_seconds, predicted, observed)

    def _correct(self, seen: RequestSeen, finished: RequestFinished, live: Live, *, placed: bool) -> None:
        """Pin the end. A simulation that was ahead waits for as long as it was.

        The work of its replica tells of speed where it is `placed` as it really was: other batches tell nothing of it.
        """
        request = self.fleet.state.requests[live.replica, live.slot]
        generated = int(request["tokens"] - request["prompt"])
        excess = 0.0
        if generated > finished.output_tokens:
            excess = (self.time_seconds - float(request["first_token"])) * (1 - finished.output_tokens / generated)
        chain, covered = None, 0
        if finished.block_hashes and seen.block_tokens:
            whole = _whole(seen, finished)
            chain = workload_of([whole]).chain
            covered = covered_tokens(whole)
        outcome = self.fleet.finish(live, finished.output_tokens, chain, covered)
        if finished.e2e_seconds is not None and finished.ttft_seconds is not None:
            share = min(1.0, (finished.output_tokens - 1) / max(generated - 1, 1))
            decode_seconds = finished.e2e_seconds - finished.ttft_seconds
            work = share * outcome["decode_work"]
            self._pace.observe(self.time_seconds, decode_seconds, work)
            wait = float(outcome["scheduled"] - outcome["arrival"]) - self.frontend_seconds
            if placed:
                self._learn(
                    Row(
                        self.time_seconds,
                        max(0.0, wait),
                        finished.ttft_seconds,
                        decode_seconds,
                        tuple(outcome["prefill_work"].tolist()),
                        tuple(work.tolist()),
                    )
                )
        if excess > 0.0:
            hold_until = self.time_seconds + min(excess, self.settings.longest_hold_seconds)
            self.fleet.hold(live.replica, hold_until)

    def _drop_the_lost(self) -> None:
        """Requests whose finish record never came must not fill the fleet for ever."""
        oldest = self.time_seconds - self.settings.give_up_seconds
        while self._running:
            identity, live = next(iter(self._running.items()))
            if not self._is_there(live):
                del self._running[identity]
                continue
            request = self.fleet.state.requests[live.replica, live.slot]
            if request["arrival"] > oldest:
                return
            self._let_go(identity, live, max(1, int(request["tokens"] - request["prompt"])))

    def _let_go(self, identity: str, live: Live, output_tokens: int) -> None:
        """The request ends in the mirror, though no record tells so."""
        self.ingested["never_finished"] += 1
        self._lengths.let_go(identity, self._simulated(live))
        self.fleet.finish(live, output_tokens, None, 0)
        self.fleet.collect()
        del self._running[identity]

    # --- calibration ----------------------------------------------------------------------------------------------

    def _learn(self, row: Row) -> None:
        """What a request that ended tells of the fleet's speed."""
        if self._is_fork:
            return
        step_time = self.fleet.settings.step_time
        change = self._online.observe(row, step_time)
        if change is not None and self.calibration is not None:
            self._meet(change)

    def _meet(self, change: Change) -> None:
        """The fleet's speed jumped: all of it is taken to have changed alike until the next fit tells more."""
        self.speed_changes += 1
        self.last_change = change
        step_time = self.fleet.settings.step_time
        values = change.ratio * step_time.coefficients()
        if self.settings.floor is not None:
            values = np.maximum(values, self.settings.floor.coefficients())
        self.use(step_time.with_coefficients(values), self.frontend_seconds)
        self._finished_at_calibration = self.finished - self.settings.recalibrate_every_requests + MINIMUM_REQUESTS

    def _maybe_calibrate(self, *, placed: bool) -> None:
        """The first time from simulations of what came so far, then from what the mirror itself saw.

        Where nobody tells which replica served a request, coefficients that are known are better than any fitted to
        batches that were not; the pace still follows the fleet as a whole.
        """
        if self.calibrated and not placed:
            return
        wait = self.settings.recalibrate_every_requests if self.calibration else self.settings.calibrate_after_requests
        if self._is_fork or self.finished - self._finished_at_calibration < wait:
            return
        self._finished_at_calibration = self.finished
        calibration = self._refit() if self.calibration else self._first_fit()
        if calibration is not None:
            self.use(calibration.step_time, calibration.frontend_seconds)
            self.calibration = calibration
            self.calibrated_seconds = self.time_seconds

    def _first_fit(self) -> Calibration | None:
        entries = [entry for entry in self._recent.values() if entry.finished is not None]
        entries = entries[-self.settings.calibrate_after_requests :]
        self._online.forget()  # what the mirror saw with a guess of the step times
        try:
            return calibrate(
                self.fleet.settings, _observed(entries), prior=self.settings.prior, floor=self.settings.floor
            )
        except CalibrationError:
            self.calibration_failures["too_few_latencies"] += 1
            return None

    def _refit(self) -> Calibration | None:
        found = self._online.fit(self.fleet.settings.step_time, self.frontend_seconds, self.settings.floor)
        if found is None:
            self.calibration_failures["too_few_latencies"] += 1
        return found

    def use(self, step_time: StepTime, frontend_seconds: float) -> None:
        """Go on with these coefficients."""
        self.fleet.settings = self.fleet.settings.model_copy(update={"step_time": step_time})
        self.frontend_seconds = frontend_seconds
        self.calibrated = True
        self._pace.follow(step_time)
        self._pace.apply(self.fleet)


def _predicted_finish(simulated: Simulated, output_tokens: int) -> float:
    """When the simulation would have ended a request of this length, at the pace it gave the request so far."""
    first, generated = simulated.first_token, simulated.generated_tokens
    if not math.isfinite(first):
        return math.nan
    if generated < 2:
        return max(first, simulated.at) if output_tokens > 1 else first
    return first + (output_tokens - 1) * (simulated.at - first) / (generated - 1)


def _whole(seen: RequestSeen, finished: RequestFinished) -> RequestRecord:
    # Only the arrival tells how many tokens a hash stands for.
    hashes = finished.block_hashes if seen.block_tokens else ()
    return RequestRecord(
        id=seen.id,
        time_seconds=seen.time_seconds,
        session=seen.session,
        priority=seen.priority,
        prompt_tokens=seen.prompt_tokens,
        output_tokens=finished.output_tokens,
        block_hashes=hashes or seen.block_hashes,
        block_tokens=seen.block_tokens,
        hashes_cover_output=bool(hashes),
    )


def _arrival(seen: RequestSeen, assumed_output: int, index: int, replica: int) -> Workload:
    """One held request whose output nobody knows yet. `replica` -1: the router decides."""
    known = min(len(seen.block_hashes) * (seen.block_tokens or 0), seen.prompt_tokens)
    return make_workload(
        [seen.time_seconds],
        seen.prompt_tokens,
        assumed_output,
        chain=seen.block_hashes,
        chain_starts=[0, len(seen.block_hashes)],
        hash_tokens=seen.block_tokens or 0,
        covered=known,
        priority=seen.priority,
        session=_session(seen, -index),
        held=1,
        replica=replica,
        index=index,
    )


def _session(seen: RequestSeen, without: int) -> int:
    """The same number for the same session in every process, so that a router keeps its sessions."""
    return without if seen.session is None else zlib.crc32(seen.session.encode())


def _workload(entries: list[Seen]) -> Workload:
    """Recent requests as arrays; those in flight with an output of 0."""
    workload = workload_of(
        [
            _whole(entry.seen, entry.finished or RequestFinished(id=entry.seen.id, time_seconds=0.0, output_tokens=0))
            for entry in entries
        ]
    )
    sessions = [_session(entry.seen, -1 - number) for number, entry in enumerate(entries)]
    return workload._replace(session=np.array(sessions, np.int64))


def _observed(entries: list[Seen]) -> Observed:
    finished = [entry.finished for entry in entries if entry.finished is not None]
    return Observed(
        workload=_workload(entries),
        ttft_seconds=np.array([math.nan if f.ttft_seconds is None else f.ttft_seconds for f in finished]),
        e2e_seconds=np.array([math.nan if f.e2e_seconds is None else f.e2e_seconds for f in finished]),
    )
