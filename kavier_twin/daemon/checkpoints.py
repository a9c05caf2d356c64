"""Checkpoints of a running daemon: mirrors, scores and source positions together, so that none is ahead of another."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from connectors.source import Seekable, Source
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.mirror import checkpoint_file, mirror_state
from kavier_twin.mirror.checkpoint_file import CheckpointError, Saved
from kavier_twin.mirror.fidelity.cache import CacheWatch
from kavier_twin.mirror.fidelity.power import PowerWatch

log = logging.getLogger(__name__)

EVERY_SECONDS: Final = 30.0
KEEP: Final = 3


class Checkpoints:
    """Writes them now and then, and finds the last good one at start."""

    def __init__(self, directory: Path, every_seconds: float = EVERY_SECONDS, keep: int = KEEP) -> None:
        self.directory = directory
        self.failures = 0
        self.written_unix_seconds = math.nan
        self._every_seconds = every_seconds
        self._keep = keep
        self._sequence = 0
        self._due = time.monotonic() + every_seconds
        self._trouble = ""

    def restore(self, pools: Mapping[str, PoolTwin], sources: Iterable[Source]) -> bool:
        """Bring pools and sources to the last state that can be used. What is wrong with others is logged.

        Returns whether there was one.

        A pool that is not in it, or is another fleet's there, begins anew; if all do, so do the sources.
        """
        saved, number, problems = checkpoint_file.newest(self.directory)
        self._sequence = checkpoint_file.last_number(self.directory)  # also of those that cannot be read
        for problem in problems:
            log.warning("checkpoint %s", problem)
        if saved is None:
            log.info("no checkpoint in %s: the twin starts from scratch", self.directory)
            for pool in pools.values():
                pool.scores.resume(self._sequence, None)
            return False
        restored = [name for name, pool in pools.items() if self._restore(pool, number, saved)]
        if restored:
            for key, source in seekable(sources):
                source.seek(saved.document["positions"].get(key, {}))
        return bool(restored)

    def _restore(self, pool: PoolTwin, number: int, saved: Saved) -> bool:
        document = saved.document["pools"].get(pool.name)
        try:
            if document is None:
                raise CheckpointError("the checkpoint does not contain it")
            fleet = Saved(document["mirror"], _of(saved, "fleet", pool))
            mirror = mirror_state.restore(fleet, pool.mirror.settings, pool.fleet)
        except CheckpointError as error:
            log.warning(
                "checkpoint %d in %s cannot be used for pool %s, which starts from scratch: %s",
                number,
                self.directory,
                pool.name,
                error,
            )
            pool.scores.resume(self._sequence, None)
            return False
        caches, power = CacheWatch.restored(document["caches"]), PowerWatch.restored(document["power"])
        pool.resume(mirror, caches, power)
        pool.scores.resume(number, Saved(document["scores"], _of(saved, "scores", pool)))
        if pool.metrics and document["metrics"]:
            pool.metrics.restore(document["metrics"])
        log.info("pool %s resumed from checkpoint %d with %d finished requests", pool.name, number, mirror.finished)
        return True

    @property
    def due(self) -> bool:
        """Whether it is time for one."""
        return time.monotonic() >= self._due

    def take(self, pools: Iterable[PoolTwin], sources: Iterable[Source]) -> Saved:
        """The state now, as something that does not change any more: for the next `write`."""
        self._sequence += 1
        positions = {key: source.positions() for key, source in seekable(sources)}
        documents: dict[str, Any] = {}
        arrays: dict[str, Any] = {}
        for pool in pools:
            mirror, scores = mirror_state.save(pool.mirror), pool.scores.save(self._sequence)
            documents[pool.name] = {
                "mirror": mirror.document,
                "caches": pool.caches.save(),
                "power": pool.power.save(),
                "metrics": pool.metrics.save() if pool.metrics else None,
                "scores": scores.document,
            }
            # Those of a kept fork, which nothing changes any more.
            arrays |= {f"fleet/{pool.name}/{name}": array for name, array in mirror.arrays.items()}
            arrays |= {f"scores/{pool.name}/{name}": array for name, array in scores.arrays.items()}
        return Saved({"pools": documents, "positions": positions}, arrays)

    def write(self, saved: Saved) -> None:
        """To disk. Trouble is counted, and logged once for each kind; the last good one stays."""
        self._due = time.monotonic() + self._every_seconds
        try:
            checkpoint_file.write(self.directory, self._sequence, saved, self._keep)
        except OSError as error:
            self.failures += 1
            if str(error) != self._trouble:
                log.error("cannot write a checkpoint to %s: %s; the last one is kept", self.directory, error)
            self._trouble = str(error)
            return
        self._trouble = ""
        self.written_unix_seconds = time.time()


def _of(saved: Saved, part: str, pool: PoolTwin) -> dict[str, Any]:
    """The arrays of this part of a pool, by their own names."""
    split = ((name.rpartition("/"), array) for name, array in saved.arrays.items())
    return {own: array for (place, _, own), array in split if place == f"{part}/{pool.name}"}


def seekable(sources: Iterable[Source]) -> Iterator[tuple[str, Seekable]]:
    """The sources that have a position, each under its place and name."""
    for number, source in enumerate(sources):
        if isinstance(source, Seekable):
            yield f"{number} {source.name}", source
