"""The control plane: a fleet's clock and everything that happens rarely, as SimPy processes.

The data plane (kernels over `FleetState`) is pulled forward by the control plane: before a control event acts, the
arrivals up to its time are delivered and every replica is advanced to it. Processes keep no state of their own; what
is still to come is plain data (`_arrivals`, `_actions`), so a fork is a copy of arrays and of that data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import simpy
from numpy.lib import recfunctions as rfn

from kavier_twin.simulation import build, future
from kavier_twin.simulation import state as layout
from kavier_twin.simulation.compiler.libraries import load
from kavier_twin.simulation.kernels import entries as kernels
from kavier_twin.simulation.policies import Override, apply_overrides
from kavier_twin.simulation.power import Reading
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import FleetState, Records
from kavier_twin.simulation.turns import SessionLoad, Turns
from kavier_twin.simulation.workload import Workload, concatenate, take_rows, writable

Kind = Literal["join", "drain", "leave", "fail", "restart", "accept", "policy", "sample"]


class Action(NamedTuple):
    """Something the control plane does at a time: plain data, so that it survives a fork."""

    time_seconds: float
    kind: Kind
    replica: int = -1
    overrides: tuple[tuple[str, Override], ...] = ()
    every_seconds: float = 0.0  # "sample": repeat


@dataclass
class Samples:
    """The fleet over time, one entry a sampling tick."""

    time_seconds: list[float] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    kv_usage_ratio: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)  # what energy follows from

    def copy(self) -> Samples:
        return Samples(
            list(self.time_seconds),
            list(self.running),
            list(self.waiting),
            list(self.kv_usage_ratio),
            list(self.readings),
        )


class Live(NamedTuple):
    """A request that is in a replica now."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    replica: int
    slot: int


class Peaks(NamedTuple):
    """The most that any replica had at a time."""

    running: int  # requests
    batch_tokens: int  # in one batch; a batch of decodes has one token a request


class Fleet:
    """A simulated pool of replicas behind a router.

    Deterministic: the same settings and workload give the same bytes. Not thread-safe; a fork is independent.
    """

    def __init__(
        self,
        settings: FleetSettings,
        *,
        stepping: bool = False,
        start_seconds: float = 0.0,
        state: FleetState | None = None,
    ) -> None:
        self.settings = settings
        self.samples = Samples()
        self.requeued = 0
        self._stepping = stepping
        self.state = build.new_state(settings, stepping=stepping) if state is None else state
        self._arrivals: Workload | None = None
        self._next_row = 0
        self._sessions: SessionLoad | None = None
        self._actions: list[Action] = []
        self._collected: list[npt.NDArray[np.uint8]] = []  # outcomes, as bytes
        self.now_seconds = start_seconds
        if state is None:
            self.state.replicas["now"] = start_seconds
            self.state.replicas["accounted"] = start_seconds
            self.state.replicas["last_completion"] = start_seconds
            self.state.replicas["joined"] = start_seconds

    # --- what is to come ------------------------------------------------------------------------------------------

    def feed(self, workload: Workload) -> None:
        """Add requests, sorted by arrival and none earlier than those fed before or than now.

        Raises ValueError for an arrival in the past, and behind `feed_sessions`.
        """
        if self._sessions is not None:
            raise ValueError("sessions in a closed loop are under way: nothing can be fed behind them")
        if workload.index.size == 0:
            return
        if workload.delivered[0] < self.now_seconds:
            raise ValueError(f"arrival at {workload.delivered[0]} s lies before the fleet's clock {self.now_seconds} s")
        rest = self._pending()
        self._arrivals = writable(workload) if rest is None else concatenate(rest, workload)
        self._next_row = 0
        self.foresee(self._arrivals)

    def feed_sessions(self, workload: Workload, turns: Turns) -> None:
        """`feed` of requests some of which arrive when another one ended, one of these or a live one.

        What waits for a request that never ends, or is lost, does not come. Belady's policy is told the order that the
        workload has. Raises ValueError behind anything else that is still to come, and as `SessionLoad` does.
        """
        if self._arrivals is not None:
            raise ValueError("other requests are still to come: sessions in a closed loop cannot be fed behind them")
        self.feed(workload)
        self._arrivals = None
        self._sessions = SessionLoad(workload, turns)

    def foresee(self, workload: Workload | None) -> None:
        """Tell Belady's policy all requests to come; nothing under any other. `feed` does it."""
        if self.settings.engine.eviction == "belady":
            self.state = future.with_future(self.state, workload, self.now_seconds)

    def join(self, time_seconds: float) -> None:
        """A new replica with a cold cache joins."""
        self._at(Action(time_seconds, "join"))

    def drain(self, replica: int, time_seconds: float) -> None:
        """The replica gets no new requests and ends those it has."""
        self._at(Action(time_seconds, "drain", replica))

    def leave(self, replica: int, time_seconds: float) -> None:
        """The replica is drained and gone once empty."""
        self._at(Action(time_seconds, "leave", replica))

    def fail(self, replica: int, time_seconds: float) -> None:
        """The replica is gone at once; its requests start again elsewhere, keeping their arrival times."""
        self._at(Action(time_seconds, "fail", replica))

    def restart(self, replica: int, time_seconds: float, drain_seconds: float, startup_seconds: float) -> None:
        """The replica is drained, stopped and started: it comes back with nothing cached.

        What it still serves after `drain_seconds` starts again elsewhere, keeping its arrival time.
        """
        self._at(Action(time_seconds, "drain", replica))
        self._at(Action(time_seconds + drain_seconds, "restart", replica))
        self._at(Action(time_seconds + drain_seconds + startup_seconds, "accept", replica))

    def switch_policy(self, overrides: Mapping[str, Override], time_seconds: float) -> None:
        """From then on the fleet runs with these overrides (see `policies`)."""
        apply_overrides(self.settings, overrides)  # refuse a bad one now, not when its time comes
        self._at(Action(time_seconds, "policy", overrides=tuple(overrides.items())))

    def sample_every(self, seconds: float) -> None:
        """Record `samples` now and every so often while there is something to do."""
        self._at(Action(self.now_seconds, "sample", every_seconds=seconds))

    def _at(self, action: Action) -> None:
        if action.time_seconds < self.now_seconds:
            raise ValueError(f"{action.kind} at {action.time_seconds} s lies before the clock {self.now_seconds} s")
        self._actions.append(action)

    # --- running --------------------------------------------------------------------------------------------------

    def run(self, until_seconds: float = math.inf) -> None:
        """Advance to `until_seconds`; without it, until every request fed has ended and every action was done."""
        environment = simpy.Environment(initial_time=self.now_seconds)
        due = [action for action in self._actions if action.time_seconds <= until_seconds]
        self._actions = [action for action in self._actions if action.time_seconds > until_seconds]
        for action in due:
            environment.process(self._perform(environment, action, until_seconds))
        environment.run(until=None)
        self._catch_up(until_seconds)

    def _perform(
        self, environment: simpy.Environment, action: Action, until_seconds: float
    ) -> Generator[simpy.Event, Any, None]:
        time = action.time_seconds  # not environment.now: a fork starts its clock elsewhere and would round otherwise
        while True:
            yield environment.timeout(max(0.0, time - environment.now))
            self._catch_up(time)
            if action.kind != "sample":
                self._act(action)
                return
            self._sample()
            time += action.every_seconds
            if time > until_seconds:
                self._actions.append(action._replace(time_seconds=time))
                return
            if until_seconds == math.inf and self.idle:
                return

    def _catch_up(self, time_seconds: float) -> None:
        """Deliver the arrivals before this time and bring every replica up to it."""
        load(*build.kernels_of(self.settings.engine))
        if self._arrivals is not None:
            stop = int(np.searchsorted(self._arrivals.delivered, time_seconds, side="left"))
            if stop > self._next_row:
                self.deliver(self._arrivals, self._next_row, stop)
                self._next_row = stop
            if self._next_row == self._arrivals.index.size:
                self._arrivals, self._next_row = None, 0
        if self._sessions is not None:
            self._deliver_sessions(self._sessions, time_seconds)
        kernels.advance_all(self.state, time_seconds)
        ended = time_seconds if time_seconds < math.inf else float(self.state.replicas["now"].max())
        self.now_seconds = max(self.now_seconds, ended)

    def deliver(self, workload: Workload, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Route and push rows [start, stop) now, growing the arrays where needed. Returns [rows, 2] (replica, slot)."""
        load(*build.kernels_of(self.settings.engine))
        places = np.full((workload.index.size, 2), -1, np.int32)
        row = start
        while row < stop:
            row, status = kernels.arrive(self.state, workload, row, stop, places)
            if status == layout.NO_REPLICA:
                self._lose(workload, row)
                row += 1
            elif status != layout.OK:
                self.grow(status)
        return places[start:stop]

    def _deliver_sessions(self, sessions: SessionLoad, until_seconds: float) -> None:
        row, status = sessions.deliver(self.state, until_seconds)
        while status != layout.OK:
            if status == layout.NO_REPLICA:
                self._lose(sessions.workload, row)
            else:
                self.grow(status)
            row, status = sessions.deliver(self.state, until_seconds)
        if sessions.done:
            self._sessions = None

    def grow(self, status: int) -> None:
        """Make room for what a kernel found no room for: `status` is what it returned."""
        if status == layout.GROW_SLOTS:
            self.state = build.with_more_slots(self.state)
        elif status == layout.GROW_ARENA:
            self.state = build.with_more_arena(self.state)
        else:
            self._set_aside()
            if 2 * int(self.state.fleet["live"][0]) + 1 > self.state.outcomes.size:
                self.state = build.with_more_outcomes(self.state)

    # --- what an outside world tells about live requests --------------------------------------------------------------

    def finish(self, live: Live, output_tokens: int, chain: npt.NDArray[np.uint64] | None, covered: int) -> Any:
        """End a held request now with this many output tokens; returns its outcome (which `collect` returns too).

        `chain` (keys) and `covered` tell the content of prompt and output, as in `learn_chain`.
        """
        load(*build.kernels_of(self.settings.engine))
        number, slot = live.replica, live.slot
        while kernels.set_output(self.state, number, slot, output_tokens, True) != layout.OK:
            self.grow(layout.GROW_ARENA)
        self._take_back(live, output_tokens)
        if chain is not None:
            while kernels.learn_chain(self.state, number, slot, chain, covered) != layout.OK:
                self.grow(layout.GROW_ARENA)
        self._room_for_outcomes()
        kernels.finish_now(self.state, number, slot, self.now_seconds)
        return self.state.outcomes[int(self.state.fleet["outcomes"][0]) - 1].copy()

    def _take_back(self, live: Live, output_tokens: int) -> None:
        """Blocks filled beyond the end were never real: freed like empty ones, they are the next to be handed out.

        Left in the cache, where nothing could find them, they would push out what the real one still holds.
        """
        request = self.state.requests[live.replica, live.slot]
        end = int(request["cells"] + request["chain_length"] + request["registered"])
        real = (int(request["prompt"]) + output_tokens - 1) // self.settings.engine.block_size
        if self.settings.engine.eviction == "lru" and real < request["registered"]:
            surplus = self.state.arena[live.replica, end - int(request["registered"]) + real : end].astype(np.int64)
            keys = self.state.blocks["key"][live.replica]
            surplus = surplus[keys[surplus] == layout.PRIVATE]
            keys[surplus] = layout.UNHASHED
            self.state.requests["registered"][live.replica, live.slot] -= surplus.size

    def set_output(self, live: Live, output_tokens: int) -> None:
        """Change how many tokens a live request is expected to generate, at least what it has and what is in flight."""
        load(*build.kernels_of(self.settings.engine))
        while kernels.set_output(self.state, live.replica, live.slot, output_tokens, False) != layout.OK:
            self.grow(layout.GROW_ARENA)

    def hold(self, replica: int, until_seconds: float) -> None:
        """Reality turned out to be behind this replica: it waits until then before it schedules again."""
        hold_until = self.state.replicas["hold_until"]
        hold_until[replica] = max(hold_until[replica], until_seconds)

    def _room_for_outcomes(self) -> None:
        fleet = self.state.fleet[0]
        if fleet["outcomes"] + fleet["live"] + 1 > self.state.outcomes.size:
            self.grow(layout.GROW_OUTCOMES)

    # --- what an outside world tells about replicas -------------------------------------------------------------------

    @property
    def replicas_alive(self) -> int:
        """Those that are there, the leaving ones included."""
        return int(self.state.replicas["alive"].sum())

    def are_gone(self, numbers: Iterable[int]) -> bool:
        """Whether these replicas have left; the empty ones of those that were to leave do so now."""
        self._retire()
        return not any(self.state.replicas["alive"][number] for number in numbers)

    def admit(self) -> int:
        """A replica joins now with a cold cache, in the place of one that is gone if possible. Returns its number."""
        gone = np.flatnonzero(self.state.replicas["alive"] == 0)
        if gone.size:
            build.begin_anew(self.state, int(gone[0]), self._fresh())
        else:
            self._join()
        self._count_replicas()
        return int(gone[0]) if gone.size else self.state.replicas.size - 1

    def dismiss(self, number: int) -> None:
        """The replica gets no new requests and is gone once it has ended those it has."""
        self._accept(number, False)
        self._let_go(number)
        self._retire()
        self._count_replicas()

    def recall(self, number: int) -> None:
        """One that was dismissed, and is not gone, stays."""
        self._accept(number, True)
        self.state.replicas["leaving"][number] = 0
        self.state.replicas["left"][number] = np.inf
        self._count_replicas()

    def begin_anew(self, number: int, again: Collection[int]) -> list[Live]:
        """The replica begins anew now, with a cold cache. Returns where those of its requests are that start again.

        These are the ones whose index is in `again`; the others are gone without an outcome.
        """
        load(*build.kernels_of(self.settings.engine))
        rows = build.rows_of_live(self.state, number, self.now_seconds)
        for live in self.live():
            if live.replica == number:
                kernels.abandon(self.state, number, live.slot, self.now_seconds)
        build.begin_anew(self.state, number, self._fresh())
        rows = take_rows(rows, np.flatnonzero(np.isin(rows.index, list(again))))
        rows = rows._replace(replica=np.full(rows.index.size, number, np.int64))
        places = self.deliver(rows, 0, rows.index.size)
        found = [Live(int(index), *map(int, place)) for index, place in zip(rows.index, places, strict=True)]
        return [live for live in found if live.slot >= 0]

    def _count_replicas(self) -> None:
        """What policies count from."""
        accepting = int(self.state.replicas["accepting"].sum())
        self.settings = self.settings.model_copy(update={"replicas": accepting})

    # --- what can be seen -----------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """No request is live and none is to come."""
        return self._arrivals is None and self._sessions is None and int(self.state.fleet["live"][0]) == 0

    def live(self) -> list[Live]:
        """All requests in the replicas now."""
        found = np.argwhere(self.state.requests["state"] != layout.FREE)
        return [Live(int(self.state.requests[r, s]["index"]), int(r), int(s)) for r, s in found]

    def collect(self) -> Records:
        """Take the outcomes of requests that ended since the last call, in the order in which they ended."""
        self._set_aside()
        taken = self._collected
        self._collected = []
        # As bytes, as in `copy_state`.
        return np.concatenate([np.zeros(0, np.uint8), *taken]).view(layout.OUTCOME)

    def _set_aside(self) -> None:
        count = int(self.state.fleet["outcomes"][0])
        if count:
            if self._sessions is not None:
                self._sessions.take_note(self.state)
            self._collected.append(self.state.outcomes[:count].view(np.uint8).copy())
            self.state.fleet["outcomes"] = 0

    def _sample(self) -> None:
        replicas, blocks = self.state.replicas, self.state.engines["num_blocks"] - 1
        used = int((blocks - replicas["free_blocks"]).sum())
        usable = int(blocks[replicas["alive"] == 1].sum())
        self.samples.time_seconds.append(self.now_seconds)
        self.samples.running.append(int(replicas["running"].sum()))
        self.samples.waiting.append(int(replicas["waiting"].sum() + replicas["loading"].sum()))
        self.samples.kv_usage_ratio.append(used / usable if usable else 0.0)
        self.samples.readings.append(Reading.of(self.state, self.now_seconds))

    def forget_peaks(self) -> None:
        """Begin `peaks` anew."""
        self.state.replicas["most_running"] = self.state.replicas["running"]
        self.state.replicas["most_batch_tokens"] = 0

    @property
    def peaks(self) -> Peaks:
        """How near its replicas came to the limits of their engines."""
        running = int(self.state.replicas["most_running"].max(initial=0))
        return Peaks(running, max(running, int(self.state.replicas["most_batch_tokens"].max(initial=0))))

    # --- forks ----------------------------------------------------------------------------------------------------

    def fork(self) -> Fleet:
        """An independent copy that continues exactly as this one would."""
        twin = Fleet(
            self.settings, stepping=self._stepping, start_seconds=self.now_seconds, state=layout.copy_state(self.state)
        )
        twin.samples = self.samples.copy()
        twin.requeued = self.requeued
        twin._arrivals, twin._next_row = self._arrivals, self._next_row
        twin._sessions = None if self._sessions is None else self._sessions.fork()
        twin._actions = list(self._actions)
        twin._collected = list(self._collected)
        return twin

    # --- control events -------------------------------------------------------------------------------------------

    def _pending(self) -> Workload | None:
        if self._arrivals is None:
            return None
        return take_rows(self._arrivals, np.arange(self._next_row, self._arrivals.index.size))

    def _act(self, action: Action) -> None:
        replicas = self.state.replicas
        if action.kind == "join":
            self._join()
        elif action.kind == "policy":
            self.apply(dict(action.overrides))
        elif not 0 <= action.replica < replicas.size or not replicas[action.replica]["alive"]:
            raise ValueError(f"{action.kind}: there is no replica {action.replica}")
        elif action.kind == "fail":
            self._fail(action.replica)
        elif action.kind == "restart":
            self._restart(action.replica)
        elif action.kind == "accept":
            self._accept(action.replica, True)
        else:
            self._accept(action.replica, False)
            if action.kind == "leave":
                self._let_go(action.replica)
        self._retire()

    def _accept(self, number: int, accepting: bool) -> None:
        """Whether routers send the replica requests."""
        self.state.replicas["accepting"][number] = accepting
        self.state.quiet_until[number] = -np.inf

    def _let_go(self, number: int) -> None:
        """The replica is gone once empty."""
        self.state.replicas["leaving"][number] = 1
        self.state.replicas["left"][number] = min(self.now_seconds, self.state.replicas["left"][number])

    def _retire(self) -> None:
        """Replicas that were to leave and are empty are gone."""
        replicas = self.state.replicas
        waiting = replicas["waiting"] + replicas["loading"]
        empty = (replicas["running"] == 0) & (waiting == 0) & (replicas["in_flight"] == 0)
        replicas["alive"][(replicas["leaving"] == 1) & empty] = 0

    def _fresh(self, count: int = 1) -> FleetState:
        """Replicas that begin now."""
        fresh = build.new_state(self.settings.model_copy(update={"replicas": count}), stepping=self._stepping)
        for name in ("now", "accounted", "last_completion", "joined"):
            fresh.replicas[name] = self.now_seconds
        return fresh

    def _join(self, count: int = 1) -> None:
        self.state = build.with_replicas(self.state, self._fresh(count))

    def _fail(self, number: int) -> None:
        again = self._abandon(number)
        self.state.replicas["alive"][number] = 0
        self.state.replicas["left"][number] = self.now_seconds
        self.deliver(again, 0, again.index.size)

    def _restart(self, number: int) -> None:
        self._settle(number)
        again = self._abandon(number)
        kernels.clear_cache(self.state, number)
        build.clear_tiers(self.state, number, self.settings.engine)
        self.state = build.with_holders(self.state)
        self.deliver(again, 0, again.index.size)

    def _settle(self, number: int) -> None:
        """Complete what the replica has in flight, transfers between its tiers included."""
        kernels.settle(self.state, number)
        if self.settings.engine.host_tier is not None:
            kernels.settle_tiers(self.state, number)

    def _abandon(self, number: int) -> Workload:
        """Take the replica's requests away, to start again elsewhere."""
        again = build.rows_of_live(self.state, number, self.now_seconds)
        self._accept(number, False)
        for live in self.live():
            if live.replica == number:
                kernels.abandon(self.state, number, live.slot, self.now_seconds)
        self.state.replicas["in_flight"][number] = 0
        self.requeued += again.index.size
        return again

    def _lose(self, workload: Workload, row: int) -> None:
        self._room_for_outcomes()
        outcome = np.zeros(1, layout.OUTCOME)
        outcome["index"], outcome["session"] = workload.index[row], workload.session[row]
        outcome["replica"], outcome["status"] = -1, layout.LOST
        outcome["prompt"], outcome["arrival"] = workload.prompt[row], workload.arrival[row]
        for name in ("scheduled", "first_token", "finish"):
            outcome[name] = np.nan
        self._collected.append(outcome.view(np.uint8))

    def apply(self, overrides: Mapping[str, Override]) -> None:
        """Switch to these overrides now. What a live vLLM would do only after a restart is done in place.

        A smaller cache drops its least recently used blocks; another block size clears the cache and preempts all.
        Tiers keep what still fits, as long as their chunks hold the same tokens; transfers under way are done at once.
        Another eviction policy takes over what is cached, in the order in which the present one would evict it; so
        does the same policy in a pool of another size, which knows nothing of the past either.
        """
        old, new = self.settings, apply_overrides(self.settings, overrides)
        load(*build.kernels_of(new.engine))
        replicas = range(self.state.replicas.size)
        disruptive = new.engine.async_scheduling != old.engine.async_scheduling or (
            new.engine.block_size != old.engine.block_size or new.engine.num_gpu_blocks != old.engine.num_gpu_blocks
        )
        new_tiers = (disruptive and old.engine.host_tier is not None) or (
            new.engine.host_tier != old.engine.host_tier
            or new.engine.disk_tier != old.engine.disk_tier
            or (new.engine.host_tier is not None and new.engine.chunk_bytes != old.engine.chunk_bytes)
        )
        pool = ("eviction", "num_gpu_blocks", "block_size")
        reorder = any(getattr(new.engine, name) != getattr(old.engine, name) for name in pool)
        for number in replicas:
            if disruptive or new_tiers:
                self._room_for_outcomes()
                self._settle(number)
            else:
                kernels.dissolve_flow(self.state, number)
            if reorder and old.engine.eviction != "lru":
                kernels.unload_policy(self.state, number)
        if new.engine.block_size != old.engine.block_size:
            for number in replicas:
                while self.state.replicas["running"][number] > 0:
                    kernels.preempt_last(self.state, number)
                kernels.clear_cache(self.state, number)
        if new.engine.num_gpu_blocks != old.engine.num_gpu_blocks:
            self.state = build.with_pool(self.state, new.engine.num_gpu_blocks)
        for number in replicas:
            build.write_engine(
                self.state.engines[number : number + 1], new.engine, new.step_time, stepping=self._stepping
            )
            self.state.replicas["parked"][number] = 0
            self.state.quiet_until[number] = -np.inf
            kernels.reorder_queue(self.state, number)
        if new.engine.block_size != old.engine.block_size:
            self.state = build.with_block_size(self.state, new.engine.block_size)
            self.state.requests["known"] = self.state.requests["covered"] // new.engine.block_size
        if new_tiers:
            self.state = build.with_tiers(self.state, old.engine, new.engine)
        if new_tiers or new.engine.block_size != old.engine.block_size:
            for live in self.live():  # smaller blocks need longer block tables, tiers room for marks
                self.set_output(live, int(self.state.requests["output"][live.replica, live.slot]))
                if new.engine.host_tier is not None:
                    kernels.clear_marks(self.state, live.replica, live.slot)
        if reorder:
            self.state = build.with_eviction(self.state, new.engine, self.now_seconds)
        self.state.fleet["router"] = build.ROUTERS[new.router]
        self.state.fleet["max_imbalance"] = new.router_max_imbalance
        self.state = build.with_holders(self.state)
        self.settings = new
        if reorder:
            self.foresee(self._pending())
        alive = [number for number in replicas if self.state.replicas["accepting"][number]]
        if "replicas" in overrides and new.replicas > len(alive):
            self._join(new.replicas - len(alive))
        for number in alive[new.replicas :] if "replicas" in overrides else []:
            self._accept(number, False)
            self._let_go(number)
        self._retire()


def simulate(
    settings: FleetSettings, workload: Workload, *, stepping: bool = False, sample_seconds: float = 0.0
) -> Fleet:
    """Run a workload to its end on a cold fleet."""
    start = float(workload.arrival[0]) if workload.arrival.size else 0.0
    fleet = Fleet(settings, stepping=stepping, start_seconds=start)
    if sample_seconds > 0.0:
        fleet.sample_every(sample_seconds)
    fleet.feed(workload)
    fleet.run()
    return fleet


def simulate_parts(
    settings: FleetSettings, parts: Iterable[Workload], *, stepping: bool = False, sample_seconds: float = 0.0
) -> tuple[Fleet, Records]:
    """Run a workload that comes in parts, each later than the one before, holding one part at a time.

    Returns the fleet and the outcomes in the order in which they ended, without their work vectors: half the memory.
    """
    fleet: Fleet | None = None
    ended = _without_work(np.zeros(0, layout.OUTCOME))
    count = 0

    def take(outcomes: Records) -> None:
        """Into an array that grows in place: neither parts nor a copy are held beside it."""
        nonlocal count
        if count + outcomes.size > ended.size:
            ended.resize(count + outcomes.size + ended.size // 4, refcheck=False)
        ended[count : count + outcomes.size] = _without_work(outcomes)
        count += outcomes.size

    for part in parts:
        if part.arrival.size == 0:
            continue
        start = float(part.delivered[0])
        if fleet is None:
            fleet = Fleet(settings, stepping=stepping, start_seconds=start)
            if sample_seconds > 0.0:
                fleet.sample_every(sample_seconds)
        fleet.run(start)
        take(fleet.collect())
        fleet.feed(part)
    if fleet is None:
        fleet = Fleet(settings, stepping=stepping)
    fleet.run()
    take(fleet.collect())
    return fleet, ended[:count]


def _without_work(outcomes: Records) -> Records:
    kept = [name for name in layout.OUTCOME.names or () if name not in ("prefill_work", "decode_work")]
    return rfn.repack_fields(outcomes[kept])
