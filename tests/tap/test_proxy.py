"""The proxy between a real client and a small OpenAI-compatible server."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from kavier_twin.tap.hashing import Adapter, BlockHasher, ExtraKeys
from tap.openai_server import OpenAIServer, Running, serving, tapped, token_ids
from waiting import PATIENCE_SECONDS

PROMPT = "once upon a time"


@pytest.fixture
def engine() -> OpenAIServer:
    return OpenAIServer()


@pytest.fixture
def tap(engine: OpenAIServer) -> Iterator[Running]:
    with serving(engine) as upstream, tapped(upstream.url) as running:
        yield running


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5, **more}


def test_a_stream_makes_both_records(tap: Running, engine: OpenAIServer) -> None:
    before = time.time()
    engine.pause_seconds = 0.05
    asked = chat(stream=True, priority=2)
    answer = httpx.post(f"{tap.url}/v1/chat/completions", json=asked, headers={"X-Session-ID": "s1"})
    assert answer.text.endswith("data: [DONE]\n\n")
    assert answer.text.count('"content": "x"') == 5
    (seen,) = tap.of_kind("request_seen")
    (finished,) = tap.of_kind("request_finished")
    assert seen.block_hashes == BlockHasher("sha256", 4).hashes(token_ids(PROMPT))
    assert (seen.prompt_tokens, seen.max_tokens, seen.priority) == (len(PROMPT), 5, 2)
    assert (seen.session, seen.model, seen.pool) == ("s1", "base", "chat")
    assert before <= seen.time_seconds <= finished.time_seconds <= time.time()
    assert (finished.id, finished.output_tokens, finished.finish_reason) == (seen.id, 5, "length")
    assert 0.05 <= finished.ttft_seconds < finished.e2e_seconds
    assert finished.cached_tokens is None
    assert finished.block_hashes == BlockHasher("sha256", 4).hashes(token_ids(PROMPT + "xxxxx"))
    assert PROMPT not in repr(tap.records)


def test_usage_is_taken_where_the_answer_has_it(tap: Running) -> None:
    httpx.post(f"{tap.url}/v1/completions", json={"model": "base", "prompt": PROMPT, "max_tokens": 7})
    httpx.post(f"{tap.url}/v1/chat/completions", json=chat(stream=True, stream_options={"include_usage": True}))
    plain, stream = sorted(tap.of_kind("request_finished", 2), key=lambda record: record.ttft_seconds is not None)
    assert (plain.output_tokens, plain.cached_tokens, plain.ttft_seconds) == (7, 3, None)
    assert (stream.output_tokens, stream.cached_tokens) == (5, 3)


def test_the_engine_gets_the_request_untouched(tap: Running, engine: OpenAIServer) -> None:
    body = b'{ "model":"base",  "messages":[{"role":"user","content":"\\u00e9"}], "stream":true }'
    httpx.post(
        f"{tap.url}/v1/chat/completions?a=%2F", content=body, headers={"X-Own": "1", "Authorization": "Bearer k"}
    )
    method, target, fields, got = engine.requests[0]
    assert (method, target, got) == ("POST", "/v1/chat/completions?a=%2F", body)
    assert (fields[b"x-own"], fields[b"authorization"]) == (b"1", b"Bearer k")
    assert fields[b"content-length"] == str(len(body)).encode()


def test_any_other_path_passes_with_its_errors_and_fields(tap: Running, engine: OpenAIServer) -> None:
    headers = {"Connection": "x-mine", "X-Mine": "1", "TE": "trailers"}
    answer = httpx.request("PUT", f"{tap.url}/any/p%20ath", content=b"\xff\x00", headers=headers)
    assert (answer.status_code, answer.content) == (418, b"\xff\x00")
    assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert "keep-alive" not in answer.headers
    method, target, fields, _ = engine.requests[0]
    assert (method, target) == ("PUT", "/any/p%20ath?")
    assert not {b"x-mine", b"te"} & fields.keys()
    assert not tap.records


def test_chunks_come_as_they_are_made(tap: Running, engine: OpenAIServer) -> None:
    engine.pause_seconds = 0.1
    with httpx.stream("POST", f"{tap.url}/v1/chat/completions", json=chat(stream=True)) as answer:
        pieces = list(answer.iter_raw())
    assert len(pieces) >= 7


def test_a_client_that_leaves_cancels_at_the_engine(tap: Running, engine: OpenAIServer) -> None:
    engine.pause_seconds = 0.05
    with httpx.stream("POST", f"{tap.url}/v1/chat/completions", json=chat(stream=True, max_tokens=1000)) as answer:
        next(answer.iter_raw())
    assert engine.cancelled.wait(PATIENCE_SECONDS)
    (finished,) = tap.of_kind("request_finished")
    assert finished.finish_reason == "abort"
    assert finished.output_tokens < 1000
    tap.counted("kavier_twin_tap_requests_total", outcome="cancelled")


def test_a_client_that_leaves_before_the_first_byte_cancels_too(tap: Running, engine: OpenAIServer) -> None:
    engine.pause_seconds = 0.6
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{tap.url}/v1/chat/completions", json=chat(stream=True), timeout=0.2)
    assert engine.cancelled.wait(PATIENCE_SECONDS)
    (finished,) = tap.of_kind("request_finished")
    assert (finished.finish_reason, finished.output_tokens) == ("abort", 0)


def test_an_answer_that_breaks_off_breaks_off_for_the_client(tap: Running) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{tap.url}/cut")
    tap.counted("kavier_twin_tap_requests_total", outcome="cut")
    assert httpx.get(f"{tap.url}/next").status_code == 418


def test_no_engine_is_a_502() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with tapped(address) as tap:
            answer = httpx.post(f"{tap.url}/v1/chat/completions", json=chat())
    assert answer.status_code == 502
    assert answer.json()["error"]["type"] == "bad_gateway"
    assert not tap.records


@pytest.mark.parametrize(
    ("more", "extra"),
    [
        ({"model": "adapter"}, ExtraKeys(Adapter("adapter", "/adapters/one"))),
        ({"cache_salt": "s"}, ExtraKeys(salt="s")),
        ({"model": "adapter", "cache_salt": "s"}, ExtraKeys(Adapter("adapter", "/adapters/one"), "s")),
    ],
)
def test_adapters_and_salts_are_hashed_as_the_engine_does(tap: Running, more: dict[str, str], extra: ExtraKeys) -> None:
    httpx.post(f"{tap.url}/v1/chat/completions", json=chat(stream=True, **more))
    (seen,) = tap.of_kind("request_seen")
    (finished,) = tap.of_kind("request_finished")
    hasher = BlockHasher("sha256", 4)
    assert seen.block_hashes == hasher.hashes(token_ids(PROMPT), extra) != hasher.hashes(token_ids(PROMPT))
    assert finished.block_hashes == hasher.hashes(token_ids(PROMPT + "xxxxx"), extra)


def test_an_image_is_counted_by_the_engines_usage(tap: Running, engine: OpenAIServer) -> None:
    content = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": "data:," + "A" * 9_000}}]
    engine.counts_prompt_tokens = 340
    asked = chat(messages=[{"role": "user", "content": content}], stream=True)
    httpx.post(f"{tap.url}/v1/chat/completions", json={**asked, "stream_options": {"include_usage": True}})
    estimated, counted = tap.raw("request_seen", 2)
    assert (estimated.prompt_tokens_from, estimated.block_hashes) == ("estimate", ())
    assert 1_000 < estimated.prompt_tokens < 1_020
    assert (counted.prompt_tokens, counted.prompt_tokens_from, counted.block_hashes) == (340, "usage", ())
    assert counted.completes(estimated)
    tap.counted("kavier_twin_tap_without_hashes_total", reason="multimodal")
    httpx.post(f"{tap.url}/v1/chat/completions", json=asked)
    assert tap.of_kind("request_seen", 2)[1].prompt_tokens_from == "estimate"
    tap.of_kind("request_finished", 2)


def test_token_ids_of_the_client_are_taken(tap: Running, engine: OpenAIServer) -> None:
    httpx.post(f"{tap.url}/v1/completions", json={"model": "base", "prompt": [1, 2, 3, 4, 5], "stream": True})
    (seen,) = tap.of_kind("request_seen")
    assert seen.block_hashes == BlockHasher("sha256", 4).hashes([1, 2, 3, 4, 5])
    tokenised = [json.loads(body)["prompt"] for _, target, _, body in engine.requests if target == "/tokenize?"]
    assert tokenised == ["xxxx"]  # the answer


def test_what_the_engine_refuses_makes_no_record(tap: Running) -> None:
    assert httpx.post(f"{tap.url}/v1/completions", content=b"\xff\xfe{").status_code == 400
    tap.counted("kavier_twin_tap_requests_total", outcome="refused")
    assert not tap.records


def test_a_big_body_and_a_slow_client(tap: Running, engine: OpenAIServer) -> None:
    body = json.dumps(chat(messages=[{"role": "user", "content": "a" * 400_000}], stream=True)).encode()
    place = urlsplit(tap.url)
    with socket.create_connection((place.hostname, place.port), timeout=PATIENCE_SECONDS) as client:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        client.sendall(head.encode())
        for start in range(0, len(body), 150_000):
            client.sendall(body[start : start + 150_000])
            time.sleep(0.05)
        answer = b""
        while piece := client.recv(64):
            answer += piece
    assert b"data: [DONE]" in answer
    assert engine.requests[0][3] == body
    (seen,) = tap.of_kind("request_seen")
    assert len(seen.block_hashes) == 100_000


def test_a_mirror_answers_at_once_and_tells_arrivals_alone(engine: OpenAIServer) -> None:
    with serving(engine) as upstream, tapped(upstream.url, mirror=True) as tap:
        assert httpx.post(f"{tap.url}/v1/chat/completions", json=chat()).status_code == 204
        assert httpx.get(f"{tap.url}/health").status_code == 204
        assert httpx.post(f"{tap.url}/v1/completions", content=b'{"a":"\xff"}').status_code == 204
        (seen,) = tap.of_kind("request_seen")
        tap.counted("kavier_twin_tap_dropped_total", reason="not-utf8")
    assert seen.block_hashes == BlockHasher("sha256", 4).hashes(token_ids(PROMPT))
    assert [target for _, target, _, _ in engine.requests] == ["/tokenize?", "/v1/models?"]
