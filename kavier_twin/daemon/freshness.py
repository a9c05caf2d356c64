"""Whether a pool's figures are stale: a source that dies must make the twin say so, never silently wrong."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from connectors.source import LogSource
from kavier_twin.daemon.feed import Feed
from kavier_twin.serve.models import SourceState

log = logging.getLogger(__name__)

STALE_AFTER_SECONDS: Final = 60.0
CAUGHT_UP_SECONDS: Final = 10.0
_ROUNDS: Final = 3  # that a source which speaks regularly may miss


class Freshness:
    """Follows the sources between looks. A request stream may be silent; metrics may not; a check never matters."""

    def __init__(self, stale_after_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._stale_after_seconds = stale_after_seconds
        self._clock = clock
        self._began = clock()
        self._troubled_since: dict[int, float] = {}
        self._told: dict[str, frozenset[str]] = {}

    def look(self, feeds: Sequence[Feed], states: Sequence[SourceState]) -> list[str]:
        """Why each feed is stale now, empty where it is not."""
        now = self._clock()
        found = []
        for number, (feed, state) in enumerate(zip(feeds, states, strict=True)):
            if state.trouble and not state.ended:
                self._troubled_since.setdefault(number, now)
            else:
                self._troubled_since.pop(number, None)
            never = state.ended or feed.checks_only
            found.append("" if never else self._reason(number, feed, state, now))
        return found

    def is_caught_up(self, feed: Feed, state: SourceState) -> bool:
        """Whether a source has been read up to the present; one that is no log always has."""
        if not isinstance(feed.source, LogSource):
            return True
        recent = self._clock() - state.last_record_seconds < CAUGHT_UP_SECONDS
        return not state.trouble and (state.lag_records == 0 or recent)

    def tell(self, pool: str, stale: Iterable[str]) -> None:
        """Log a change of the sources that are stale."""
        reasons = {reason.partition(": ")[0]: reason for reason in stale}
        before = self._told.get(pool, frozenset())
        for name in reasons.keys() - before:
            log.warning("pool %s: figures are stale: %s", pool, reasons[name])
        if before and not reasons:
            log.info("pool %s: figures are fresh again", pool)
        self._told[pool] = frozenset(reasons)

    def _reason(self, number: int, feed: Feed, state: SourceState, now: float) -> str:
        limit = self._stale_after_seconds
        if now - self._troubled_since.get(number, now) > limit:
            return f"{state.name}: {state.trouble}"
        newest = state.last_record_seconds if math.isfinite(state.last_record_seconds) else self._began
        if feed.every_seconds is not None:
            limit = max(limit, _ROUNDS * feed.every_seconds)
            if now - newest > limit:
                return f"{state.name}: no data for more than {limit:g} s"
        elif state.lag_records > 0 and now - newest > limit:
            return f"{state.name}: its newest data is more than {limit:g} s old"
        return ""
