"""Checkpoints of a running daemon: mirror and source positions together, so that neither is ahead of the other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from connectors.source import Seekable, Source
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import copy_state
from kavier_twin.telemetry import RequestFinished
from kavier_twin.twin import checkpoint, mirror_state
from kavier_twin.twin.checkpoint import CheckpointError, Saved
from kavier_twin.twin.mirror import Mirror, MirrorSettings

log = logging.getLogger(__name__)

EVERY_SECONDS: Final = 30.0
KEEP: Final = 3


@dataclass(frozen=True)
class Restored:
    """A daemon's state as it was."""

    mirror: Mirror
    ends: list[RequestFinished]
    positions: dict[str, Any]


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

    def restore(self, settings: MirrorSettings, fleet: FleetSettings) -> Restored | None:
        """The last state that can be used; None to begin anew. What is wrong with others is logged."""
        saved, self._sequence, problems = checkpoint.newest(self.directory)
        for problem in problems:
            log.warning("checkpoint %s", problem)
        if saved is None:
            log.info("no checkpoint in %s: the twin begins anew", self.directory)
            return None
        try:
            mirror = mirror_state.restore(saved, settings, fleet)
        except CheckpointError as error:
            log.warning("checkpoint %d in %s: %s; the twin begins anew", self._sequence, self.directory, error)
            return None
        daemon = saved.document["daemon"]
        log.info("going on from checkpoint %d, %d requests finished by then", self._sequence, mirror.finished)
        return Restored(mirror, [RequestFinished.model_validate(end) for end in daemon["ends"]], daemon["positions"])

    @property
    def due(self) -> bool:
        """Whether it is time for one."""
        return time.monotonic() >= self._due

    def take(self, mirror: Mirror, ends: Iterable[RequestFinished], sources: Iterable[Source]) -> Saved:
        """The state now, as something that does not change any more."""
        found = mirror_state.save(mirror)
        positions = {key: source.positions() for key, source in seekable(sources)}
        daemon = {"ends": [end.model_dump(mode="json", exclude_defaults=True) for end in ends], "positions": positions}
        return Saved({**found.document, "daemon": daemon}, copy_state(mirror.fleet.state)._asdict())

    def write(self, saved: Saved) -> None:
        """To disk. Trouble is counted, and logged once for each kind; the last good one stays."""
        self._due = time.monotonic() + self._every_seconds
        try:
            checkpoint.write(self.directory, self._sequence + 1, saved, self._keep)
        except OSError as error:
            self.failures += 1
            if str(error) != self._trouble:
                log.error("no checkpoint could be written to %s: %s; the last good one stays", self.directory, error)
            self._trouble = str(error)
            return
        self._sequence += 1
        self._trouble = ""
        self.written_unix_seconds = time.time()


def seekable(sources: Iterable[Source]) -> Iterator[tuple[str, Seekable]]:
    """The sources that have a position, each under its place and name."""
    for number, source in enumerate(sources):
        if isinstance(source, Seekable):
            yield f"{number} {source.name}", source
