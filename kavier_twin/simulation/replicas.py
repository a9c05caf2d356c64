"""What happens to the replicas of a fleet, and to all of its engines, at the present moment.

`Fleet` plans it for later; the mirror does it when its witnesses say so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from kavier_twin.simulation import build
from kavier_twin.simulation.compiler.libraries import load
from kavier_twin.simulation.data_plane import DataPlane, Live
from kavier_twin.simulation.kernels import entries as kernels
from kavier_twin.simulation.policies import Override, apply_overrides
from kavier_twin.simulation.power import alive_seconds
from kavier_twin.simulation.state import FleetState
from kavier_twin.simulation.switch_policy import switch_policy
from kavier_twin.simulation.workload import Workload, take_rows


class Replicas(DataPlane):
    """A fleet whose replicas come and go."""

    # --- a replica's life -----------------------------------------------------------------------------------------

    def add(self, count: int = 1) -> None:
        """So many replicas with cold caches serve from now on."""
        self.state = build.with_replicas(self.state, self._fresh(count))

    def accept(self, number: int, accepting: bool) -> None:
        """Whether routers send the replica requests. Raises ValueError where there is no such replica."""
        if not self.has(number):
            raise ValueError(f"there is no replica {number}")
        self.state.replicas["accepting"][number] = accepting
        self.state.quiet_until[number] = -np.inf

    def let_go(self, number: int) -> None:
        """The replica gets no new requests and is gone once it has ended those it has."""
        self.accept(number, False)
        self.state.replicas["leaving"][number] = 1
        self.state.replicas["left"][number] = min(self.now_seconds, self.state.replicas["left"][number])
        self.retire()

    def stop(self, number: int) -> None:
        """The replica stops: its caches are lost, its requests begin again elsewhere, keeping their arrival times."""
        again = self._abandon(number)
        self.retire()
        if self.has(number):
            self._begin_anew(number)
            self.accept(number, False)
        self.deliver(again, 0, again.index.size)

    def crash(self, number: int) -> None:
        """The replica is gone; its requests begin again elsewhere, keeping their arrival times."""
        again = self._abandon(number)
        self.state.replicas["alive"][number] = 0
        self.state.replicas["left"][number] = self.now_seconds
        self.deliver(again, 0, again.index.size)

    def retire(self) -> None:
        """Replicas that were to leave and are empty are gone."""
        replicas = self.state.replicas
        waiting = replicas["waiting"] + replicas["loading"]
        empty = (replicas["running"] == 0) & (waiting == 0) & (replicas["in_flight"] == 0)
        replicas["alive"][(replicas["leaving"] == 1) & empty] = 0

    def _fresh(self, count: int = 1) -> FleetState:
        """Replicas that begin now."""
        settings = self.settings.model_copy(update={"replicas": count})
        return build.new_state(settings, stepping=self.stepping, start_seconds=self.now_seconds)

    def _begin_anew(self, number: int) -> None:
        """The replica, which has no requests, begins with cold caches. Its counters and the time it was there go on."""
        past_seconds = alive_seconds(self.state.replicas[number : number + 1], self.now_seconds)
        build.begin_anew(self.state, number, self._fresh())
        self.state.replicas["joined"][number] -= past_seconds

    def _abandon(self, number: int) -> Workload:
        """Take the replica's requests away. Returns them, to begin again now."""
        load(*build.kernels_of(self.settings.engine))
        self.accept(number, False)
        again = build.rows_of_live(self.state, number, self.now_seconds)
        slots = [live.slot for live in self.live() if live.replica == number]
        for slot in slots:
            kernels.abandon(self.state, number, slot, self.now_seconds)
        self.state.replicas["in_flight"][number] = 0
        if slots and self.state.replicas["leaving"][number]:
            self.state.replicas["left"][number] = self.now_seconds  # it stayed until now to end them
        return again

    # --- what an observer of the real fleet says of replicas ------------------------------------------------------

    def has(self, number: int) -> bool:
        """Whether this replica is there, be it serving, draining or stopped."""
        return 0 <= number < self.state.replicas.size and bool(self.state.replicas["alive"][number])

    @property
    def replicas_alive(self) -> int:
        """Those that are there, the leaving ones included."""
        return int(self.state.replicas["alive"].sum())

    def admit(self) -> int:
        """A replica joins now with a cold cache, in the place of one that is gone if possible. Returns its number."""
        gone = np.flatnonzero(self.state.replicas["alive"] == 0)
        if gone.size:
            self._begin_anew(int(gone[0]))
        else:
            self.add()
        self._count_replicas()
        return int(gone[0]) if gone.size else self.state.replicas.size - 1

    def dismiss(self, number: int) -> None:
        """`let_go`, and policies count from the replicas that remain."""
        self.let_go(number)
        self._count_replicas()

    def recall(self, number: int) -> None:
        """One that was dismissed, and is not gone, stays."""
        self.accept(number, True)
        self.state.replicas["leaving"][number] = 0
        self.state.replicas["left"][number] = np.inf
        self._count_replicas()

    def begin_anew(self, number: int, again: Collection[int]) -> list[Live]:
        """The replica begins anew now, with a cold cache. Returns where those of its requests are that start again.

        These are the ones whose index is in `again`; the others are gone without an outcome.
        """
        rows = self._abandon(number)
        self._begin_anew(number)
        rows = take_rows(rows, np.flatnonzero(np.isin(rows.index, list(again))))
        rows = rows._replace(replica=np.full(rows.index.size, number, np.int64))
        places = self.deliver(rows, 0, rows.index.size)
        found = [Live(int(index), *map(int, place)) for index, place in zip(rows.index, places, strict=True)]
        return [live for live in found if live.slot >= 0]

    def _count_replicas(self) -> None:
        """What policies count from."""
        accepting = int(self.state.replicas["accepting"].sum())
        self.settings = self.settings.model_copy(update={"replicas": accepting})

    # --- policies -------------------------------------------------------------------------------------------------

    def apply(self, overrides: Mapping[str, Override]) -> None:
        """Switch to these overrides now, as `switch_policy` says. Replicas beyond a smaller number are let go."""
        new = apply_overrides(self.settings, overrides)
        switch_policy(self, new)
        if "replicas" in overrides:
            accepting = np.flatnonzero(self.state.replicas["accepting"])
            if new.replicas > accepting.size:
                self.add(new.replicas - accepting.size)
            for number in accepting[new.replicas :]:
                self.let_go(int(number))
        self.retire()
