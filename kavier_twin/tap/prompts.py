"""What a request asks of an engine, and the token ids of its prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from kavier_twin.tap.paths import Kind, kind_of

MOST_REQUESTS: Final = 1_024  # that one body may become in the engine
MEDIA_TOKENS: Final = 1_000  # an estimate for one image, sound or film
_TOKENIZE_KEYS: Final = (  # of a chat request, those that `/tokenize` takes and that change the prompt
    "model",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
)
_PROMPT_KEYS: Final = ("messages", "prompt", "input", "instructions", "system", "tools", "documents")
_NO_TEXT_KEYS: Final = ("data", "url", "image_url", "role", "type")
_TEXT_PARTS: Final = frozenset(
    ("text", "refusal", "input_text", "output_text", "thinking", "redacted_thinking", "tool_use", "reasoning_text")
)


class NotReadable(Exception):
    """A request of which no record can be made. The text is the reason under which it is counted."""


class NoTokens(Exception):
    """A prompt whose token ids are not to be had. The text is the reason under which it is counted."""


@dataclass(frozen=True)
class Asked:
    """A request as read from its body. `body` holds the prompts: forget it once tokenised.

    `prompts` has one entry for each prompt: the messages of a chat, a text, token ids, or None where the tap cannot
    rebuild what the engine renders. The engine makes `choices` requests of each.
    """

    body: Mapping[str, Any] = field(repr=False)
    kind: Kind
    prompts: Sequence[Any] = field(repr=False)
    choices: int
    model: str | None
    max_tokens: int | None
    priority: int
    session: str | None

    @classmethod
    def of(cls, path: str, data: bytes, session: str | None = None, priority: int | None = None) -> Asked:
        """Read a body. `session` and `priority` are what header fields say of them. Raises NotReadable."""
        try:
            body = json.loads(data)
        except UnicodeDecodeError as error:
            raise NotReadable("not-utf8") from error
        except (ValueError, RecursionError) as error:
            raise NotReadable("not-json") from error
        if not isinstance(body, dict):
            raise NotReadable("not-an-object")
        kind = kind_of(path) or "completion"
        if kind == "invocation":  # as SageMaker's, which takes either
            kind = "chat" if "messages" in body else "completion"
        if kind == "responses" and body.get("background"):
            raise NotReadable("background")  # its answer ends before the engine begins
        sampling = _object(body.get("sampling_params")) if kind == "generate" else body
        extra = _object(body.get("vllm_xargs"))
        limits = ("max_output_tokens",) if kind == "responses" else ("max_completion_tokens", "max_tokens")
        prompts = _prompts(kind, body)
        choices = _count(sampling.get("n")) or 1
        if len(prompts) * choices > MOST_REQUESTS:
            raise NotReadable("too-many-prompts")
        if priority is None:
            priority = _count(body.get("priority"), signed=True) or 0
        return cls(
            body,
            kind,
            prompts,
            choices,
            _text(body.get("model")),
            next((count for limit in limits if (count := _count(sampling.get(limit))) is not None), None),
            priority,
            session or _text(body.get("session_id")) or _text(extra.get("session_id")),
        )

    @property
    def is_chat(self) -> bool:
        """Whether a chat template makes the prompt."""
        return self.kind in ("chat", "responses", "messages")

    @property
    def salt(self) -> str | None:
        """What the engine hashes into the first block beside its tokens."""
        salt = self.body.get("cache_salt")
        return salt if isinstance(salt, str) and salt else None

    @property
    def uncertain(self) -> tuple[str, ...]:
        """What makes the engine's own prompt differ from what `/tokenize` sees, on some engines or models."""
        kinds = (self.kind,) if self.kind in ("responses", "messages") else ()
        keys = ("documents", "reasoning_effort", "truncate_prompt_tokens", "reasoning", "thinking")
        return (*kinds, *(key for key in keys if self.body.get(key) is not None))

    def why_no_tokens(self) -> str | None:
        """Why no tokenizer can give the ids of what the engine computes, or None."""
        if self.body.get("prompt_embeds"):
            return "prompt-embeds"
        if self.media():
            return "multimodal"
        return None

    def media(self) -> int:
        """How many parts of the prompts are no text."""
        return sum(1 for key in ("messages", "input") for _ in _parts(self.body.get(key)))

    def characters(self) -> int:
        """How many characters the prompts have, to estimate their tokens by."""
        if self.kind == "generate":
            return 0
        return sum(_characters(self.body.get(key)) for key in _PROMPT_KEYS)

    def token_ids(self) -> list[list[int]] | None:
        """The ids of each prompt, where the client sent them itself."""
        if self.is_chat or not self.prompts or not all(map(_are_ids, self.prompts)):
            return None
        return list(self.prompts)

    def for_tokenize(self) -> list[dict[str, Any]]:
        """The bodies of vLLM's `POST /tokenize`, one for each prompt. Raises NoTokens."""
        if not self.prompts or any(prompt is None for prompt in self.prompts):
            raise NoTokens("no-prompt" if self.kind in ("chat", "completion") else "not-rendered")
        if not self.is_chat:
            keys = ("model", "add_special_tokens")
            common = {key: self.body[key] for key in keys if self.body.get(key) is not None}
            return [{**common, "prompt": prompt} for prompt in self.prompts]
        common = {key: self.body[key] for key in _TOKENIZE_KEYS if self.body.get(key) is not None}
        if self.kind != "chat" and "tools" in common:
            raise NoTokens("not-rendered")  # they are written otherwise than in a chat
        # In a chat request these have fields of their own, which `/tokenize` lacks; the template gets them anyway.
        effort = self.body.get("reasoning_effort")
        fields = {"documents": self.body.get("documents"), "reasoning_effort": effort}
        given = _object(common.get("chat_template_kwargs"))
        if effort is not None and "enable_thinking" not in given:
            fields["enable_thinking"] = effort != "none"
        if kwargs := {**given, **{key: value for key, value in fields.items() if value is not None}}:
            common["chat_template_kwargs"] = kwargs
        return [{**common, "messages": prompt} for prompt in self.prompts]

    def truncated(self, ids: Sequence[int]) -> Sequence[int]:
        """What the engine leaves of a prompt that it is to truncate. Raises NoTokens."""
        most = self.body.get("truncate_prompt_tokens")
        if most is None:
            return ids
        if type(most) is not int or most < 1:
            raise NoTokens("truncated")
        if self.body.get("truncation_side") == "right":
            return ids[:most]
        return ids[-most:]


class Tokenizer(Protocol):
    """Gives the token ids of prompts and answers, away from the event loop."""

    def knows(self, asked: Asked) -> bool:
        """Whether it can do so for this one."""

    def token_ids(self, asked: Asked) -> list[list[int]]:
        """The ids of each prompt. Raises NoTokens."""

    def text_ids(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of an answer's text, and the character at which each token ends."""


def _prompts(kind: Kind, body: Mapping[str, Any]) -> list[Any]:
    if kind == "generate":
        return [body.get("token_ids")]
    if kind == "completion":
        prompt = body.get("prompt")
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        return list(prompt) if several and isinstance(prompt, list) else [prompt]
    if kind == "responses":
        return [_messages_of_responses(body)]
    messages = body.get("messages")
    if kind == "messages":
        return [_messages_of_anthropic(body, messages)]
    if isinstance(messages, list) and messages and isinstance(messages[0], list):
        return list(messages)
    return [messages]


def _messages_of_responses(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """A Responses request as the chat that vLLM makes of it, where it is plain text."""
    asked, instructions = body.get("input"), body.get("instructions")
    messages = [{"role": "system", "content": instructions}] if isinstance(instructions, str) and instructions else []
    if body.get("previous_response_id") is not None:
        return None
    if isinstance(asked, str):
        return [*messages, {"role": "user", "content": asked}]
    for item in asked if isinstance(asked, list) else [None]:
        content = item.get("content") if isinstance(item, dict) else None
        if not isinstance(item, dict) or item.get("type", "message") != "message" or not isinstance(content, str):
            return None
        messages.append({"role": str(item.get("role")), "content": content})
    return messages


def _messages_of_anthropic(body: Mapping[str, Any], messages: Any) -> list[dict[str, Any]] | None:
    """A Messages request as the chat that vLLM makes of it, where it is plain text."""
    system = _plain_text(body.get("system"))
    made = [{"role": "system", "content": system}] if system else []
    for message in messages if isinstance(messages, list) else [None]:
        said = _object(message)
        text, role = _plain_text(said.get("content")), said.get("role")
        if text is None or role not in ("user", "assistant"):
            return None
        made.append({"role": role, "content": text})
    return made


def _plain_text(content: Any) -> str | None:
    """A text, or the only text block of a list."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text") if content[0].get("type") == "text" else None
    return content if isinstance(content, str) and not content.startswith("x-anthropic-billing-header") else None


def _parts(messages: Any) -> Iterator[Any]:
    """Every part of the messages that is no text."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else message
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict):
                continue
            if "role" in part or part.get("type") == "tool_result":  # one conversation of several, or parts in a part
                yield from _parts([part])
            elif part.get("type", "text") not in _TEXT_PARTS:
                yield part


def _characters(value: Any) -> int:
    """Of all texts in a value, those left out that encode an image or a sound."""
    if isinstance(value, str):
        return 0 if value.startswith("data:") else len(value)
    if isinstance(value, list):
        return sum(map(_characters, value))
    if isinstance(value, dict):
        return sum(_characters(each) for key, each in value.items() if key not in _NO_TEXT_KEYS)
    return 0


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int and token >= 0 for token in prompt)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value[:512] if isinstance(value, str) and value else None


def _count(value: Any, *, signed: bool = False) -> int | None:
    if type(value) is not int or abs(value) > 100_000_000 or (value < 0 and not signed):
        return None
    return value
