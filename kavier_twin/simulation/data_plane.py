"""The data plane: requests through the engines of a fleet, from their arrival to their outcome.

All of it happens in compiled kernels over the arrays of `FleetState`. Python delivers arrivals, grows the arrays where
a kernel found no room, and ends or changes live requests as an observer of the real fleet says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation import build, future
from kavier_twin.simulation import state as layout
from kavier_twin.simulation.compiler.libraries import load
from kavier_twin.simulation.kernels import entries as kernels
from kavier_twin.simulation.power import Reading
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import FleetState, Records
from kavier_twin.simulation.turns import SessionLoad, Turns
from kavier_twin.simulation.workload import Workload, concatenate, take_rows, writable


@dataclass
class Samples:
    """The fleet over time, one entry a sampling tick."""

    time_seconds: list[float] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    kv_usage_ratio: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)  # what energy follows from

    def take(self, state: FleetState, now_seconds: float) -> None:
        """Append the fleet as it is now."""
        replicas, blocks = state.replicas, state.engines["num_blocks"] - 1
        used = int((blocks - replicas["free_blocks"]).sum())
        usable = int(blocks[replicas["alive"] == 1].sum())
        self.time_seconds.append(now_seconds)
        self.running.append(int(replicas["running"].sum()))
        self.waiting.append(int(replicas["waiting"].sum() + replicas["loading"].sum()))
        self.kv_usage_ratio.append(used / usable if usable else 0.0)
        self.readings.append(Reading.of(state, now_seconds))

    def copy(self) -> Samples:
        """An independent copy."""
        return Samples(**{name: list(values) for name, values in vars(self).items()})


class Live(NamedTuple):
    """A request that is in a replica now."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    replica: int
    slot: int


class Peaks(NamedTuple):
    """The most that any replica had at a time."""

    running: int  # requests
    batch_tokens: int  # in one batch; a batch of decodes has one token a request


class DataPlane:
    """The state of a fleet, the requests that are still to arrive, and its clock."""

    def __init__(
        self,
        settings: FleetSettings,
        *,
        stepping: bool = False,
        start_seconds: float = 0.0,
        state: FleetState | None = None,
    ) -> None:
        self.settings = settings
        self.stepping = stepping
        self.state = state or build.new_state(settings, stepping=stepping, start_seconds=start_seconds)
        self.now_seconds = start_seconds
        self.samples = Samples()
        self._arrivals: Workload | None = None
        self._next_row = 0
        self._sessions: SessionLoad | None = None
        self._collected: list[npt.NDArray[np.uint8]] = []  # outcomes, as bytes

    # --- requests to come -----------------------------------------------------------------------------------------

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
        rest = self.pending()
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

    def pending(self) -> Workload | None:
        """Requests fed that have not arrived, those of sessions left out; None if there are none."""
        if self._arrivals is None:
            return None
        return take_rows(self._arrivals, np.arange(self._next_row, self._arrivals.index.size))

    # --- through time ---------------------------------------------------------------------------------------------

    def advance(self, until_seconds: float) -> None:
        """Deliver the arrivals before this time and bring every replica up to it; infinity: until all have ended."""
        load(*build.kernels_of(self.settings.engine))
        if self._arrivals is not None:
            stop = int(np.searchsorted(self._arrivals.delivered, until_seconds, side="left"))
            if stop > self._next_row:
                self.deliver(self._arrivals, self._next_row, stop)
                self._next_row = stop
            if self._next_row == self._arrivals.index.size:
                self._arrivals, self._next_row = None, 0
        if self._sessions is not None:
            self._deliver_sessions(self._sessions, until_seconds)
        kernels.advance_all(self.state, until_seconds)
        ended = until_seconds if until_seconds < math.inf else float(self.state.replicas["now"].max())
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

    def _lose(self, workload: Workload, row: int) -> None:
        """No replica takes the request."""
        self.room_for_outcomes()
        outcome = np.zeros(1, layout.OUTCOME)
        outcome["index"], outcome["session"] = workload.index[row], workload.session[row]
        outcome["replica"], outcome["status"] = -1, layout.LOST
        outcome["prompt"], outcome["arrival"] = workload.prompt[row], workload.arrival[row]
        for name in ("scheduled", "first_token", "finish"):
            outcome[name] = np.nan
        self._collected.append(outcome.view(np.uint8))

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

    def room_for_outcomes(self) -> None:
        """Make room for the outcomes of all live requests and of one more."""
        fleet = self.state.fleet[0]
        if fleet["outcomes"] + fleet["live"] + 1 > self.state.outcomes.size:
            self.grow(layout.GROW_OUTCOMES)

    # --- what an observer of the real fleet says of live requests -----------------------------------------------------

    def finish(self, live: Live, output_tokens: int, chain: npt.NDArray[np.uint64] | None, covered: int) -> Any:
        """End a held request now with this many output tokens; returns its outcome (which `collect` returns too).

        `chain` (keys) and `covered` tell the content of prompt and output, as in `learn_chain`.
        """
        number, slot = live.replica, live.slot
        self._in_arena(kernels.set_output, number, slot, output_tokens, True)
        self._take_back(live, output_tokens)
        if chain is not None:
            self._in_arena(kernels.learn_chain, number, slot, chain, covered)
        self.room_for_outcomes()
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
        self._in_arena(kernels.set_output, live.replica, live.slot, output_tokens, False)

    def hold(self, replica: int, until_seconds: float) -> None:
        """The real replica was slower than this one, which waits until then before it schedules again."""
        hold_until = self.state.replicas["hold_until"]
        hold_until[replica] = max(hold_until[replica], until_seconds)

    def _in_arena(self, kernel: Callable[..., int], *arguments: object) -> None:
        """Call a kernel, with a larger arena where it asks for one."""
        load(*build.kernels_of(self.settings.engine))
        while kernel(self.state, *arguments) != layout.OK:
            self.grow(layout.GROW_ARENA)

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

    def sample(self) -> None:
        """Add the present to `samples`."""
        self.samples.take(self.state, self.now_seconds)

    def forget_peaks(self) -> None:
        """Begin `peaks` anew."""
        self.state.replicas["most_running"] = self.state.replicas["running"]
        self.state.replicas["most_batch_tokens"] = 0

    @property
    def peaks(self) -> Peaks:
        """How near its replicas came to the limits of their engines."""
        running = int(self.state.replicas["most_running"].max(initial=0))
        return Peaks(running, max(running, int(self.state.replicas["most_batch_tokens"].max(initial=0))))
