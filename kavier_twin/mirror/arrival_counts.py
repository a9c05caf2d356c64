"""How many requests arrived when: counts in buckets of event time, for hours finely and for weeks coarsely.

Memory is bounded: two rings of counters. What is in them follows from the arrivals alone, in any order within the
rings' reach.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kavier_twin.mirror.snapshot import COARSE_COUNT_SECONDS, COUNT_SECONDS, ArrivalCounts

FINE_BUCKETS: Final = 2_160  # six hours
COARSE_BUCKETS: Final = 50_400  # five weeks


class _Ring:
    """The counts of the last `size` buckets."""

    def __init__(self, width_seconds: float, size: int) -> None:
        self.width_seconds = width_seconds
        self.counts = np.zeros(size, np.int64)  # bucket i lies at i modulo size
        self.newest = -1  # the last bucket that can be counted in; older than `newest - size` is forgotten

    def add(self, time_seconds: float) -> None:
        bucket = int(time_seconds // self.width_seconds)
        self._move_to(bucket)
        if bucket > self.newest - self.counts.size:
            self.counts[bucket % self.counts.size] += 1

    def _move_to(self, bucket: int) -> None:
        if bucket > self.newest:
            fresh = np.arange(max(self.newest + 1, bucket - self.counts.size + 1), bucket + 1)
            self.counts[fresh % self.counts.size] = 0
            self.newest = bucket

    def whole(self, first_seconds: float, now_seconds: float) -> npt.NDArray[np.int64]:
        """The counts of the buckets that lie whole between the first arrival and now, oldest first."""
        end = int(now_seconds // self.width_seconds)
        begin = max(int(first_seconds // self.width_seconds) + 1, end - self.counts.size + 1)
        buckets = np.arange(begin, max(begin, end))
        return np.where(buckets <= self.newest, self.counts[buckets % self.counts.size], 0)


class RateHistory:
    """The arrivals of one pool over the last weeks."""

    def __init__(self) -> None:
        self._first_seconds = np.inf
        self._fine = _Ring(COUNT_SECONDS, FINE_BUCKETS)
        self._coarse = _Ring(COARSE_COUNT_SECONDS, COARSE_BUCKETS)

    def add(self, time_seconds: float) -> None:
        """A request arrived then (event time)."""
        self._first_seconds = min(self._first_seconds, time_seconds)
        self._fine.add(time_seconds)
        self._coarse.add(time_seconds)

    def fork(self) -> RateHistory:
        """An independent copy."""
        return deepcopy(self)

    def until(self, now_seconds: float) -> ArrivalCounts:
        """The counts of whole buckets since the first arrival; none after the last one are zeros too."""
        if not np.isfinite(self._first_seconds):
            return ArrivalCounts()
        return ArrivalCounts(
            fine=self._fine.whole(self._first_seconds, now_seconds),
            coarse=self._coarse.whole(self._first_seconds, now_seconds),
        )

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "first_seconds": self._first_seconds,
            "rings": [[ring.newest, ring.counts.tolist()] for ring in (self._fine, self._coarse)],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        self._first_seconds = saved["first_seconds"]
        for ring, (newest, counts) in zip((self._fine, self._coarse), saved["rings"], strict=True):
            ring.newest, ring.counts = newest, np.array(counts, np.int64)
