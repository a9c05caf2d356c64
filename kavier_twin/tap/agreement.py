"""Whether the tap's tokens have agreed with the engines' own counts, kind of request by kind of request."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

_MOST_KINDS: Final = 10_000


class Agreement:
    """Kinds of requests, and whether the last count of an engine agreed with the tap's.

    A gpt-oss of vLLM 0.32 renders chats otherwise than its `/tokenize` does; documents may or may not be in a template.
    """

    def __init__(self) -> None:
        self._agreed: dict[Hashable, bool] = {}

    def doubted(self, kind: Hashable, *, uncertain: bool) -> bool:
        """Whether hashes of such a request must wait for the engine's count. `uncertain` ones wait from the start."""
        return not self._agreed.get(kind, not uncertain)

    def told(self, kind: Hashable, *, agrees: bool) -> None:
        """An engine counted."""
        if len(self._agreed) >= _MOST_KINDS:
            self._agreed.clear()
        self._agreed[kind] = agrees


class Estimate:
    """Estimates the tokens of a prompt from its characters, as those that were counted turned out."""

    def __init__(self) -> None:
        self._characters = 4_000.0
        self._tokens = 1_000.0  # four characters a token, until it is known better

    def tokens(self, characters: int) -> int:
        """At least one."""
        return max(1, round(characters * self._tokens / self._characters))

    def told(self, characters: int, tokens: int) -> None:
        """A prompt was counted. The last hundred thousand characters or so decide."""
        if characters > 0 and tokens > 0:
            kept = max(0.0, 1.0 - characters / 100_000.0)
            self._characters = kept * self._characters + characters
            self._tokens = kept * self._tokens + tokens
