"""Which records traffic of every kind makes: when they leave, what they hold, and which complete which."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kavier_twin.tap.hashing import BlockHasher
from kavier_twin.telemetry import RequestFinished, RequestSeen
from tap.openai_server import OpenAIServer, Running, event, serving, tapped, token_ids

PROMPT = "once upon a time"
HASHER = BlockHasher("sha256", 4)
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture
def engine() -> OpenAIServer:
    return OpenAIServer()


@pytest.fixture
def tap(engine: OpenAIServer) -> Iterator[Running]:
    with serving(engine) as upstream, tapped(upstream.url) as running:
        yield running


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5, "stream": True, **more}


def hashes(text: str) -> tuple[int, ...]:
    return HASHER.hashes(token_ids(text))


# When records leave.


def test_an_arrival_waits_neither_for_tokens_nor_for_the_first_token(tap: Running, engine: OpenAIServer) -> None:
    engine.tokenize_pause_seconds = 0.5
    engine.first_pause_seconds = 1.2
    with httpx.stream("POST", f"{tap.url}/v1/chat/completions", json=chat(priority=-3), timeout=20.0) as answer:
        left = list(tap.records)
        assert list(answer.iter_raw())
    estimated, whole = left  # both before the first token
    assert (estimated.prompt_tokens_from, estimated.prompt_tokens) == ("estimate", 4)
    assert (estimated.model, estimated.max_tokens, estimated.priority) == ("base", 5, -3)
    assert (whole.id, whole.time_seconds) == (estimated.id, estimated.time_seconds)
    assert (whole.prompt_tokens_from, whole.prompt_tokens) == ("tokenizer", len(PROMPT))
    assert whole.block_hashes == hashes(PROMPT)
    assert whole.completes(estimated)


def test_an_end_does_not_wait_for_tokens_either(tap: Running, engine: OpenAIServer) -> None:
    engine.tokenize_pause_seconds = 0.5
    before = time.time()
    assert httpx.post(f"{tap.url}/v1/chat/completions", json=chat()).status_code == 200
    estimated, whole = tap.raw("request_seen", 2)
    first, second = tap.raw("request_finished", 2)
    order = [(record.kind, bool(record.block_hashes)) for record in tap.records]
    assert order == [(kind, known) for known in (False, True) for kind in ("request_seen", "request_finished")]
    assert whole.completes(estimated)
    assert second.completes(first)
    assert second.model_copy(update={"block_hashes": ()}) == first
    assert second.block_hashes == hashes(PROMPT + "xxxxx")
    assert before <= second.time_seconds <= before + 0.5


def test_a_late_refusal_ends_what_was_seen_and_an_early_one_leaves_nothing(tap: Running, engine: OpenAIServer) -> None:
    engine.refuses_with = 503
    engine.first_pause_seconds = 0.5
    assert httpx.post(f"{tap.url}/v1/chat/completions", json=chat()).status_code == 503
    (finished,) = tap.of_kind("request_finished")
    assert (finished.output_tokens, finished.finish_reason, finished.ttft_seconds) == (0, "error", None)
    assert finished.e2e_seconds >= 0.5
    tap.of_kind("request_seen")
    tap.records.clear()
    engine.first_pause_seconds = 0.0
    engine.tokenize_pause_seconds = 0.3
    assert httpx.post(f"{tap.url}/v1/chat/completions", json=chat()).status_code == 503
    tap.counted("kavier_twin_tap_requests_total", 2.0, outcome="refused")
    tap.of_kind("request_seen", 0)


# The engine's own count.


@pytest.mark.parametrize("stream", [True, False])
def test_the_engines_count_beats_the_tokenizers(tap: Running, engine: OpenAIServer, stream: bool) -> None:
    engine.counts_prompt_tokens = 1_060
    for number in range(2):
        httpx.post(f"{tap.url}/v1/chat/completions", json=chat(stream=stream, **(USAGE if stream else {})))
        seen = tap.of_kind("request_seen", number + 1)[-1]
        assert (seen.prompt_tokens, seen.prompt_tokens_from, seen.block_hashes) == (1_060, "usage", ())
        assert tap.of_kind("request_finished", number + 1)[-1].block_hashes == ()
        tap.counted("kavier_twin_tap_without_hashes_total", number + 1.0, reason="usage-contradicts")
    last = [record for record in tap.raw("request_seen", len(tap.records) - 2) if record.id == seen.id]
    assert not any(record.block_hashes for record in last)  # such requests are in doubt now
    engine.counts_prompt_tokens = None
    for number in range(2, 4):
        httpx.post(f"{tap.url}/v1/chat/completions", json=chat(stream=stream, **(USAGE if stream else {})))
        assert tap.of_kind("request_seen", number + 1)[-1].block_hashes == hashes(PROMPT)


@pytest.mark.parametrize(
    "more",
    [
        {"documents": [{"title": "t", "text": "x" * 4_000}]},
        {"reasoning_effort": "high"},
        {"documents": [{"text": "x"}], "chat_template_kwargs": {"thinking": True}},
    ],
)
def test_what_tokenize_may_not_see_has_hashes_only_once_the_engine_counts_the_same(
    tap: Running, engine: OpenAIServer, more: dict[str, Any]
) -> None:
    httpx.post(f"{tap.url}/v1/chat/completions", json=chat(**more))
    (seen,) = tap.of_kind("request_seen")
    assert (seen.prompt_tokens, seen.block_hashes) == (len(PROMPT), ())
    tap.counted("kavier_twin_tap_without_hashes_total", reason="unconfirmed")
    httpx.post(f"{tap.url}/v1/chat/completions", json=chat(**more, **USAGE))
    assert tap.of_kind("request_seen", 2)[1].block_hashes == hashes(PROMPT)
    asked = [body for _, target, _, body in engine.requests if target == "/tokenize?" and b"messages" in body]
    assert all(key.encode() in asked[0] for key in more)  # as an argument of the template


def test_where_the_engine_renders_its_tokens_are_certain(tap: Running, engine: OpenAIServer) -> None:
    engine.renders = list(range(100, 110))
    httpx.post(f"{tap.url}/v1/chat/completions", json=chat(documents=[{"text": "x"}]))
    (seen,) = tap.of_kind("request_seen")
    assert (seen.prompt_tokens, seen.block_hashes) == (10, HASHER.hashes(engine.renders))
    assert "kavier_twin_tap_without_hashes" not in str(tap.metrics.without_hashes.collect()[0].samples)


def test_without_any_count_the_estimate_stands(tap: Running, engine: OpenAIServer) -> None:
    engine.tokenize_status = 500
    httpx.post(f"{tap.url}/v1/chat/completions", json=chat())
    (seen,) = tap.of_kind("request_seen")
    assert (seen.prompt_tokens, seen.prompt_tokens_from) == (4, "estimate")
    assert tap.of_kind("request_finished")[0].output_tokens == 5
    tap.counted("kavier_twin_tap_without_hashes_total", reason="tokenize-failed")


# Paths.

BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5},
    "completions": {"prompt": PROMPT, "max_tokens": 5},
    "responses": {"input": PROMPT[4:], "instructions": PROMPT[:4], "max_output_tokens": 5},
    "messages": {
        "system": PROMPT[:4],
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT[4:]}]}],
        "max_tokens": 5,
    },
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("form", ["/v1/{}", "/llm/v1/{}", "/v1/{}/", "//v1//{}"])
@pytest.mark.parametrize("api", BODIES)
def test_every_api_makes_records_behind_any_prefix(
    tap: Running, engine: OpenAIServer, api: str, form: str, stream: bool
) -> None:
    engine.prefixed_only = form.startswith("/llm")
    httpx.post(f"{tap.url}{form.format(api)}", json={"model": "base", **BODIES[api], "stream": stream, **USAGE})
    (seen,) = tap.of_kind("request_seen")
    (finished,) = tap.of_kind("request_finished")
    assert (seen.prompt_tokens, seen.max_tokens, seen.block_hashes) == (len(PROMPT), 5, hashes(PROMPT))
    assert (finished.output_tokens, finished.cached_tokens) == (5, 3)
    assert finished.finish_reason == ("stop" if api == "responses" else "length")
    assert finished.block_hashes == hashes(PROMPT + "xxxxx")
    assert (finished.ttft_seconds is not None) == stream
    assert PROMPT[4:] not in repr(tap.records)


@pytest.mark.parametrize("api", ["responses", "messages"])
def test_what_comes_before_the_first_token_is_no_first_token(tap: Running, engine: OpenAIServer, api: str) -> None:
    engine.pause_seconds = 0.2
    httpx.post(f"{tap.url}/v1/{api}", json={"model": "base", **BODIES[api], "stream": True})
    (finished,) = tap.of_kind("request_finished")
    assert finished.ttft_seconds >= 0.4


def test_a_request_that_a_router_renders_otherwise_is_counted_by_usage(tap: Running, engine: OpenAIServer) -> None:
    """As the Responses API with tools or a conversation that the server keeps."""
    body = {"model": "base", "input": PROMPT, "previous_response_id": "resp_1", "stream": True}
    httpx.post(f"{tap.url}/v1/responses", json=body)
    (seen,) = tap.of_kind("request_seen")
    assert (seen.prompt_tokens, seen.prompt_tokens_from, seen.block_hashes) == (len(PROMPT), "usage", ())
    tap.counted("kavier_twin_tap_without_hashes_total", reason="not-rendered")


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/audio/transcriptions", b"RIFF"), ("/generate", b"{}"), ("/own", b"7"), ("/llm/own/", b"7")]
)
def test_what_generates_without_records_is_counted_by_path_and_told_once(
    tap: Running, path: str, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert httpx.post(f"{tap.url}{path}", content=body).status_code == 200
    tap.counted("kavier_twin_tap_unrecorded_requests_total", 2.0, path=path)
    assert caplog.text.count(f"requests of '{path}' generate") == 1
    assert not tap.records


@pytest.mark.parametrize("body", [b"0", b""])
def test_what_does_not_generate_is_not_counted(tap: Running, body: bytes) -> None:
    httpx.post(f"{tap.url}/own", content=body)  # as an embedding: its usage has no output
    httpx.post(f"{tap.url}/tokenize", json={"prompt": PROMPT})
    tap.counted("kavier_twin_tap_requests_total", 2.0, outcome="answered")
    assert "path" not in str(tap.metrics.unrecorded.collect()[0].samples)


def test_an_answer_in_the_background_is_counted_as_not_recorded(tap: Running) -> None:
    httpx.post(f"{tap.url}/v1/responses", json={"model": "base", "input": PROMPT, "background": True})
    tap.counted("kavier_twin_tap_dropped_total", reason="background")
    tap.counted("kavier_twin_tap_unrecorded_requests_total", path="/v1/responses")


# Errors in a stream.

ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
TOKEN = event({"choices": [{"index": 0, "delta": {"content": "x"}}]})
ERROR = event({"error": {"message": "EngineCore died", "code": 500}})
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("api", "events", "output_tokens"),
    [
        ("chat/completions", [ERROR, DONE], 0),
        ("chat/completions", [ROLE, ERROR, DONE], 0),
        ("chat/completions", [ROLE, TOKEN, TOKEN, ERROR, DONE], 2),
        ("completions", [event({"object": "error", "message": "died"}), DONE], 0),
        ("chat/completions", [ROLE, b"event: error\ndata: died\n\n"], 0),
        ("responses", [event({"type": "response.created", "response": {}}), event({"type": "error"})], 0),
        (
            "responses",
            [event({"type": "response.failed", "response": {"status": "failed", "error": {"code": "server_error"}}})],
            0,
        ),
        ("messages", [event({"type": "message_start", "message": {}}), event({"type": "error", "error": {}})], 0),
    ],
)
def test_an_error_in_a_stream_is_an_error(
    tap: Running, engine: OpenAIServer, api: str, events: list[bytes], output_tokens: int
) -> None:
    engine.answer = events
    httpx.post(f"{tap.url}/v1/{api}", json={"model": "base", **BODIES[api], "stream": True})
    (finished,) = tap.of_kind("request_finished")
    assert (finished.finish_reason, finished.output_tokens) == ("error", output_tokens)
    assert (finished.ttft_seconds is None) == (output_tokens == 0)


# Several requests in one.


def test_choices_are_requests_of_one_prompt(tap: Running) -> None:
    httpx.post(f"{tap.url}/v1/chat/completions", json=chat(n=3, **USAGE))
    seen, finished = tap.of_kind("request_seen", 3), tap.of_kind("request_finished", 3)
    assert {record.block_hashes for record in seen} == {hashes(PROMPT)}
    assert sorted(record.id for record in seen) == sorted(record.id for record in finished)
    assert [(record.output_tokens, record.finish_reason) for record in finished] == [(5, "length")] * 3
    assert {record.block_hashes for record in finished} == {hashes(PROMPT + "xxxxx")}
    assert all(0.0 < record.ttft_seconds <= record.e2e_seconds for record in finished)


@pytest.mark.parametrize("stream", [True, False])
def test_several_prompts_are_several_requests(tap: Running, stream: bool) -> None:
    prompts = [PROMPT, PROMPT + " there was"]
    body = {"model": "base", "prompt": prompts, "n": 2, "max_tokens": 5, "stream": stream, **USAGE}
    httpx.post(f"{tap.url}/v1/completions", json=body)
    seen, finished = tap.of_kind("request_seen", 4), tap.of_kind("request_finished", 4)
    assert [record.block_hashes for record in seen] == [hashes(prompt) for prompt in prompts for _ in range(2)]
    assert [record.prompt_tokens for record in seen] == [len(prompt) for prompt in prompts for _ in range(2)]
    assert [record.output_tokens for record in finished] == [5] * 4
    assert [record.id for record in finished] == [record.id for record in seen]


# Completing is a question of what is known, not of what came first.

seen_records = st.builds(
    RequestSeen,
    id=st.just("a"),
    time_seconds=st.just(1.0),
    prompt_tokens=st.integers(1, 9),
    prompt_tokens_from=st.sampled_from(["estimate", "tokenizer", "usage"]),
    block_hashes=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    block_tokens=st.just(4),
)
finished_records = st.builds(
    RequestFinished,
    id=st.just("a"),
    time_seconds=st.just(1.0),
    output_tokens=st.just(3),
    block_hashes=st.lists(st.integers(0, 9), max_size=3).map(tuple),
)


@given(st.lists(seen_records, min_size=3, max_size=3) | st.lists(finished_records, min_size=3, max_size=3))
def test_completing_is_an_order(records: list[Any]) -> None:
    one, two, three = records
    assert not one.completes(one)
    assert not (one.completes(two) and two.completes(one))
    if one.completes(two) and two.completes(three):
        assert one.completes(three)
