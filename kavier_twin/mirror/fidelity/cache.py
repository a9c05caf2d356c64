"""The mirrored KV caches beside the real ones that KV events tell of, and mirrored caches filled from real ones."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple

from kavier_twin.mirror.fidelity.kv_cache_view import CacheShare, KvCacheView
from kavier_twin.simulation.cached_blocks import FILLED, cached_keys, fill_cache, unknown_tails
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.state import FleetState
from kavier_twin.telemetry import KvBlocksRemoved, KvBlocksStored, KvEventBatch

EVERY_SECONDS: Final = 10.0  # of event time, between comparisons
TOLERANCE_SECONDS: Final = 0.25
FORGET_SECONDS: Final = 3_600.0  # without a batch of an engine that nothing mirrors any more
MAX_PENDING_BATCHES: Final = 20_000  # of one engine: twice what vLLM keeps for replay
_FEW_BLOCKS: Final = 32  # of which not one in common says that the stream's hashes are not vLLM's

Engine = tuple[str, str]
"""Pod, and data-parallel rank within it."""
ReplicaOf = Callable[[str, str], int | None]
"""Which replica mirrors an engine, None if none does."""


class Compared(NamedTuple):
    """A comparison. `comparable` is false where the stream's hashes are not the engine's own."""

    time_seconds: float
    share: CacheShare
    comparable: bool


class CacheWatch:
    """Follows every engine's KV events up to where the mirror stands, and compares now and then.

    A mirror without a past gets the blocks that an engine held when the mirror began (`fill`).
    """

    def __init__(self, *, fill: bool = True, tolerance_seconds: float = TOLERANCE_SECONDS) -> None:
        self.compared: dict[Engine, Compared] = {}
        self.filled: dict[Engine, int] = {}  # blocks; of those not filled yet nothing
        self._fill = fill
        self._tolerance_seconds = tolerance_seconds
        self._watched: dict[Engine, _Watched] = {}
        self._began_seconds = math.nan
        self._due_seconds: dict[Engine, float] = {}  # of the next comparison

    @property
    def engines(self) -> list[Engine]:
        """Those that told of their cache."""
        return list(self._watched)

    def share(self, engine: Engine) -> CacheShare | None:
        """The last comparison; None where nothing can be compared."""
        compared = self.compared.get(engine)
        return compared.share if compared is not None and compared.comparable else None

    def take(self, batch: KvEventBatch) -> None:
        """Take in a batch; those of one engine come in order."""
        self._watched.setdefault((batch.pod, batch.engine), _Watched()).add(batch)

    def save(self) -> dict[str, Any]:
        """What is known of the real caches, as JSON types."""
        return {
            "filled": [[*engine, blocks] for engine, blocks in self.filled.items()],
            "engines": [[*engine, *watched.save()] for engine, watched in self._watched.items()],
        }

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> CacheWatch:
        """What `save` gave, beside a mirror that has a past."""
        watch = cls(fill=False)
        watch.filled = {(pod, rank): blocks for pod, rank, blocks in saved["filled"]}
        watch._watched = {(pod, rank): _Watched.restored(*rest) for pod, rank, *rest in saved["engines"]}
        return watch

    def follow(self, fleet: Fleet, replica_of: ReplicaOf) -> None:
        """Catch up with the mirrored fleet. The first time, it is about to run its first request."""
        now, ready = fleet.now_seconds, self.engines
        if math.isnan(self._began_seconds):
            self._began_seconds = now
        else:  # what came too late to be there at the start
            ready = [engine for engine in ready if self._watched[engine].knows(self._began_seconds)]
        if self._fill:
            self._fill_those(fleet, replica_of, ready)
        for engine, watched in list(self._watched.items()):
            # Without a later batch, as of an idle engine, nobody knows whether all have come that belong to this time.
            if now >= self._due_seconds.get(engine, -math.inf) and watched.knows(now + self._tolerance_seconds):
                self._due_seconds[engine] = now + EVERY_SECONDS
                watched.view.bound(fleet.settings.engine.num_gpu_blocks)
                self._compare(fleet.state, replica_of(*engine), engine, now)
            elif replica_of(*engine) is None and watched.newest_seconds < now - FORGET_SECONDS:
                del self._watched[engine]
                self._due_seconds.pop(engine, None)
                self.compared.pop(engine, None)

    def _compare(self, state: FleetState, number: int | None, engine: Engine, now: float) -> None:
        watched = self._watched[engine]
        watched.apply_until(now - self._tolerance_seconds)
        share = None if number is None else watched.share(state, number, now + self._tolerance_seconds)
        if share is None:
            self.compared.pop(engine, None)
        else:
            few = min(share.both + share.only_mirrored, share.both + share.only_real) < _FEW_BLOCKS
            self.compared[engine] = Compared(now, share, few or share.both > 0)

    def _fill_those(self, fleet: Fleet, replica_of: ReplicaOf, engines: Sequence[Engine]) -> None:
        for engine in engines:
            number = replica_of(*engine)
            if engine in self.filled or number is None or fleet.settings.engine.eviction != FILLED:
                continue
            watched = self._watched[engine]
            watched.apply_until(self._began_seconds)
            have = set(cached_keys(fleet.state, number).tolist())
            missing = [key for key in watched.view.keys_by_use() if key not in have]
            self.filled[engine] = fill_cache(fleet.state, number, missing)


class _Watched:
    """One engine: the cache as of some moment, and the batches since."""

    def __init__(self) -> None:
        self.view = KvCacheView()
        self.newest_seconds = -math.inf
        self._pending: deque[KvEventBatch] = deque()

    def add(self, batch: KvEventBatch) -> None:
        self.newest_seconds = batch.time_seconds
        self._pending.append(batch)
        if len(self._pending) > MAX_PENDING_BATCHES:  # the mirror is far behind: rather ahead of it than without end
            self.view.apply(self._pending.popleft())

    def save(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        pending = [batch.model_dump(mode="json") for batch in self._pending]
        return self.view.save(), pending

    @classmethod
    def restored(cls, view: dict[str, Any], pending: list[dict[str, Any]]) -> _Watched:
        watched = cls()
        watched.view = KvCacheView.restored(view)
        for batch in map(KvEventBatch.model_validate, pending):
            watched.add(batch)
        return watched

    def knows(self, time_seconds: float) -> bool:
        """Whether all batches up to a time have come: a later one has."""
        return self.newest_seconds > time_seconds

    def apply_until(self, time_seconds: float) -> None:
        while self._pending and self._pending[0].time_seconds <= time_seconds:
            self.view.apply(self._pending.popleft())

    def share(self, state: FleetState, number: int, until_seconds: float) -> CacheShare | None:
        """The mirrored cache beside the real one between the last batch applied and `until_seconds`.

        A block is in both if the real cache held it at any moment in between, and only in the real one if it held it
        all the time: simulated and real steps begin at slightly different moments, and an engine publishes what a
        step did at its end. None where the real cache is not known.
        """
        upcoming = list(takewhile(lambda batch: batch.time_seconds <= until_seconds, self._pending))
        if not self.view.exact or not all(batch.continues for batch in upcoming):
            return None
        return _share(state, number, self.view, upcoming)


def _share(state: FleetState, number: int, view: KvCacheView, upcoming: Sequence[KvEventBatch]) -> CacheShare:
    ever = {link.key: link.parent for link in view.links.values()}
    always = set(ever)
    moving = view.fork() if upcoming else view
    for batch in upcoming:
        for event in batch.events:
            if isinstance(event, KvBlocksRemoved):
                always -= {moving.links[block].key for block in event.block_hashes if block in moving.links}
        moving.apply(batch)
        for event in batch.events:
            if isinstance(event, KvBlocksStored):
                links = [moving.links[block] for block in event.block_hashes if block in moving.links]
                ever |= {link.key: link.parent for link in links}
    mirrored = set(cached_keys(state, number).tolist())
    both = len(mirrored & ever.keys())
    only_mirrored = len(mirrored) - both
    # Outputs whose hashes nobody has told yet: taken for real blocks that nothing else explains, in the same place.
    unexplained: dict[int, list[int]] = {}
    for key in ever.keys() - mirrored:
        unexplained.setdefault(ever[key], []).append(key)
    for key, count in unknown_tails(state, number):
        for place in range(count):
            if not unexplained.get(key):
                only_mirrored += count - place
                break
            key = unexplained[key].pop()
            mirrored.add(key)
            both += 1
    return CacheShare(both, only_mirrored, len(always - mirrored))
