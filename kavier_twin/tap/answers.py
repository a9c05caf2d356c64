"""What an answer tells while it passes by: when its first token came, how many there were, why it ended."""

from __future__ import annotations

from typing import Any, Final

from pydantic_core import from_json

from kavier_twin.tap.exchanges import End

MOST_BYTES: Final = 8 << 20  # of an answer that is no stream, or of one line of a stream; beyond it is not read


class Answer:
    """Reads a copy of an answer's bytes. Keeps counts, and of text at most the line not yet ended."""

    def __init__(self, *, streamed: bool, encoded: bool) -> None:
        self.output_tokens: int | None = None
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.finish_reason: str | None = None
        self.first_token_seconds: float | None = None  # on the clock of `take`
        self._streamed = streamed
        self._chunks = 0
        self._rest = bytearray()
        self._readable = not encoded

    def take(self, data: bytes, now_seconds: float) -> None:
        """A piece of the body, as it came."""
        if not self._readable:
            return
        self._rest += data
        if self._streamed:
            *lines, rest = self._rest.split(b"\n")
            self._rest = bytearray(rest)
            for line in lines:
                if line.startswith(b"data:"):
                    self._event(bytes(line[5:]).strip(), now_seconds)
        if len(self._rest) > MOST_BYTES:
            self._readable = False
            self._rest.clear()

    def end(self, id: str, reason: str | None, arrived_seconds: float, now_seconds: float, unix_seconds: float) -> End:
        """The body ended, whole or cut. `reason` is for an answer that gives none itself."""
        if not self._streamed and self._readable:
            self._read(bytes(self._rest))
        self._rest.clear()
        if self.output_tokens is None and self._streamed and self._readable:
            self.output_tokens = self._chunks
        first = self.first_token_seconds
        return End(
            id,
            unix_seconds,
            max(0.0, now_seconds - arrived_seconds),
            None if first is None else max(0.0, first - arrived_seconds),
            self.output_tokens,
            self.prompt_tokens,
            self.cached_tokens,
            self.finish_reason or reason,
        )

    def _event(self, data: bytes, now_seconds: float) -> None:
        if data == b"[DONE]":
            return
        if self.first_token_seconds is None:
            self.first_token_seconds = now_seconds
        self._read(data)

    def _read(self, data: bytes) -> None:
        try:
            told = from_json(data)  # several times as fast as the standard library's, and it is in the way of bytes
        except ValueError:
            return
        if not isinstance(told, dict):
            return
        choices = told.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._choice(choice)
        usage = told.get("usage")
        if isinstance(usage, dict):
            self.output_tokens = _tokens(usage.get("completion_tokens"), self.output_tokens)
            self.prompt_tokens = _tokens(usage.get("prompt_tokens"), self.prompt_tokens)
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict):
                self.cached_tokens = _tokens(details.get("cached_tokens"), self.cached_tokens)

    def _choice(self, choice: dict[str, Any]) -> None:
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            self.finish_reason = reason[:64]
        delta = choice.get("delta")
        spoken = delta if isinstance(delta, dict) else choice
        if any(spoken.get(key) for key in ("content", "text", "reasoning", "reasoning_content", "tool_calls")):
            self._chunks += 1


def _tokens(value: Any, otherwise: int | None) -> int | None:
    return value if type(value) is int and 0 <= value <= 100_000_000 else otherwise
