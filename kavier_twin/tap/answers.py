"""What an answer tells while it passes by: when its first token came, how many there were, why it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic_core import from_json

from kavier_twin.tap.exchanges import ChoiceEnd, End

MOST_BYTES: Final = 8 << 20  # of an answer that is no stream, or of one line of a stream; beyond it is not read
MOST_CHOICES: Final = 1_024
_MOST_TEXT: Final = 1 << 20  # characters of one choice that are kept to be tokenised
_FINISH: Final = {  # vLLM's words for those of the other APIs
    "end_turn": "stop",
    "stop_sequence": "stop",
    "completed": "stop",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "tool_use": "tool_calls",
    "failed": "error",
    "cancelled": "abort",
}
_BEFORE_OUTPUT: Final = frozenset(("response.created", "response.in_progress", "response.queued"))


class Answer:
    """Reads a copy of an answer's bytes, in the forms of OpenAI's and Anthropic's APIs, which it tells apart.

    Of text it keeps what is tokenised at the end, and the line not yet ended.
    """

    def __init__(self, *, streamed: bool, encoded: bool) -> None:
        self.output_tokens: int | None = None
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.failed = False
        self._choices: dict[int, _Choice] = {}
        self._streamed = streamed
        self._rest = bytearray()
        self._readable = not encoded
        self._first_seconds: float | None = None  # on the clock of `take`

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
                    self._read(bytes(line[5:]).strip(), now_seconds)
                elif line.startswith(b"event:") and line[6:].strip() == b"error":
                    self.failed = True
        if len(self._rest) > MOST_BYTES:
            self._readable = False
            self._rest.clear()

    def end(self, id: str, reason: str | None, arrived_seconds: float, now_seconds: float, unix_seconds: float) -> End:
        """The body ended, whole or cut. `reason` is for choices that give none themselves."""
        if not self._streamed and self._readable:
            self._read(bytes(self._rest), now_seconds)
        self._rest.clear()
        countable = self._streamed and self._readable
        if self.output_tokens is None and countable:
            self.output_tokens = sum(choice.count for choice in self._choices.values())
        last = max(self._choices, default=-1)
        choices = [self._choices.get(index) or _Choice() for index in range(last + 1)]
        return End(
            id,
            unix_seconds,
            max(0.0, now_seconds - arrived_seconds),
            False,
            self.output_tokens,
            self.prompt_tokens,
            self.cached_tokens,
            "error" if self.failed else reason,
            tuple(choice.end(arrived_seconds, streamed=self._streamed, failed=self.failed) for choice in choices),
        )

    def _read(self, data: bytes, now_seconds: float) -> None:
        if data == b"[DONE]":
            return
        try:
            told = from_json(data)  # several times as fast as the standard library's, and it is in the way of bytes
        except ValueError:
            return
        if not isinstance(told, dict):
            return
        kind = told.get("type")
        if told.get("error") or kind == "error" or told.get("object") == "error":
            self.failed = True
            return
        choices = told.get("choices")
        if isinstance(choices, list):
            self._openai(told, choices, now_seconds)
        elif isinstance(kind, str) and kind.startswith("response."):
            self._responses(kind, told, now_seconds)
        elif told.get("object") == "response":
            self._whole_response(told, now_seconds)
        elif isinstance(kind, str):
            self._anthropic(kind, told, now_seconds)

    def _openai(self, told: dict[str, Any], choices: list[Any], now_seconds: float) -> None:
        usage = told.get("usage")
        for number, said in enumerate(choices):
            if not isinstance(said, dict):
                continue
            index = said.get("index")
            choice = self._choice(index if type(index) is int else number, now_seconds)
            choice.openai(said, now_seconds)
            if self._streamed and len(choices) == 1 and isinstance(usage, dict):
                choice.tokens = _tokens(usage.get("completion_tokens"), choice.tokens)  # so far, and of it alone
        if isinstance(usage, dict):
            counted = _tokens(usage.get("completion_tokens"), self.output_tokens)
            self.output_tokens = None if self._streamed and choices and len(self._choices) > 1 else counted
            self.prompt_tokens = _tokens(usage.get("prompt_tokens"), self.prompt_tokens)
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict):
                self.cached_tokens = _tokens(details.get("cached_tokens"), self.cached_tokens)

    def _responses(self, kind: str, told: dict[str, Any], now_seconds: float) -> None:
        response = told.get("response")
        if isinstance(response, dict) and kind not in _BEFORE_OUTPUT:
            self._whole_response(response, now_seconds)
        elif kind not in _BEFORE_OUTPUT:
            choice = self._choice(0, now_seconds)
            if kind.endswith(".delta"):
                choice.say(told.get("delta"), is_text=kind == "response.output_text.delta")

    def _whole_response(self, response: dict[str, Any], now_seconds: float) -> None:
        status = response.get("status")
        self._usage(response.get("usage"))
        if response.get("error") or status == "failed":
            self.failed = True
            return
        choice = self._choice(0, now_seconds)
        if status == "incomplete":
            details = response.get("incomplete_details")
            status = details.get("reason") if isinstance(details, dict) else status
        choice.finish(status, now_seconds)
        if not self._streamed:
            output = response.get("output")
            for item in output if isinstance(output, list) else ():
                content = item.get("content") if isinstance(item, dict) else None
                choice.say_parts(content, "output_text")

    def _anthropic(self, kind: str, told: dict[str, Any], now_seconds: float) -> None:
        if kind == "message_start":
            message = told.get("message")
            self._usage(message.get("usage") if isinstance(message, dict) else None)
        elif kind.startswith("content_block"):
            choice, delta = self._choice(0, now_seconds), told.get("delta")
            if kind == "content_block_delta" and isinstance(delta, dict):
                is_text = delta.get("type") == "text_delta"
                choice.say(delta.get("text") if is_text else delta, is_text=is_text)
        elif kind in ("message_delta", "message"):
            self._usage(told.get("usage"))
            said = told if kind == "message" else told.get("delta")
            choice = self._choice(0, now_seconds)
            choice.finish(said.get("stop_reason") if isinstance(said, dict) else None, now_seconds)
            choice.say_parts(told.get("content"), "text")

    def _usage(self, usage: Any) -> None:
        """As the Responses and the Messages API tell it. The latter counts tokens of the cache apart."""
        if not isinstance(usage, Mapping):
            return
        self.output_tokens = _tokens(usage.get("output_tokens"), self.output_tokens)
        asked = _tokens(usage.get("input_tokens"), None)
        read = _tokens(usage.get("cache_read_input_tokens"), None)
        made = _tokens(usage.get("cache_creation_input_tokens"), None)
        if asked is not None:
            self.prompt_tokens = asked + (read or 0) + (made or 0)
        details = usage.get("input_tokens_details")
        cached = _tokens(details.get("cached_tokens"), None) if isinstance(details, Mapping) else read
        self.cached_tokens = self.cached_tokens if cached is None else cached

    def _choice(self, index: int, now_seconds: float) -> _Choice:
        """The choice of that number, whose output has begun."""
        choice = self._choices.get(min(max(index, 0), MOST_CHOICES - 1))
        if choice is None:
            choice = self._choices[min(max(index, 0), MOST_CHOICES - 1)] = _Choice(now_seconds)
        return choice


class _Choice:
    """One choice as far as it came."""

    def __init__(self, first_seconds: float | None = None) -> None:
        self.tokens: int | None = None
        self._chunks = 0
        self._first_seconds = first_seconds
        self._end_seconds: float | None = None
        self._reason: str | None = None
        self._pieces: list[str] | None = []
        self._length = 0
        self._ids: list[int] | None = None

    @property
    def count(self) -> int:
        """Tokens as far as is known: the engine's count, its token ids, or the chunks with output."""
        if self.tokens is not None:
            return self.tokens
        return self._chunks if self._ids is None else len(self._ids)

    def openai(self, said: dict[str, Any], now_seconds: float) -> None:
        """A choice of a chunk, or of a whole answer."""
        self.finish(said.get("finish_reason"), now_seconds)
        ids = said.get("token_ids")
        if isinstance(ids, list) and ids and all(type(token) is int and token >= 0 for token in ids):
            self._ids = [*(self._ids or ()), *ids]
        whole = said.get("message")
        inner = said.get("delta", whole)
        spoken: Mapping[str, Any] = inner if isinstance(inner, dict) else said
        text = spoken.get("content", spoken.get("text"))
        if any(spoken.get(key) for key in ("reasoning", "reasoning_content", "tool_calls")):
            self.say(spoken, is_text=False)
        elif isinstance(text, str) and (text or "role" not in spoken):
            self.say(text, is_text=True)
        elif text:
            self.say(text, is_text=False)

    def say(self, said: Any, *, is_text: bool) -> None:
        """More output. What is no text ends what can be tokenised."""
        self._chunks += bool(said)
        if not is_text or not isinstance(said, str):
            self._pieces = None
        elif self._pieces is not None:
            self._length += len(said)
            self._pieces.append(said)
            if self._length > _MOST_TEXT:
                self._pieces = None

    def say_parts(self, parts: Any, text_type: str) -> None:
        """The parts of a whole answer."""
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                is_text = part.get("type") == text_type
                self.say(part.get("text") if is_text else part, is_text=is_text)

    def finish(self, reason: Any, now_seconds: float) -> None:
        """Why it ended, if it did."""
        if isinstance(reason, str) and reason:
            self._reason = _FINISH.get(reason, reason)[:64]
            self._end_seconds = now_seconds

    def end(self, arrived_seconds: float, *, streamed: bool, failed: bool) -> ChoiceEnd:
        """What it came to. Where the answer failed before any output nothing tells of a first token."""

        def since(seconds: float | None) -> float | None:
            return None if seconds is None else max(0.0, seconds - arrived_seconds)

        begun = streamed and not (failed and not self._chunks)
        return ChoiceEnd(
            self._chunks if streamed else sum(map(len, self._pieces or ())),
            self.tokens,
            since(self._first_seconds) if begun else None,
            since(self._end_seconds) if streamed else None,
            self._reason,
            None if self._pieces is None else tuple(self._pieces),
            None if self._ids is None else tuple(self._ids),
        )


def _tokens(value: Any, otherwise: int | None) -> int | None:
    return value if type(value) is int and 0 <= value <= 100_000_000 else otherwise
