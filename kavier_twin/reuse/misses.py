"""Why prompt tokens were not in the prefix cache: one reason for each, which sum to all that were missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

MOST_APPLICATIONS: Final = 1_000
AGE_LIMITS_SECONDS: Final = (10.0, 60.0, 300.0, 1_800.0, 7_200.0)  # that evicted content is counted by


class Reason(StrEnum):
    """Why a prompt token was computed. The order is that of tables and of the page."""

    FIRST_SEEN = "first_seen"
    EVICTED = "evicted"
    OTHER_REPLICA = "other_replica"
    COMPUTING = "computing"
    PARTIAL_BLOCK = "partial_block"
    LOST = "lost"
    CACHING_OFF = "caching_off"


DESCRIPTIONS: Final = {
    Reason.FIRST_SEEN: "No replica had computed this prefix, or so long ago that it is forgotten.",
    Reason.EVICTED: "The replica had it, and evicted it since.",
    Reason.OTHER_REPLICA: "Another replica had it cached: routing.",
    Reason.COMPUTING: "A request that was still running was about to compute it.",
    Reason.PARTIAL_BLOCK: "vLLM caches full blocks only, and never hits the last token of a prompt.",
    Reason.LOST: "The replica had it before it restarted.",
    Reason.CACHING_OFF: "Prefix caching is off.",
}


def age_ranges() -> tuple[str, ...]:
    """The ranges of `Misses.evicted_by_age` in words."""
    below = ("within 10 s", "within 1 min", "within 5 min", "within 30 min", "within 2 h")
    return (*below, "after more than 2 h")


class Piece(NamedTuple):
    """Consecutive blocks of a prompt and why they would have been missed. `age_seconds`: since their last use."""

    reason: Reason
    blocks: int
    age_seconds: float = 0.0


@dataclass
class Tokens:
    """Prompt tokens of some requests; `prompt == hit + sum(missed.values())`."""

    requests: int = 0
    prompt: int = 0
    hit: int = 0
    missed: Counter[Reason] = field(default_factory=Counter)

    def add(self, other: Tokens) -> None:
        """Add another's."""
        self.requests += other.requests
        self.prompt += other.prompt
        self.hit += other.hit
        self.missed.update(other.missed)


class Misses:
    """Counts since the start, in all and by application: requests whose prompts begin with the same block."""

    def __init__(self) -> None:
        self.total = Tokens()
        self.evicted_by_age: list[int] = [0] * (len(AGE_LIMITS_SECONDS) + 1)  # tokens; the last beyond all limits
        self.applications: dict[int | None, Tokens] = {}  # by the key of the first block; None: not known
        self.other_applications = Tokens()  # those forgotten, which had fewest tokens

    def add(
        self,
        application: int | None,
        prompt_tokens: int,
        cached_tokens: int,
        pieces: Sequence[Piece],
        hittable_tokens: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
    ) -> None:
        """A request ended that found `cached_tokens`. `pieces`: its leading blocks as they were at its admission."""
        hit = min(max(cached_tokens, 0), prompt_tokens)
        one = Tokens(1, prompt_tokens, hit)
        if not prefix_caching:
            one.missed[Reason.CACHING_OFF] = prompt_tokens - hit
            pieces = ()
        at = 0
        for reason, blocks, age_seconds in pieces:
            end = min(at + blocks * block_size, hittable_tokens)
            missed = max(0, end - max(at, hit))
            one.missed[reason] += missed
            if reason is Reason.EVICTED:
                self.evicted_by_age[sum(age_seconds > limit for limit in AGE_LIMITS_SECONDS)] += missed
            at = end
        if prefix_caching:
            one.missed[Reason.FIRST_SEEN] += max(0, hittable_tokens - max(at, hit))
            one.missed[Reason.PARTIAL_BLOCK] += prompt_tokens - max(hittable_tokens, hit)
        self.total.add(one)
        self.applications.setdefault(application, Tokens()).add(one)
        if len(self.applications) > MOST_APPLICATIONS:
            least = sorted(self.applications, key=lambda name: self.applications[name].prompt)
            for name in least[: MOST_APPLICATIONS // 2]:
                self.other_applications.add(self.applications.pop(name))

    def by_application(self, most: int) -> tuple[list[tuple[str, Tokens]], Tokens]:
        """Those with most prompt tokens, named by the key of their first block, and all others together."""
        ordered = sorted(self.applications.items(), key=lambda item: -item[1].prompt)
        others = Tokens()
        others.add(self.other_applications)
        for _, tokens in ordered[most:]:
            others.add(tokens)
        return [("unknown" if key is None else f"{key:016x}", tokens) for key, tokens in ordered[:most]], others
