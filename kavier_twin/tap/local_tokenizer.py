"""A tokenizer of the tap's own: the `tokenizer.json` of the model, and its chat template where one lies beside it.

The template is rendered as `apply_chat_template` of Hugging Face's transformers does, which is what vLLM calls:
`utils/chat_template_utils.py` there says which names and filters a template may use. vLLM changes messages before it
renders them where they have parts, tools or tool calls, by rules of its own: such a chat is left to its `/tokenize`.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Reader

from kavier_twin.errors import UserError
from kavier_twin.tap.prompts import Asked, NoTokens

_PLAIN_KEYS: Final = {"role", "content"}
_CHANGING_KEYS: Final = (
    *("tools", "documents", "chat_template", "reasoning_effort", "continue_final_message"),
    *("reasoning", "thinking", "output_config"),
)
_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class LocalTokenizer:
    """Tokenises completions, and plain chats where it finds the chat template.

    `path` is the file or its folder. The template is `chat_template.jinja` beside it, or the one in
    `tokenizer_config.json`, where the special tokens are, too. Raises UserError for files that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            self._reader = Reader.from_file(str(path))
        except Exception as error:  # the library has no class of its own for it
            raise UserError(f"--tokenizer {path}: no tokenizer.json ({error}); give that of the model") from error
        config = path.with_name("tokenizer_config.json")
        separate = path.with_name("chat_template.jinja")
        try:
            told = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
            text = separate.read_text(encoding="utf-8") if separate.is_file() else told.get("chat_template")
            self._names = {name: _content(told.get(name)) for name in _SPECIAL if told.get(name) is not None}
            self._template = _environment().from_string(text) if isinstance(text, str) else None
        except (ValueError, AttributeError, OSError, jinja2.TemplateError) as error:
            message = f"--tokenizer {path}: the chat template beside it cannot be read ({error}); correct or remove it"
            raise UserError(message) from error

    def knows(self, asked: Asked) -> bool:
        """Whether it tokenises this one as vLLM does."""
        return not asked.is_chat or (self._template is not None and _is_plain(asked))

    def token_ids(self, asked: Asked) -> list[list[int]]:
        """The ids of each prompt. Raises NoTokens."""
        if not self.knows(asked):
            raise NoTokens("no-chat-template")
        texts = [self._rendered(asked, prompt) if asked.is_chat else prompt for prompt in asked.prompts]
        if not all(isinstance(text, str) for text in texts):
            raise NoTokens("no-prompt")
        special = asked.body.get("add_special_tokens", not asked.is_chat)  # vLLM's defaults
        return [list(self._reader.encode(text, add_special_tokens=special is not False).ids) for text in texts]

    def text_ids(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of an answer's text, and the character at which each token ends."""
        read = self._reader.encode(text, add_special_tokens=False)
        return list(read.ids), [end for _, end in read.offsets]

    def _rendered(self, asked: Asked, messages: Any) -> str:
        assert self._template is not None
        more = asked.body.get("chat_template_kwargs")
        names = {**self._names, **(more if isinstance(more, dict) else {})}
        ask = asked.body.get("add_generation_prompt", True)
        names |= {"messages": messages, "add_generation_prompt": ask, "tools": None, "documents": None}
        try:
            return self._template.render(names)
        except Exception:  # a template may do anything; its error may show the prompt
            raise NoTokens("chat-template-failed") from None


def _is_plain(asked: Asked) -> bool:
    return not any(asked.body.get(key) for key in _CHANGING_KEYS) and all(map(_is_plain_chat, asked.prompts))


def _is_plain_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and all(isinstance(each, dict) and each.keys() == _PLAIN_KEYS for each in messages)
        and all(isinstance(each["role"], str) and isinstance(each["content"], str) for each in messages)
    )


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


class _Generation(Extension):
    """`{% generation %}`, which marks what an assistant says and changes nothing of it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
