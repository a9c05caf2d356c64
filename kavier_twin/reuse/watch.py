"""One pass over a pool's requests, as they start and end, that feeds the hit curve and explains every miss."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.reuse.curve import FACTORS, LARGEST_FACTOR, Floats, Found, HitCurve
from kavier_twin.reuse.misses import Misses, Piece, Reason
from kavier_twin.reuse.recency import Frame, RecencyStack

MOST_KEYS: Final = 100_000  # tracked at a time in all stacks; beyond, half of them go
WINDOW_SECONDS: Final = 3_600.0
_SAMPLED_BITS: Final = 40  # of a key, above which its bits decide whether it is tracked


class Content(NamedTuple):
    """What a prompt, or a prompt with its output, consists of, as `simulation.state.Workload` holds it."""

    chain: npt.NDArray[np.uint64]  # chained keys
    hash_tokens: int  # under one hash, 0 without hashes
    covered_tokens: int  # leading tokens that the hashes identify


class _Tracked(NamedTuple):
    """Keys of a chain; `ends`: blocks up to and with each; `weights`: blocks that each stands for in a stack."""

    keys: list[int]
    ends: list[int]
    weights: list[int]
    known: int  # blocks of the chain


class Point(NamedTuple):
    """A size of every replica's KV cache and the share of the prompt tokens that it would have hit."""

    factor: float  # of today's size
    blocks: int  # usable
    hit_ratio: float


@dataclass(slots=True)
class _Running:
    replica: int
    frame: Frame
    pooled: Frame | None
    prompt_tokens: int
    application: int | None
    pieces: list[Piece]


class ReuseWatch:
    """Follows what every replica of a pool used last.

    `most_keys` bounds the memory: beyond it only every second key of the chains is tracked, then every fourth, and so
    on. Misses are then told to within that many blocks, and the curve is an estimate.

    `most_blocks` of each replica are remembered: as many as the largest capacity of the curve has, unless given.

    `follows_prefixes`: the router sends a request to where most of its prefix is cached, and with larger caches would
    find it elsewhere.
    """

    def __init__(
        self,
        block_size: int,
        num_gpu_blocks: int,
        *,
        prefix_caching: bool = True,
        follows_prefixes: bool = False,
        window_seconds: float = WINDOW_SECONDS,
        most_keys: int = MOST_KEYS,
        most_blocks: int | None = None,
    ) -> None:
        self.block_size = block_size
        self.capacity_blocks = num_gpu_blocks - 1  # without vLLM's null block
        self.prefix_caching = prefix_caching
        self.curve = HitCurve(self.capacity_blocks, block_size, window_seconds)
        self._pool = RecencyStack(0) if follows_prefixes else None  # of all replicas as if they were one
        self._pooled = HitCurve(self.capacity_blocks, block_size, window_seconds)
        self.misses = Misses()
        self.sampled = 1  # one key in so many is tracked
        self._most_keys = most_keys
        self._most_blocks = int(LARGEST_FACTOR * self.capacity_blocks) if most_blocks is None else most_blocks
        self._stacks: dict[int, RecencyStack] = {}
        self._running: dict[object, _Running] = {}

    def admitted(
        self,
        request: object,
        time_seconds: float,
        replica: int,
        prompt_tokens: int,
        prompt: Content,
        output_tokens: float,
    ) -> None:
        """A request starts to run. `output_tokens`: those expected, of which it holds half on average."""
        self.dropped(request, time_seconds)  # a name used again
        stack = self._stack(replica)
        prefix = self._track(prompt, prompt_tokens)
        most = (prompt_tokens - 1) // self.block_size  # vLLM never hits the last token
        head = _head(prefix, most, self.sampled)
        found: list[Found] = []
        pieces: list[Piece] = []
        at = before = 0
        for run in stack.look_up(head.keys, head.weights):
            end = head.ends[at + run.keys - 1]
            if run.frame is None:
                pieces += self._elsewhere(replica, head, at, at + run.keys, time_seconds)
            elif run.frame.held:
                pieces.append(Piece(Reason.COMPUTING, end - before))
            else:
                pieces.append(Piece(Reason.EVICTED, end - before, time_seconds - run.frame.freed_seconds))
            if run.frame is not None and (found or at == 0):
                found.append((run.depth, run.blocks))
            at, before = at + run.keys, end
        missing = 0 if self.sampled == 1 else min(prefix.known, most) - sum(head.weights)
        self.curve.add(time_seconds, prompt_tokens, found, missing_blocks=missing)
        private = max(0, -(-(prompt_tokens + int(output_tokens / 2)) // self.block_size) - prefix.known)
        frame = stack.admit(prefix.keys, prefix.weights, private)
        pooled = None
        if self._pool is not None:
            known = takewhile(lambda run: run.frame, self._pool.look_up(head.keys, head.weights))
            self._pooled.add(
                time_seconds,
                prompt_tokens,
                ((run.depth, run.blocks) for run in known),
                missing_blocks=missing,
                replicas=len(self._stacks),
            )
            pooled = self._pool.admit(prefix.keys, prefix.weights, private)
        application = int(prompt.chain[0]) if prefix.known else None
        self._running[request] = _Running(replica, frame, pooled, prompt_tokens, application, pieces)

    def ended(
        self, request: object, time_seconds: float, cached_tokens: int, output_tokens: int, whole: Content
    ) -> None:
        """It ended. `cached_tokens` it did not have to compute at its first admission, from whichever tier."""
        running = self._running.pop(request, None)
        if running is None:
            return
        tokens = running.prompt_tokens + output_tokens - 1  # the last token's KV is never computed
        content = self._track(whole, tokens)
        private = tokens // self.block_size - content.known
        self._end(running, time_seconds, content.keys, content.weights, private)
        self.misses.add(
            running.application,
            running.prompt_tokens,
            cached_tokens,
            running.pieces,
            (running.prompt_tokens - 1) // self.block_size * self.block_size,
            self.block_size,
            prefix_caching=self.prefix_caching,
        )
        self._bound()

    def dropped(self, request: object, time_seconds: float) -> None:
        """It is gone, and nothing tells how it ended: its prompt's content is left."""
        running = self._running.pop(request, None)
        if running is not None:
            self._end(running, time_seconds, [], [], 0)

    def restarted(self, replica: int, time_seconds: float) -> None:
        """A replica lost its cache, and its requests."""
        for name in [name for name, one in self._running.items() if one.replica == replica]:
            gone = self._running.pop(name)
            if self._pool is not None and gone.pooled is not None:
                self._pool.end(gone.pooled, time_seconds, [], [], 0)
        self._stack(replica).clear()

    def points(self) -> tuple[Point, ...]:
        """The curve, smallest cache first."""
        blocks, ratios = self.curve.capacities.tolist(), self.hit_ratios().tolist()
        return tuple(map(Point, FACTORS.tolist(), map(int, blocks), ratios))

    def hit_ratios(self) -> Floats:
        """Share of the prompt tokens hit at each of `capacities` of every replica, [21]; NaN without a request.

        Where the router follows prefixes, what more capacity adds is what it adds to a cache of the whole pool.
        """
        ratios = self.curve.hit_ratios()
        if self._pool is None or len(self._stacks) < 2:
            return ratios
        pooled = self._pooled.hit_ratios()
        today = int(np.flatnonzero(FACTORS == 1.0)[0])
        more = pooled - pooled[today]
        joined: Floats = np.minimum(np.where(FACTORS > 1.0, ratios[today] + more, ratios), 1.0)
        return joined

    # --- inside ---------------------------------------------------------------------------------------------------

    def _stack(self, replica: int) -> RecencyStack:
        if replica not in self._stacks:
            self._stacks[replica] = RecencyStack(self._most_blocks)
            if self._pool is not None:
                self._pool.most_blocks = len(self._stacks) * self._most_blocks
        return self._stacks[replica]

    def _end(
        self, running: _Running, time_seconds: float, keys: list[int], weights: list[int], private_blocks: int
    ) -> None:
        self._stacks[running.replica].end(running.frame, time_seconds, keys, weights, private_blocks)
        if self._pool is not None and running.pooled is not None:
            self._pool.end(running.pooled, time_seconds, keys, weights, private_blocks)

    def _track(self, content: Content, tokens: int) -> _Tracked:
        """The tracked keys of the identified full blocks within `tokens`."""
        known = min(content.covered_tokens, tokens) // self.block_size if content.hash_tokens else 0
        if known <= 0:
            return _Tracked([], [], [], 0)
        chain, ends, own = _chain_of_blocks(content, known, self.block_size)
        if self.sampled > 1:
            kept = ((chain >> np.uint64(_SAMPLED_BITS)) & np.uint64(self.sampled - 1) == 0).nonzero()[0]
            chain, ends, own = chain[kept], ends[kept], self.sampled * own[kept]
        return _Tracked(chain.tolist(), ends.tolist(), own.tolist(), known)

    def _elsewhere(self, replica: int, head: _Tracked, first: int, last: int, time_seconds: float) -> list[Piece]:
        """Why the keys [first, last) are not in the replica's stack."""
        lost, start = self._stacks[replica].lost, head.ends[first - 1] if first else 0
        pieces = []
        if head.keys[first] in lost:
            first = next((at for at in range(first, last) if head.keys[at] not in lost), last)
            pieces = [Piece(Reason.LOST, head.ends[first - 1] - start)]
            start = head.ends[first - 1]
        if first < last:
            pieces += self._in_others(replica, head, first, last, start, time_seconds)
        return pieces

    def _in_others(
        self, replica: int, head: _Tracked, first: int, last: int, start: int, time_seconds: float
    ) -> list[Piece]:
        """As the replica with most of them cached tells. `start`: blocks before the first."""
        best, most = [Piece(Reason.FIRST_SEEN, head.ends[last - 1] - start)], -1
        for number, other in self._stacks.items():
            if number == replica or head.keys[first] not in other:
                continue
            pieces, at, before, cached = [], 0, 0, 0
            for run in other.look_up(head.keys[:last], head.weights):  # from the head: what lies above counts
                end = head.ends[at + run.keys - 1]
                if run.frame is None:
                    pieces.append(Piece(Reason.FIRST_SEEN, max(0, end - max(before, start))))
                else:
                    inside = run.blocks if run.frame.held else min(max(0, self.capacity_blocks - run.depth), run.blocks)
                    limit = before + (end - before) * inside // max(run.blocks, 1)
                    age_seconds = time_seconds - run.frame.freed_seconds
                    pieces.append(Piece(Reason.OTHER_REPLICA, max(0, limit - max(before, start))))
                    pieces.append(Piece(Reason.EVICTED, max(0, end - max(limit, before, start)), age_seconds))
                    cached += max(0, limit - max(before, start))
                at, before = at + run.keys, end
            if cached > most:
                best, most = pieces, cached
        return best

    def _bound(self) -> None:
        stacks = [*self._stacks.values(), *([self._pool] if self._pool else [])]
        if sum(map(len, stacks)) > self._most_keys:
            self.sampled *= 2
            sampled = self.sampled
            for stack in stacks:
                stack.thin(lambda key: (key >> _SAMPLED_BITS) % sampled == 0)


def _head(prefix: _Tracked, most: int, sampled: int) -> _Tracked:
    """The keys within the first `most` blocks; one for several blocks may lie within them in part."""
    keys, ends, weights, known = prefix
    if not ends or ends[-1] <= most:
        return prefix
    at = bisect_right(ends, most)
    inside = most - ends[at] + weights[at] // sampled
    if inside <= 0:
        return _Tracked(keys[:at], ends[:at], weights[:at], known)
    return _Tracked(keys[: at + 1], [*ends[:at], most], [*weights[:at], sampled * inside], known)


def _chain_of_blocks(
    content: Content, known: int, block_size: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Keys of the first `known` blocks, the blocks up to the end of each, and its own blocks.

    A hash of more tokens than a block's is one key for its blocks; of fewer, the last one of a block is its key.
    """
    under = content.hash_tokens // block_size
    if content.hash_tokens % block_size == 0:
        count = -(-known // under)
        ends = np.arange(under, (count + 1) * under, under)
        own = np.full(count, under)
        ends[-1], own[-1] = known, known - under * (count - 1)
        return content.chain[:count], ends, own
    last = (np.arange(1, known + 1) * block_size - 1) // content.hash_tokens
    ends = np.flatnonzero(np.diff(last, append=-1)) + 1
    return content.chain[last[ends - 1]], ends, np.diff(ends, prepend=0)
