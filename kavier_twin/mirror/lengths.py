"""How long a request may run whose end is not known yet.

Where ends come in time, a request is held until its record comes: no guess is better than that. Two things go wrong
with holding alone, and both are seen in the stream:

- Some records never come, and requests held for ever would fill the fleet. Let S(n) be the share of requests longer
  than n tokens and q the share of records lost. Of all requests that arrived, S(n) still run after n tokens, but
  (1 - q) S(n) + q have no record. Each one without a record is therefore kept with probability S / ((1 - q) S + q),
  so that as many requests of every age are held as really run (Horvitz and Thompson, 1952). Before any loss is known,
  a request is given up where it is more likely lost than long.
- Ends come later than the stream waits for. If most do, q is 1: each request is held for as long as a recent one.

When the record of a request that was let go comes after all, what was simulated of it is scored as any other.
"""

from __future__ import annotations

import zlib
from collections import deque
from copy import copy
from typing import Any, Final, NamedTuple

import numpy as np

KEPT_LENGTHS: Final = 2_000
MINIMUM_REQUESTS: Final = 50  # that ended, before anything is made of their lengths
PRIOR_REQUESTS: Final = 100.0  # of which one is taken to be lost, before the stream has told
LATE_RATIO: Final = 0.5  # of late ends, above which lengths are drawn
_SLACK: Final = 1.25  # for a mirror that is ahead
_EVERY_REQUESTS: Final = 25  # between looks at the lengths
_FIRST_GUESS_TOKENS: Final = 512
_REMEMBERED: Final = 10_000  # requests let go
_COUNTED: Final = 2_000.0  # requests, after which the shares count half
_LATE_REQUESTS: Final = 50.0  # over which the share of late ends is smoothed


class Simulated(NamedTuple):
    """What was simulated of a request until a moment (seconds; NaN: not yet)."""

    at: float
    arrival: float
    prompt_tokens: int
    scheduled: float
    first_token: float
    generated_tokens: int
    cached_tokens: int | None  # None before it was scheduled
    prefill_work: tuple[float, ...] = ()  # once it is over, as `state.OUTCOME` has both
    decode_work: tuple[float, ...] = ()


class Lengths:
    """Output lengths lately, how many ends come late or never, and what follows for those not known yet."""

    def __init__(self) -> None:
        self._outputs: deque[int] = deque(maxlen=KEPT_LENGTHS)
        self._let_go: dict[str, Simulated] = {}  # oldest first
        self._ended_count = self._lost_count = self._late_ratio = 0.0
        self._until_look = 0
        self._limit_tokens: int | None = None  # at which a request is given up; None: too little is known
        self._sorted: list[int] = []  # lengths to draw from

    def fork(self) -> Lengths:
        """An independent copy."""
        twin = copy(self)
        twin._outputs, twin._let_go = self._outputs.copy(), self._let_go.copy()
        return twin

    def save(self) -> list[Any]:
        """As JSON types."""
        counts = [self._ended_count, self._lost_count, self._late_ratio, self._until_look, self._limit_tokens]
        return [list(self._outputs), [[i, *simulated] for i, simulated in self._let_go.items()], counts, self._sorted]

    def restore(self, saved: list[Any]) -> None:
        """What `save` gave."""
        outputs, let_go, counts, self._sorted = saved
        self._outputs.extend(outputs)
        self._let_go = {identity: Simulated(*simulated) for identity, *simulated in let_go}
        self._ended_count, self._lost_count, self._late_ratio, self._until_look, self._limit_tokens = counts

    def assumed_tokens(self) -> int:
        """What a new request is to generate as long as no record tells: more than any is let run."""
        return max(_FIRST_GUESS_TOKENS, 2 * (self._limit_tokens or max(self._outputs, default=0)))

    def limit_tokens(self, identity: str) -> int | None:
        """At how many tokens a request without a record is let go; None: too little is known."""
        if self._limit_tokens is None:
            return None
        lost = (
            1.0 if self._late_ratio > LATE_RATIO else self._lost_count / max(self._ended_count + self._lost_count, 1.0)
        )
        draw = _draw(identity)
        longer = draw * lost / (1.0 - draw * (1.0 - lost))  # the S at which this request is given up
        place = int((1.0 - longer) * len(self._sorted))
        return self._sorted[place] if place < len(self._sorted) else self._limit_tokens

    def drawn_tokens(self, identity: str) -> int | None:
        """The length of a recent request, drawn for this one: what it is taken to have had once it is given up.

        Never more than it was held for, and distributed as all lengths are; None: too little is known.
        """
        return self._sorted[int((1.0 - _draw(identity)) * len(self._sorted))] if self._sorted else None

    def ended(self, output_tokens: int, *, late: bool) -> None:
        """A request ended and its record came."""
        self._outputs.append(output_tokens)
        self._late_ratio += (float(late) - self._late_ratio) / _LATE_REQUESTS
        self._count(1.0, 0.0)
        self._until_look -= 1
        if self._until_look <= 0 and len(self._outputs) >= MINIMUM_REQUESTS:
            self._until_look = _EVERY_REQUESTS
            lost = (1.0 + self._lost_count) / (PRIOR_REQUESTS + self._ended_count + self._lost_count)
            self._sorted = sorted(self._outputs)
            # What none of so few was: a tail that falls with the length, as Pareto's of exponent 1, goes on from there.
            beyond = max(1.0, 1.0 / (lost * len(self._sorted)))
            self._limit_tokens = int(_SLACK * beyond * np.quantile(self._sorted, 1.0 - lost, method="higher")) + 1

    def let_go(self, identity: str, simulated: Simulated) -> None:
        """A request ends in the mirror without a record."""
        self._let_go[identity] = simulated
        if len(self._let_go) > _REMEMBERED:
            del self._let_go[next(iter(self._let_go))]
        self._count(0.0, 1.0)

    def came_after_all(self, identity: str) -> Simulated | None:
        """What was simulated of a request that was let go and not lost."""
        simulated = self._let_go.pop(identity, None)
        if simulated is not None:
            self._lost_count = max(0.0, self._lost_count - 1.0)
        return simulated

    def _count(self, ended: float, lost: float) -> None:
        self._ended_count += ended
        self._lost_count += lost
        if self._ended_count + self._lost_count > _COUNTED:
            self._ended_count, self._lost_count = self._ended_count / 2.0, self._lost_count / 2.0


def _draw(identity: str) -> float:
    """In (0, 1], the same in every process."""
    return (1 + zlib.crc32(identity.encode())) / 2**32
