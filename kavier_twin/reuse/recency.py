"""The recency stack of one replica's cached content: LRU stack distances without a cache of any one size.

An LRU cache of C blocks holds the C blocks at the top of this stack (Mattson et al., Evaluation techniques for storage
hierarchies, 1970). So one pass gives the hits at every capacity. vLLM's rules shape the stack: content of running
requests cannot be evicted and counts as the top; a request that ends frees its blocks tail first, so that the head of
its prompt lies above its tail; content that no hash identifies takes room and is never hit.

Requests, not blocks, are the frames of the stack: consecutive blocks of a prompt that the same request used last lie
next to each other. A lookup costs one dictionary access for each key and a few Fenwick sums for each request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

_FIRST_PLACES: Final = 1024


class Frame:
    """The content that one request used last. `place` is its position in the stack, -1 while the request runs."""

    __slots__ = ("freed_seconds", "keys", "place", "private_blocks", "shared_blocks")

    def __init__(self, keys: Sequence[int], private_blocks: int) -> None:
        self.keys = keys
        self.place = -1
        self.shared_blocks = 0  # of keys that still belong to this frame
        self.private_blocks = private_blocks  # that no hash identifies
        self.freed_seconds = math.nan

    @property
    def held(self) -> bool:
        """Whether its request runs."""
        return self.place < 0

    @property
    def blocks(self) -> int:
        """All that it keeps from eviction or from being the least recently used."""
        return self.shared_blocks + self.private_blocks


class Run(NamedTuple):
    """Consecutive keys of a prompt with the same frame. `depth` is the distance of what lies above it, in blocks."""

    keys: int
    blocks: int
    frame: Frame | None  # None: not in the stack
    depth: int  # 0 for content in use


class RecencyStack:
    """Frames of one replica by recency. Those that lie wholly below `most_blocks` blocks are forgotten.

    Where only some keys are tracked (`thin`), each stands for more blocks (spatial sampling: Waldspurger et al.,
    Efficient MRC construction with SHARDS, FAST 2015).
    """

    def __init__(self, most_blocks: int) -> None:
        self.most_blocks = most_blocks
        self.lost: dict[int, Frame] = {}  # content of the time before the replica's last restart
        self._begin()

    def _begin(self) -> None:
        self.held_blocks = 0
        self.free_blocks = 0
        self._frame_of: dict[int, Frame] = {}
        self._frames: dict[Frame, None] = {}  # those not held, least recent first
        self._sums = [0] * (_FIRST_PLACES + 1)  # a Fenwick tree of blocks by place
        self._next_place = 0

    def __contains__(self, key: int) -> bool:
        return key in self._frame_of

    def __len__(self) -> int:
        return len(self._frame_of)

    def look_up(self, keys: Sequence[int], blocks: Sequence[int]) -> Iterator[Run]:
        """What the stack knows of a prompt's keys, from its head; `blocks` are those that each key stands for."""
        at = 0
        for frame, same in groupby(map(self._frame_of.get, keys)):
            count = len(list(same))
            depth = 0 if frame is None or frame.held else self.held_blocks + self._above(frame)
            yield Run(count, sum(blocks[at : at + count]), frame, depth)
            at += count

    def admit(self, keys: Sequence[int], blocks: Sequence[int], private_blocks: int) -> Frame:
        """A request starts to run: its prompt's content is in use."""
        frame = Frame(keys, private_blocks)
        self.held_blocks += private_blocks
        self._take(frame, keys, blocks)
        return frame

    def end(
        self, frame: Frame, time_seconds: float, keys: Sequence[int], blocks: Sequence[int], private_blocks: int
    ) -> None:
        """Its request ended with this content, prompt and output: on top of the stack but for what others use."""
        self.held_blocks -= frame.blocks
        frame.private_blocks, frame.keys, frame.freed_seconds = private_blocks, keys, time_seconds
        if self._next_place >= len(self._sums) - 1:
            self._number_anew()
        frame.place = self._next_place
        self._next_place += 1
        self._frames[frame] = None
        self._add(frame.place, frame.blocks)
        self._take(frame, keys, blocks)
        while self._frames:
            oldest = next(iter(self._frames))
            if self.held_blocks + self.free_blocks - oldest.blocks < self.most_blocks:
                break
            self._forget(oldest)

    def clear(self) -> None:
        """All content is lost: the replica restarted. Requests under way must not be ended any more."""
        self.lost = self._frame_of
        self._begin()

    def thin(self, kept: Callable[[int], bool]) -> None:
        """Track fewer keys. The blocks of the frames stay: the keys left must be looked up with a larger weight."""
        self._frame_of = {key: frame for key, frame in self._frame_of.items() if kept(key)}
        self.lost = {key: frame for key, frame in self.lost.items() if kept(key)}
        for frame in {**self._frames, **dict.fromkeys(self._frame_of.values())}:
            frame.keys = [key for key in frame.keys if kept(key)]

    # --- inside ---------------------------------------------------------------------------------------------------

    def _take(self, frame: Frame, keys: Sequence[int], blocks: Sequence[int]) -> None:
        """Keys move to this frame; a frame that ends leaves those that running requests use."""
        at = 0
        owners = list(map(self._frame_of.get, keys))
        if owners.count(frame) == len(keys):
            return
        for owner, same in groupby(owners):
            count = len(list(same))
            if owner is not frame and (owner is None or not owner.held or frame.held):
                moved = sum(blocks[at : at + count])
                if owner is not None:
                    self._change(owner, -min(moved, owner.shared_blocks))
                self._change(frame, moved)
                self._frame_of.update(dict.fromkeys(keys[at : at + count], frame))
            at += count

    def _change(self, frame: Frame, blocks: int) -> None:
        frame.shared_blocks += blocks
        if frame.held:
            self.held_blocks += blocks
        else:
            self._add(frame.place, blocks)

    def _forget(self, frame: Frame) -> None:
        self._add(frame.place, -frame.blocks)
        del self._frames[frame]
        for key in frame.keys:
            if self._frame_of.get(key) is frame:
                del self._frame_of[key]

    # --- the Fenwick tree (Fenwick, A new data structure for cumulative frequency tables, 1994) ---------------------

    def _add(self, place: int, blocks: int) -> None:
        self.free_blocks += blocks
        sums, at = self._sums, place + 1
        while at < len(sums):
            sums[at] += blocks
            at += at & -at

    def _above(self, frame: Frame) -> int:
        """Blocks of the frames above this one."""
        sums, at, below = self._sums, frame.place + 1, 0
        while at > 0:
            below += sums[at]
            at -= at & -at
        return self.free_blocks - below

    def _number_anew(self) -> None:
        """Places without gaps, and twice as many as there are frames."""
        for frame in [frame for frame in self._frames if frame.blocks <= 0]:
            del self._frames[frame]
        self._sums = [0] * (max(_FIRST_PLACES, 2 * len(self._frames)) + 1)
        self.free_blocks = 0
        for place, frame in enumerate(self._frames):
            frame.place = place
            self._add(place, frame.blocks)
        self._next_place = len(self._frames)
