"""What a live pool's prefix cache is worth and why it missed, from the requests that its mirror applied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from kavier_twin.mirror.applied import Applied, Arrived, Dropped, Ended, GivenUp, Restarted
from kavier_twin.reuse.watch import Content, ReuseWatch
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.workload import make_workload
from kavier_twin.telemetry import RequestSeen

_RECENT_SHARE: Final = 0.01  # of the mean output length that each request counts for


class PoolReuse:
    """Feeds a `ReuseWatch`. A request starts when it arrives: waiting requests count as running.

    Requests stay where they ran; only where no record names a pod does the router of the settings count. Nothing is
    kept across a restart of the daemon.
    """

    def __init__(self) -> None:
        self.watch: ReuseWatch | None = None  # None before the first request with block hashes
        self._settings: FleetSettings | None = None
        self._seen: dict[str, RequestSeen] = {}
        self._restarted: dict[int, float] = {}
        self._output_tokens = 0.0

    def follow(self, applied: Iterable[Applied], fleet: Fleet) -> None:
        """Take in what the mirror applied, in its order."""
        for event in applied:
            if isinstance(event, Arrived):
                self._arrive(event, fleet)
            elif self.watch is None:
                continue
            elif isinstance(event, Ended):
                self._end(self.watch, event)
            elif isinstance(event, GivenUp):
                self._give_up(self.watch, event, fleet.now_seconds)
            elif isinstance(event, Restarted):
                if self._restarted.get(event.replica) != event.time_seconds:
                    self._restarted[event.replica] = event.time_seconds
                    self.watch.restarted(event.replica, event.time_seconds)
            elif isinstance(event, Dropped):
                self._seen.pop(event.id, None)
                self.watch.dropped(event.id, fleet.now_seconds)

    def _arrive(self, event: Arrived, fleet: Fleet) -> None:
        seen = event.seen
        if seen is None or event.replica < 0:
            return
        watch = self._watch_of(fleet.settings, seen)
        if watch is None:
            return
        self._seen[event.id] = seen
        watch.admitted(
            event.id, event.time_seconds, event.replica, seen.prompt_tokens, _content(seen, ()), self._output_tokens
        )

    def _end(self, watch: ReuseWatch, event: Ended) -> None:
        finished = event.finished
        seen = self._seen.pop(finished.id, None)
        if seen is None:
            return
        self._output_tokens += _RECENT_SHARE * (finished.output_tokens - self._output_tokens)
        cached = event.cached_tokens if finished.cached_tokens is None else finished.cached_tokens
        content = _content(seen, finished.block_hashes)
        watch.ended(finished.id, finished.time_seconds, cached or 0, finished.output_tokens, content)

    def _give_up(self, watch: ReuseWatch, event: GivenUp, time_seconds: float) -> None:
        """It counts with what the mirror assumed of it; its record may come later and changes nothing."""
        seen = self._seen.pop(event.id, None)
        if seen is not None and event.cached_tokens is not None:
            watch.ended(event.id, time_seconds, event.cached_tokens, max(1, event.output_tokens), _content(seen, ()))
        else:
            watch.dropped(event.id, time_seconds)

    def _watch_of(self, settings: FleetSettings, seen: RequestSeen) -> ReuseWatch | None:
        """The watch; a new one where engines turned out to have another cache."""
        engine = settings.engine
        before = None if self._settings is None else self._settings.engine
        same = before is not None and (engine.block_size, engine.num_gpu_blocks, engine.prefix_caching) == (
            before.block_size,
            before.num_gpu_blocks,
            before.prefix_caching,
        )
        if self.watch is not None and same:
            return self.watch
        if not seen.block_hashes:
            return None
        self._settings, self._seen = settings, {}
        misses = None if self.watch is None else self.watch.misses
        self.watch = ReuseWatch(
            engine.block_size,
            engine.num_gpu_blocks,
            prefix_caching=engine.prefix_caching,
            follows_prefixes=settings.router == "prefix_aware" and settings.replicas > 1 and not seen.pod,
        )
        if misses is not None:  # counters go on
            self.watch.misses = misses
        return self.watch


def _content(seen: RequestSeen, whole: tuple[int, ...]) -> Content:
    """Of the prompt, or with `whole` of prompt and output."""
    hashes, tokens = whole or seen.block_hashes, seen.block_tokens or 0
    chain = make_workload([0.0], 1, 1, chain=hashes, chain_starts=[0, len(hashes)]).chain
    covered = len(hashes) * tokens
    return Content(np.asarray(chain), tokens, covered if whole else min(covered, seen.prompt_tokens))
