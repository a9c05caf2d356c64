"""What a request asks of an engine, and the token ids of its prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

TAPPED_PATHS: Final = ("/v1/chat/completions", "/v1/completions")
_CHAT_KEYS: Final = (  # of a chat request, those that `/tokenize` understands and that change the prompt
    "model",
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
)


class NotReadable(Exception):
    """A request of which no record can be made. The text is the reason under which it is counted."""


class NoTokens(Exception):
    """A prompt whose token ids are not to be had. The text is the reason under which it is counted."""


@dataclass(frozen=True)
class Asked:
    """A request as read from its body. `body` holds the prompt: forget it once tokenised."""

    body: Mapping[str, Any]
    is_chat: bool
    model: str | None
    max_tokens: int | None
    priority: int
    session: str | None

    @classmethod
    def of(cls, path: str, data: bytes, session: str | None) -> Asked:
        """Read a body. Raises NotReadable."""
        try:
            body = json.loads(data)
        except UnicodeDecodeError as error:
            raise NotReadable("not-utf8") from error
        except (ValueError, RecursionError) as error:
            raise NotReadable("not-json") from error
        if not isinstance(body, dict):
            raise NotReadable("not-an-object")
        is_chat = path.endswith("/chat/completions")
        prompt = body.get("prompt")
        if not is_chat and isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise NotReadable("several-prompts")
            body["prompt"] = prompt[0]
        session = session or _text(body.get("session_id"))
        limit = body.get("max_completion_tokens") if is_chat else None
        return cls(
            body,
            is_chat,
            _text(body.get("model")),
            _count(limit if limit is not None else body.get("max_tokens")),
            _count(body.get("priority"), signed=True) or 0,
            session,
        )

    def without_hashes(self) -> str | None:
        """Why an engine hashes more than the prompt's token ids here, or None."""
        if self.body.get("cache_salt"):
            return "cache-salt"
        if self.body.get("prompt_embeds"):
            return "prompt-embeds"
        if self.body.get("truncate_prompt_tokens") is not None:
            return "truncated"
        return "multimodal" if self.multimodal() else None

    def multimodal(self) -> bool:
        """Whether a message has a part that is no text."""
        messages = self.body.get("messages")
        return isinstance(messages, list) and any(
            isinstance(part, dict) and part.get("type", "text") not in ("text", "refusal")
            for message in messages
            if isinstance(message, dict) and isinstance(message.get("content"), list)
            for part in message["content"]
        )

    def token_ids(self) -> list[int] | None:
        """The ids, where the client sent them itself."""
        prompt = self.body.get("prompt")
        if self.is_chat or not isinstance(prompt, list):
            return None
        return prompt if all(type(token) is int and token >= 0 for token in prompt) else None

    def for_tokenize(self) -> dict[str, Any]:
        """The body of vLLM's `POST /tokenize` for this prompt. Raises NoTokens."""
        keys = _CHAT_KEYS if self.is_chat else ("model", "prompt", "add_special_tokens")
        question = {key: self.body[key] for key in keys if self.body.get(key) is not None}
        if ("messages" if self.is_chat else "prompt") not in question:
            raise NoTokens("no-prompt")
        return question


class Tokenizer(Protocol):
    """Gives the token ids of a prompt, away from the event loop."""

    def knows(self, asked: Asked) -> bool:
        """Whether it can do so for this one."""

    def token_ids(self, asked: Asked) -> Sequence[int]:
        """The ids. Raises NoTokens."""


def _text(value: Any) -> str | None:
    return value[:512] if isinstance(value, str) and value else None


def _count(value: Any, *, signed: bool = False) -> int | None:
    if type(value) is not int or abs(value) > 100_000_000 or (value < 0 and not signed):
        return None
    return value
