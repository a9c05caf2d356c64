"""A `tokenizer.json` of the test's own, with and without a chat template beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from kavier_twin.errors import UserError
from kavier_twin.tap.hashing import BlockHasher
from kavier_twin.tap.local_tokenizer import LocalTokenizer
from kavier_twin.tap.prompts import Asked, NoTokens
from tap.openai_server import OpenAIServer, event, serving, tapped

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra tap")

WORDS = ["<s>", "<|user|>", "<|assistant|>", "<|system|>", "once", "upon", "a", "time", "?"]
# As those of Llama and Qwen: loops, white space to be trimmed, a token from the config, an error for unknown roles.
TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('unknown role') }}
    {%- endif %}
    {%- if loop.first and not greeting %}{% continue %}{% endif %}
    {{- ' <|' + message.role + '|> ' }}{% generation %}{{ message.content | trim }}{% endgeneration %}
{%- endfor %}
{% if add_generation_prompt %}
    <|assistant|>
{% endif %}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?")
    reader = tokenizers.Tokenizer(model)
    reader.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    reader.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    reader.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def with_template(path: Path, *, separate: bool = False) -> LocalTokenizer:
    config: dict[str, Any] = {"bos_token": {"content": "<s>"}, "chat_template": "wrong" if separate else TEMPLATE}
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    if separate:
        path.with_name("chat_template.jinja").write_text(TEMPLATE)
    return LocalTokenizer(path)


def asked(**body: Any) -> Asked:
    kind = "chat/completions" if "messages" in body else "completions"
    return Asked.of(f"/v1/{kind}", json.dumps(body).encode(), None)


def said(*texts: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text} for text in texts]


def words(tokenizer: LocalTokenizer, request: Asked) -> list[str]:
    (ids,) = tokenizer.token_ids(request)
    return [WORDS[token] for token in ids]


def test_completions_begin_with_the_special_token_unless_told_otherwise(path: Path) -> None:
    tokenizer = LocalTokenizer(path)
    assert words(tokenizer, asked(prompt="once upon what")) == ["<s>", "once", "upon", "?"]
    assert words(tokenizer, asked(prompt="once", add_special_tokens=False)) == ["once"]
    for prompt in (None, 5, ["a", "b"][:0]):
        with pytest.raises(NoTokens, match="no-prompt"):
            tokenizer.token_ids(asked(prompt=prompt))


@pytest.mark.parametrize("separate", [False, True])
def test_a_chat_is_rendered_by_the_template(path: Path, separate: bool) -> None:
    tokenizer = with_template(path, separate=separate)
    kwargs = {"greeting": True, "messages": "not those", "add_generation_prompt": False}
    chat = asked(messages=said(" once ", "upon"), chat_template_kwargs=kwargs)
    expected = ["<s>", "<|user|>", "once", "<|user|>", "upon", "<|assistant|>"]
    assert tokenizer.knows(chat)
    assert words(tokenizer, chat) == expected
    assert words(tokenizer, asked(messages=said("once", "upon"))) == ["<s>", *expected[3:]]
    without = asked(messages=said("once", "upon"), add_generation_prompt=False)
    assert words(tokenizer, without) == ["<s>", "<|user|>", "upon"]


def test_what_the_template_refuses_shows_no_text(path: Path) -> None:
    with pytest.raises(NoTokens) as raised:
        with_template(path).token_ids(asked(messages=said("once", role="xyzzy")))
    assert (str(raised.value), raised.value.__cause__) == ("chat-template-failed", None)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "once"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": "once"},
        {"messages": said("once"), "tools": [{"type": "function"}]},
        {"messages": said("once"), "chat_template": "{{ messages }}"},
    ],
)
def test_chats_that_vllm_changes_first_are_left_to_it(path: Path, more: dict[str, Any]) -> None:
    tokenizer = with_template(path)
    assert not tokenizer.knows(asked(**more))
    with pytest.raises(NoTokens, match="no-chat-template"):
        tokenizer.token_ids(asked(**more))


def test_without_template_no_chat_is_known(path: Path) -> None:
    assert not LocalTokenizer(path).knows(asked(messages=said("once")))


def test_the_tap_asks_the_engine_for_the_rest_alone(path: Path) -> None:
    engine = OpenAIServer()
    with serving(engine) as upstream, tapped(upstream.url, tokenizer=with_template(path)) as tap:
        parts = [{"role": "user", "content": [{"type": "text", "text": "once"}]}]
        for messages in (said("once", "upon", "a"), said(*["time"] * 6)):
            httpx.post(f"{tap.url}/v1/chat/completions", json={"messages": messages, "stream": True})
        seen = tap.of_kind("request_seen", 2)
        assert [record.block_hashes for record in seen if record.prompt_tokens == 6] == [
            BlockHasher("sha256", 4).hashes([0, 1, 5, 1, 6, 2])
        ]
        assert not [target for _, target, _, _ in engine.requests if target.startswith("/tokenize")]
        engine.requests.clear()
        httpx.post(f"{tap.url}/v1/chat/completions", json={"messages": parts, "stream": True})
        assert tap.of_kind("request_seen", 3)[2].prompt_tokens == len("once")  # of the server's tokenizer
        assert [target for _, target, _, _ in engine.requests if target.startswith("/tokenize")]


def test_a_folder_stands_for_its_tokenizer(path: Path) -> None:
    assert LocalTokenizer(path.parent).text_ids("once upon") == ([4, 5], [4, 9])


def test_an_answer_has_hashes_as_far_as_its_stream_shows_the_engines_tokens(path: Path) -> None:
    """The engine wrote "a time" as one token, which the tokenizer would not; what is before it is certain."""
    pieces = ["once", " upon", " a", " time", " once", " a time", " once"]
    engine = OpenAIServer()
    engine.answer = [event({"choices": [{"index": 0, "delta": {"content": piece}}]}) for piece in pieces]
    asked = {"messages": said("once", "upon", "a"), "stream": True}
    with serving(engine) as upstream, tapped(upstream.url, tokenizer=with_template(path)) as tap:
        httpx.post(f"{tap.url}/v1/chat/completions", json=asked)
        (finished,) = tap.of_kind("request_finished")
    prompt = [0, 1, 5, 1, 6, 2]
    assert finished.block_hashes == BlockHasher("sha256", 4).hashes([*prompt, 4, 5, 6, 7, 4])[:2]
    assert len(finished.block_hashes) == 2


def test_files_that_cannot_be_read_are_told(path: Path) -> None:
    path.with_name("chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match=r"--tokenizer .*: the chat template beside it cannot be read"):
        LocalTokenizer(path)
    path.with_name("tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="chat template"):
        LocalTokenizer(path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        LocalTokenizer(path)
