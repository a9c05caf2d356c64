"""What is known of a pool's fleet, folded over the events of its timeline in order.

A request seen is pushed into the simulated fleet, held: only its finish record ends it. What the simulation said until
then (TTFT, end, queue, prefix hits) is compared with the record before the record corrects the simulation, so every
error is that of a prediction. Output lengths are unknown until the end and no decision uses them.

The fold is a function of the events and their order, bit for bit. The fleet is cut at events and whole seconds only,
so that folding again from a kept fork gives the same bytes.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections import OrderedDict
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from kavier_twin.mirror.applied import Dropped, GivenUp, Restarted
from kavier_twin.mirror.arrival_counts import RateHistory
from kavier_twin.mirror.calibration.online import Change, Online, Row
from kavier_twin.mirror.calibration.requests import (
    MINIMUM_REQUESTS,
    Calibration,
    CalibrationError,
    Observed,
    calibrate,
)
from kavier_twin.mirror.evidence import Evidence, predicted_finish
from kavier_twin.mirror.fidelity.trust import DEFAULT_TRUST, TrustSettings
from kavier_twin.mirror.fidelity.windows import BUCKET_SECONDS
from kavier_twin.mirror.lengths import Lengths, Simulated
from kavier_twin.mirror.pace import Pace
from kavier_twin.mirror.phantoms import (
    EXAMPLES,
    Arrival,
    Delays,
    EngineKey,
    EngineLoad,
    Example,
    MadeUp,
    Recorded,
    between,
    is_phantom,
    key_of,
    make_up,
    phantom,
    requests_inside,
    take_over,
)
from kavier_twin.mirror.pods import Pods, PodSeen
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.mirror.timeline import Adopted, Entry
from kavier_twin.simulation.fleet import Fleet, Live
from kavier_twin.simulation.kpis import Counters
from kavier_twin.simulation.settings import FleetSettings, StepTime
from kavier_twin.simulation.state import FREE, WAITING
from kavier_twin.simulation.workload import Workload, covered_tokens, make_workload, workload_of
from kavier_twin.telemetry import CarbonSample, EngineSample, RequestFinished, RequestRecord, RequestSeen

Floats = npt.NDArray[np.float64]

_FITS_KEPT: Final = 8
_EXPECT_EVERY_SECONDS: Final = 0.25
_EXPECTED: Final = 1_000_000  # from which phantoms are numbered that are only expected, so that names differ


@dataclass(frozen=True)
class MirrorSettings:
    """How a pool is mirrored. Times in seconds of event time."""

    pool: str = "default"
    ordering_seconds: float = 1.5  # that an event is waited with, so that most are in order
    late_seconds: float = 600.0  # up to which late events are put in their place
    phantoms: bool = True  # whether requests that no record tells of are made up
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


class Fold:
    """The state of one pool after the events applied so far. `start` before the first."""

    def __init__(
        self,
        settings: MirrorSettings,
        fleet: FleetSettings,
        *,
        calibrated: bool = False,
        frontend_seconds: float = 0.0,
    ) -> None:
        self.settings = settings
        self.fleet = Fleet(fleet, start_seconds=-math.inf)
        self.calibration: Calibration | None = None
        self.calibrated = calibrated
        self.frontend_seconds = frontend_seconds
        self.finished = 0
        self.pods = Pods(fleet.replicas, settings.pod_silent_seconds, settings.most_replicas)
        self.recent: dict[str, Seen] = {}  # by id, oldest first
        self.running: dict[str, Live] = {}
        self.next_index = 0
        self.lengths = Lengths()
        self.finished_at_calibration = 0
        self.calibrated_seconds = math.nan  # event time of the last calibration
        self.calibration_failures = 0
        self.speed_changes = 0  # jumps of the fleet's speed that calibration met
        self.last_change: Change | None = None
        self.online = Online()
        self.pace = Pace(fleet.step_time)
        self.arrivals = RateHistory()
        self.loads: dict[EngineKey, EngineLoad] = {}
        self.made_up: list[MadeUp] = []  # heap
        self._looks_ahead = False
        # First fits are dear, and made again after every event that comes late: those of the same requests are known.
        self._fits: OrderedDict[int, Calibration | None] = OrderedDict()

    @property
    def time_seconds(self) -> float:
        """Event time that the fold stands at; -inf before the first event."""
        return self.fleet.now_seconds

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return not self.running

    def fork(self, *, looks_ahead: bool = False) -> Fold:
        """An independent copy. One that `looks_ahead` is thrown away soon: it does not calibrate."""
        twin = copy(self)
        twin.fleet = self.fleet.fork()
        twin.recent, twin.running = self.recent.copy(), self.running.copy()
        twin.pace, twin.lengths, twin.arrivals = self.pace.fork(), self.lengths.fork(), self.arrivals.fork()
        twin.online, twin.pods = self.online.fork(), self.pods.copy()
        twin.loads = {key: load.fork() for key, load in self.loads.items()}
        twin.made_up = self.made_up.copy()
        twin._looks_ahead = looks_ahead
        return twin

    # --- time and events ------------------------------------------------------------------------------------------

    def start(self, time_seconds: float) -> None:
        """Begin here with an empty fleet."""
        self.fleet = Fleet(self.fleet.settings, start_seconds=time_seconds)

    def tick(self, second: float, evidence: Evidence | None) -> None:
        """A whole second passed: requests that have run for too long are let go, the others get room in time."""
        self.run_to(second)
        self._drop_the_lost(evidence)
        for identity, live in list(self.running.items()):
            if not self._is_there(live):
                self._drop(identity, evidence)
                continue
            request = self.fleet.state.requests[live.replica, live.slot]
            generated, limit = int(request["tokens"] - request["prompt"]), self.lengths.limit_tokens(identity)
            if limit is not None and generated >= limit:
                self._let_go(identity, live, limit, evidence)
            elif 2 * generated > request["output"]:
                self.fleet.set_output(live, 2 * int(request["output"]))

    def apply(self, entry: Entry, evidence: Evidence | None) -> None:
        """Apply an event at its time, to which all seconds have passed."""
        event = entry.event
        self.run_to(entry.time_seconds)
        self._drop_the_lost(evidence)
        if isinstance(event, RequestSeen):
            self._arrive(event, entry, evidence)
        elif isinstance(event, RequestFinished):
            self._finish(event, entry, evidence)
        elif isinstance(event, EngineSample):
            if event.pod:
                self._sight(PodSeen.of(event), evidence)
        elif isinstance(event, CarbonSample):
            self._take_carbon(event)
        elif isinstance(event, Adopted):
            self.fleet.apply(event.overrides)
            self.pace.apply(self.fleet)
        else:
            self.calibration = event.calibration
            self.use(event.step_time, event.frontend_seconds)
        self.pods.drain_the_silent(self.fleet, self.time_seconds)

    # --- phantoms -------------------------------------------------------------------------------------------------

    def make_up(self, load: EngineLoad, after: EngineSample, recorded: Recorded) -> None:
        """Make up what no record tells of between an engine's last sample and the next."""
        phantoms = self.phantoms_of(key_of(after))
        interval = between(load, after, recorded, phantoms)
        for event in make_up(self.settings.pool, load.last, after, interval, phantoms, self._examples()):
            heapq.heappush(self.made_up, (event.time_seconds, event.number, key_of(after), event))
        take_over(load, after, interval)

    def apply_made_up(self) -> None:
        """Apply the next event of a phantom at its time, to which all seconds have passed."""
        time_seconds, _, _, event = heapq.heappop(self.made_up)
        self.run_to(time_seconds)
        if isinstance(event, Arrival):
            self._arrive(event.seen, None, None)
        else:
            self._end_phantom(event.engine)

    def live_of(self, engine: EngineKey) -> int:
        """Requests of an engine that are under way, phantoms among them."""
        replica = self._replica_of(engine)
        return sum(live.replica == replica for live in self.running.values())

    def phantoms_of(self, engine: EngineKey) -> int:
        """Those of them that are phantoms."""
        replica = self._replica_of(engine)
        return sum(live.replica == replica and is_phantom(name) for name, live in self.running.items())

    def expect(self, until_seconds: float, delays: Delays, newest: EngineSample, held: float) -> None:
        """Make up the arrivals of which no record has come yet. For a fork.

        The `newest` sample of an engine counts requests; records know of `held` of them. The others have arrived by
        now. The expected number of arrivals since is the recent rate times the share of records that are later than
        the time since the arrival.
        """
        engine = key_of(newest)
        load = self.loads[engine]
        self._agree(engine, newest, held)
        since = max(until_seconds - delays.longest_seconds, newest.time_seconds)
        ages = until_seconds - np.arange(until_seconds, since, -_EXPECT_EVERY_SECONDS) + 0.5 * _EXPECT_EVERY_SECONDS
        unknown = np.cumsum(load.arrivals_per_second * _EXPECT_EVERY_SECONDS * delays.later_than(ages))
        count = round(float(unknown[-1])) if unknown.size else 0
        if count == 0:
            return
        examples = self._examples()
        rng = np.random.default_rng(zlib.crc32(f"{engine}@{newest.time_seconds}".encode()))
        places = np.searchsorted(unknown, np.arange(count) + 0.5)
        for number, age in enumerate(ages[np.minimum(places, ages.size - 1)].tolist()):
            at = max(until_seconds - age, self.time_seconds)
            seen = phantom(self.settings.pool, engine, newest, at, number + _EXPECTED, examples, rng)
            expected = Arrival(at, number + _EXPECTED, engine, seen)
            heapq.heappush(self.made_up, (at, expected.number, engine, expected))

    def agree(self, sample: EngineSample) -> None:
        """Hold as many requests of an engine as its sample says, as far as phantoms can. For a fork at its time."""
        self._agree(key_of(sample), sample, self.live_of(key_of(sample)))

    def _agree(self, engine: EngineKey, sample: EngineSample, live: float) -> None:
        """The same where there were so many `live` at the time of the sample."""
        level = requests_inside(sample)
        if level is None or not self._knows_pods():
            return
        missing, now = round(level - live), self.time_seconds
        if missing > 0:
            examples = self._examples()
            rng = np.random.default_rng(zlib.crc32(f"{engine}@{sample.time_seconds}".encode()))
            for _ in range(missing):
                seen = phantom(self.settings.pool, engine, sample, now, -1 - self.next_index, examples, rng)
                self._arrive(seen, None, None)
        elif missing < 0:
            phantoms = [name for name, live in self._phantoms_there(engine)]
            for name in phantoms[: missing - 1 : -1]:  # the newest: fewer came than expected
                self._take_out(name)

    def _end_phantom(self, engine: EngineKey) -> None:
        """The phantom that has generated most ends; of those that wait the oldest."""
        there = self._phantoms_there(engine)
        if not there:
            return
        requests = self.fleet.state.requests

        def generated(place: int) -> tuple[int, int]:
            live = there[place][1]
            request = requests[live.replica, live.slot]
            return int(request["tokens"] - request["prompt"]), -place

        self._take_out(there[max(range(len(there)), key=generated)][0])

    def _phantoms_there(self, engine: EngineKey) -> list[tuple[str, Live]]:
        """An engine's phantoms under way, in order of arrival."""
        replica = self._replica_of(engine)
        found = [(name, live) for name, live in self.running.items() if live.replica == replica and is_phantom(name)]
        return [(name, live) for name, live in found if self._is_there(live)]

    def _take_out(self, identity: str) -> None:
        """End a request now, as long as it is."""
        live = self.running.pop(identity)
        request = self.fleet.state.requests[live.replica, live.slot]
        self.fleet.finish(live, max(1, int(request["tokens"] - request["prompt"])), None, 0)
        self.fleet.collect()

    def _examples(self) -> list[Example]:
        """Lengths and cached prefixes of recent requests."""
        found = []
        for entry in islice(reversed(self.recent.values()), EXAMPLES):
            seen, finished = entry.seen, entry.finished
            if finished is not None and not is_phantom(seen.id):
                blocks = (finished.cached_tokens or 0) // seen.block_tokens if seen.block_tokens else 0
                found.append(Example(seen.prompt_tokens, seen.block_hashes[:blocks], seen.block_tokens or 0))
        return found

    def _knows_pods(self) -> bool:
        """Whether records tell which replica serves a request, so that an engine's gauges are those of a replica."""
        newest = next((entry.seen for name, entry in reversed(self.recent.items()) if not is_phantom(name)), None)
        return newest is None or self._is_placed(newest)

    def _replica_of(self, engine: EngineKey) -> int | None:
        _, pod, rank = engine
        found = self.pods.replica_of(pod, rank)
        if found is None:
            found = self.pods.replica_of(pod)
        return 0 if found is None and self.fleet.state.replicas.size == 1 else found

    def run_to(self, time_seconds: float) -> None:
        """Let the fleet run up to here."""
        self.fleet.run(time_seconds)
        self._extend()

    def _extend(self) -> None:
        """Requests that reached the length assumed for them go on: reality has not ended them."""
        if not self.fleet.state.replicas["holding"].any():
            return
        for live in self.fleet.live():
            request = self.fleet.state.requests[live.replica, live.slot]
            if request["tokens"] >= request["prompt"] + request["output"]:
                self.fleet.set_output(live, 2 * int(request["output"]))
        self.fleet.state.replicas["hold_until"] = -np.inf

    def _take_carbon(self, sample: CarbonSample) -> None:
        """What the grid emits now takes the place of what the settings say, for forecasts from here on."""
        footprint = self.fleet.settings.footprint
        if footprint is not None:
            unix_seconds = footprint.time_zero.timestamp() + sample.time_seconds
            carbon = footprint.carbon.with_point(unix_seconds, sample.gco2_per_kwh)
            footprint = footprint.model_copy(update={"carbon": carbon})
            self.fleet.settings = self.fleet.settings.model_copy(update={"footprint": footprint})

    # --- what can be seen -----------------------------------------------------------------------------------------

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
        recent = [entry for entry in self.recent.values() if entry.seen.time_seconds >= earliest]
        start = recent[0].seen.time_seconds if recent else self.time_seconds
        fleet = self.fleet.fork()
        if self.calibrated:  # the pace is of the last seconds only, and partly the mirror's own noise
            self.pace.apply(fleet, 1.0)
        return Snapshot(
            pool=self.settings.pool,
            time_seconds=self.time_seconds,
            fleet=fleet,
            recent=self._numbered(recent),
            recent_seconds=min(self.settings.recent_seconds, max(self.time_seconds - start, 1e-9)),
            frontend_seconds=self.frontend_seconds,
            calibrated=self.calibrated,
            arrivals=self.arrivals.until(self.time_seconds),
            ended_seconds=np.array([e.finished.time_seconds if e.finished else math.nan for e in recent], np.float64),
        )

    def _numbered(self, entries: list[Seen]) -> Workload:
        """Requests as arrays, live ones with their number in the fleet, the others with numbers below zero."""
        index = [
            live.index if (live := self.running.get(entry.seen.id)) is not None else -1 - row
            for row, entry in enumerate(entries)
        ]
        return _workload(entries)._replace(index=np.array(index, np.int64))

    # --- requests -------------------------------------------------------------------------------------------------

    def _arrive(self, seen: RequestSeen, entry: Entry | None, evidence: Evidence | None) -> None:
        self.recent.pop(seen.id, None)  # an id used again
        self.recent[seen.id] = Seen(seen)
        self.arrivals.add(seen.time_seconds)
        if len(self.recent) > self.settings.recent_requests:
            del self.recent[next(iter(self.recent))]
        self.next_index += 1
        replica = self.pods.serve(self.fleet, self.time_seconds, seen.pod) if seen.pod else -1
        if replica < 0 and seen.pod and evidence is not None and entry is not None:
            evidence.count(entry, "too_many_pods")
        assumed = self.lengths.assumed_tokens()
        workload = _arrival(seen, assumed, self.next_index, replica)
        delivered = workload._replace(delivered=np.maximum(workload.arrival + self.frontend_seconds, self.time_seconds))
        # The frontend's time passes before the scheduler sees it; events in between have their own turn.
        replica, slot = map(int, self.fleet.deliver(delivered, 0, 1)[0])
        if slot >= 0:
            self.running[seen.id] = Live(self.next_index, replica, slot)
            if evidence is not None and entry is not None:
                evidence.arrived(entry, seen, replica)

    def _sight(self, seen: PodSeen, evidence: Evidence | None) -> None:
        """A pod's metrics: one that restarted lost its cache and the requests that it had."""
        restart = self.pods.sighted(self.fleet, seen)
        if restart is None:
            return
        if evidence is not None:
            evidence.restarted(Restarted(restart.replica, restart.since_seconds))
        requests = self.fleet.state.requests[restart.replica]
        names = {live.index: name for name, live in self.running.items() if live.replica == restart.replica}
        again = [i for i, n in names.items() if requests[self.running[n].slot]["arrival"] >= restart.since_seconds]
        for live in self.fleet.begin_anew(restart.replica, again):
            self.running[names.pop(live.index)] = live
        for name in names.values():
            self._drop(name, evidence, "replica_restarted")

    def _is_there(self, live: Live) -> bool:
        """Whether it runs: one that grew until the cache could not hold it has ended, and its slot is another's."""
        request = self.fleet.state.requests[live.replica, live.slot]
        return bool(request["state"] != FREE and request["index"] == live.index)

    def _finish(self, finished: RequestFinished, entry: Entry, evidence: Evidence | None) -> None:
        known = self.recent.get(finished.id)
        live = self.running.pop(finished.id, None)
        let_go = self.lengths.came_after_all(finished.id) if live is None else None
        if live is None and let_go is None and (known is None or known.finished is not None):
            return
        there = live is not None and self._is_there(live)
        simulated = let_go or (self._simulated(live) if live is not None and there else None)
        seen = None if known is None else known.seen
        self.finished += 1
        if evidence is not None:
            evidence.ended(entry, finished, seen, simulated, self.frontend_seconds)
            if let_go is None and not there:
                evidence.count(entry, "not_simulated")
        self.lengths.ended(finished.output_tokens, late=finished.time_seconds < self.time_seconds)
        if seen is not None:
            self.recent[finished.id] = Seen(seen, finished)
        if let_go is not None and seen is not None:
            # The longest are let go most: to learn from the others alone would make every engine look fast.
            tokens, generated = finished.output_tokens - 1, max(let_go.generated_tokens - 1, 1)
            work = np.array(let_go.prefill_work), tokens / generated * np.array(let_go.decode_work)
            wait = let_go.scheduled - let_go.arrival
            self._observe_work(finished, wait, *work, placed=self._is_placed(seen))
            self.pace.apply(self.fleet)
        if live is None or not there:
            return
        self.pods.ended(self.time_seconds, live.replica)
        if seen is None:  # so long ago that its content is forgotten
            self.fleet.finish(live, finished.output_tokens, None, 0)
            self.fleet.collect()
            return
        placed = self._is_placed(seen)
        self._correct(seen, finished, live, placed=placed)
        self.pace.apply(self.fleet)
        self.fleet.collect()
        self._maybe_calibrate(placed=placed)

    def _simulated(self, live: Live) -> Simulated:
        """What was simulated of a request until now."""
        request = self.fleet.state.requests[live.replica, live.slot]
        return Simulated(
            at=self.time_seconds,
            arrival=float(request["arrival"]),
            prompt_tokens=int(request["prompt"]),
            scheduled=float(request["scheduled"]),
            first_token=float(request["first_token"]),
            generated_tokens=int(request["tokens"] - request["prompt"]),
            cached_tokens=int(request["cached"]) if request["state"] not in (FREE, WAITING) else None,
        )

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
        share = min(1.0, (finished.output_tokens - 1) / max(generated - 1, 1))
        wait = float(outcome["scheduled"] - outcome["arrival"])
        self._observe_work(finished, wait, outcome["prefill_work"], share * outcome["decode_work"], placed=placed)
        if excess > 0.0:
            hold_until = self.time_seconds + min(excess, self.settings.longest_hold_seconds)
            self.fleet.hold(live.replica, hold_until)

    def _observe_work(
        self, finished: RequestFinished, wait: float, prefill_work: Floats, decode_work: Floats, *, placed: bool
    ) -> None:
        """Learn the engine's speed from the work that was simulated for a request and the time that it really took."""
        if finished.e2e_seconds is None or finished.ttft_seconds is None:
            return
        decode_seconds = finished.e2e_seconds - finished.ttft_seconds
        self.pace.observe(self.time_seconds, decode_seconds, decode_work)
        if placed:
            work = tuple(prefill_work.tolist()), tuple(decode_work.tolist())
            queued = max(0.0, wait - self.frontend_seconds)
            self._learn(Row(self.time_seconds, queued, finished.ttft_seconds, decode_seconds, *work))

    def _is_placed(self, seen: RequestSeen) -> bool:
        """Whether it runs where it really does: without a pod's name the router decided, perhaps otherwise."""
        return bool(seen.pod) or self.fleet.state.replicas.size == 1

    def _drop_the_lost(self, evidence: Evidence | None) -> None:
        """Requests whose finish record never came must not fill the fleet for ever."""
        oldest = self.time_seconds - self.settings.give_up_seconds
        while self.running:
            identity, live = next(iter(self.running.items()))
            if not self._is_there(live):
                self._drop(identity, evidence)
                continue
            request = self.fleet.state.requests[live.replica, live.slot]
            if request["arrival"] > oldest:
                return
            self._let_go(identity, live, max(1, int(request["tokens"] - request["prompt"])), evidence)

    def _drop(self, identity: str, evidence: Evidence | None, reason: str = "") -> None:
        """The request is in the fleet no more, and no record tells how it ended."""
        del self.running[identity]
        if evidence is not None and not is_phantom(identity):
            evidence.dropped(Dropped(identity), reason)

    def _let_go(self, identity: str, live: Live, output_tokens: int, evidence: Evidence | None) -> None:
        """The request ends in the mirror, though no record tells so."""
        simulated = self._simulated(live)
        outcome = self.fleet.finish(live, output_tokens, None, 0)
        if not is_phantom(identity):
            work = tuple(outcome["prefill_work"].tolist()), tuple(outcome["decode_work"].tolist())
            self.lengths.let_go(identity, simulated._replace(prefill_work=work[0], decode_work=work[1]))
            # Held for as long as it might run, it most likely ended long before.
            likely = self.lengths.drawn_tokens(identity) or output_tokens
            finish = predicted_finish(simulated, likely)
            times = simulated.arrival, simulated.scheduled, simulated.first_token
            over = self.time_seconds if math.isnan(finish) else finish
            if evidence is not None:
                lengths = simulated.prompt_tokens, likely, simulated.cached_tokens
                evidence.given_up(GivenUp(identity, *times, over, *lengths))
        self.fleet.collect()
        del self.running[identity]

    # --- calibration ----------------------------------------------------------------------------------------------

    def _learn(self, row: Row) -> None:
        """What a request that ended tells of the fleet's speed."""
        if self._looks_ahead:
            return
        change = self.online.observe(row, self.fleet.settings.step_time)
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
        self.finished_at_calibration = self.finished - self.settings.recalibrate_every_requests + MINIMUM_REQUESTS

    def _maybe_calibrate(self, *, placed: bool) -> None:
        """The first time from simulations of what came so far, then from what the mirror itself saw.

        Where nobody tells which replica served a request, coefficients that are known are better than any fitted to
        batches that were not; the step-time scale still follows the fleet as a whole.
        """
        if self.calibrated and not placed:
            return
        wait = self.settings.recalibrate_every_requests if self.calibration else self.settings.calibrate_after_requests
        if self._looks_ahead or self.finished - self.finished_at_calibration < wait:
            return
        self.finished_at_calibration = self.finished
        if self.calibration:
            found = self.online.fit(self.fleet.settings.step_time, self.frontend_seconds, self.settings.floor)
        else:
            found = self._first_fit()
        if found is None:
            self.calibration_failures += 1
            return
        self.use(found.step_time, found.frontend_seconds)
        self.calibration = found
        self.calibrated_seconds = self.time_seconds

    def _first_fit(self) -> Calibration | None:
        entries = [entry for entry in self.recent.values() if entry.finished is not None]
        observed = _observed(entries[-self.settings.calibrate_after_requests :])
        self.online = Online()  # what the mirror saw with a guess of the step times is forgotten
        columns = (*observed.workload, observed.ttft_seconds, observed.e2e_seconds)
        key = hash(b"".join(np.ascontiguousarray(column).tobytes() for column in columns))
        if key not in self._fits:
            settings = self.settings
            try:
                found = calibrate(self.fleet.settings, observed, prior=settings.prior, floor=settings.floor)
                self._fits[key] = found
            except CalibrationError:
                self._fits[key] = None
            if len(self._fits) > _FITS_KEPT:
                self._fits.popitem(last=False)
        return self._fits[key]

    def use(self, step_time: StepTime, frontend_seconds: float) -> None:
        """Go on with these coefficients."""
        self.fleet.settings = self.fleet.settings.model_copy(update={"step_time": step_time})
        self.frontend_seconds = frontend_seconds
        self.calibrated = True
        self.pace.follow(step_time)
        self.pace.apply(self.fleet)


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
