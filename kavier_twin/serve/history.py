"""The last hour of a pool, mirror beside reality, for the page's charts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from threading import Lock
from typing import Final, NamedTuple

from kavier_twin.serve.view import TwinView

CAPACITY: Final = 720
CLOSEST_SECONDS: Final = 0.5  # between two points of a twin that has just begun
KEPT_SECONDS: Final = 3_600.0  # wall clock
CHARTED: Final = (
    ("ttft_seconds", "p99"),
    ("e2e_seconds", "p95"),
    ("queue_seconds", "p95"),
    ("requests_waiting", ""),
    ("requests_running", ""),
    ("prefix_cache_hit_ratio", ""),
    ("kv_cache_usage_ratio", ""),
)


class Point(NamedTuple):
    """One moment: mirrored and observed value of each KPI in `CHARTED`; NaN where not known."""

    unix_seconds: float
    event_seconds: float
    values: tuple[tuple[float, float], ...]


class History:
    """Points of every pool, at most `CAPACITY` each. May be read while it is added to.

    When a pool's are full before the hour is, every other one is dropped and new ones come half as often: a twin that
    has run for a minute shows that minute finely, a month later the last hour is there with the same memory.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._points: dict[str, list[Point]] = {}
        self._apart: dict[str, float] = {}

    def add(self, views: Iterable[TwinView]) -> None:
        """Note what the views show, where their time has gone on."""
        with self._lock:
            for view in views:
                if math.isfinite(view.event_seconds):
                    self._add(view)

    def since(self, pool: str, unix_seconds: float = -math.inf) -> list[Point]:
        """The points made after a moment, oldest first."""
        with self._lock:
            return [point for point in self._points.get(pool, ()) if point.unix_seconds > unix_seconds]

    def _add(self, view: TwinView) -> None:
        points = self._points.setdefault(view.pool, [])
        apart = self._apart.setdefault(view.pool, CLOSEST_SECONDS)
        if points:
            last = points[-1]
            due = last.unix_seconds + apart - 0.5 * CLOSEST_SECONDS  # views come at intervals that jitter
            if view.event_seconds <= last.event_seconds or view.unix_seconds < due:
                return
        found = (view.value(kpi, statistic) for kpi, statistic in CHARTED)
        values = tuple((entry.mirrored, entry.observed) if entry else (math.nan, math.nan) for entry in found)
        points.append(Point(view.unix_seconds, view.event_seconds, values))
        if len(points) <= CAPACITY:
            return
        if view.unix_seconds - points[0].unix_seconds < KEPT_SECONDS:
            del points[1::2]
            self._apart[view.pool] = 2.0 * apart
        else:
            del points[0]
