"""The hit ratio that a prefix cache of each size would have had on the requests of the last while."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

Found = tuple[int, int]
"""Consecutive blocks in a recency stack: the distance of what lies above them, and how many they are."""

FACTORS: Final = 2.0 ** np.arange(-2.0, 3.0 + 1e-9, 0.25)  # of today's capacity, [21]
LARGEST_FACTOR: Final = float(FACTORS[-1])
SHOWN_FACTORS: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
_BUFFERED: Final = 4096
_SLICES: Final = 60  # that a window is forgotten in


class HitCurve:
    """Hits by capacity. `capacity_blocks` is today's usable size of a replica; sizes are its multiples `FACTORS`.

    Requests older than `window_seconds` are forgotten, a sixtieth of the window at a time.
    """

    def __init__(self, capacity_blocks: int, block_size: int, window_seconds: float) -> None:
        self.capacities = np.maximum(1.0, np.round(capacity_blocks * FACTORS))
        self._block_size = block_size
        self._slice_seconds = window_seconds / _SLICES
        self._slices: deque[_Slice] = deque()
        self._depths: list[int] = []
        self._blocks: list[int] = []
        self._replicas = 1  # that these belong to

    def add(
        self,
        time_seconds: float,
        prompt_tokens: int,
        found: Iterable[Found],
        *,
        missing_blocks: int = 0,
        replicas: int = 1,
    ) -> None:
        """Add a request, with what a stack holds of its prompt, from the head on.

        `missing_blocks` corrects for sampling: blocks looked up less those that the tracked keys stand for.
        `replicas`: how many caches of each capacity the stack stands for.
        """
        number = time_seconds // self._slice_seconds if math.isfinite(self._slice_seconds) else 0.0
        if not self._slices or number > self._slices[-1].number:
            self._flush()
            self._slices.append(_Slice(number, self.capacities.size))
            while self._slices[0].number <= number - _SLICES:
                self._slices.popleft()
        if replicas != self._replicas or len(self._depths) > _BUFFERED:
            self._flush()
            self._replicas = replicas
        now = self._slices[-1]
        now.prompt_tokens += prompt_tokens
        now.missing_blocks += missing_blocks
        reached = 0
        for depth, blocks in found:
            reached = max(reached, depth)  # what lies behind a miss is no hit
            self._depths.append(reached)
            self._blocks.append(blocks)
            reached += blocks if depth else 0

    @property
    def prompt_tokens(self) -> int:
        """Of all requests in the window."""
        return sum(part.prompt_tokens for part in self._slices)

    def hit_ratios(self) -> Floats:
        """Share of the prompt tokens hit at each of `capacities`, [21]; NaN without a request."""
        self._flush()
        tokens = self.prompt_tokens
        if not tokens:
            return np.full(self.capacities.size, np.nan)
        blocks = sum(part.hit_blocks + part.missing_blocks for part in self._slices)
        return np.clip(blocks * self._block_size / tokens, 0.0, 1.0)

    def _flush(self) -> None:
        if self._depths:
            reach = self._replicas * self.capacities[:, None] - np.array(self._depths, np.float64)
            hits = np.clip(reach, 0.0, np.array(self._blocks, np.float64)).sum(axis=1)
            self._slices[-1].hit_blocks += hits
            self._depths, self._blocks = [], []


class _Slice:
    def __init__(self, number: float, sizes: int) -> None:
        self.number = number
        self.prompt_tokens = 0
        self.missing_blocks = 0.0
        self.hit_blocks = np.zeros(sizes)
