"""A small OpenAI-compatible server, and what runs it and a tap before it."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import uvicorn
import uvloop

from kavier_twin.tap.engine import Engine
from kavier_twin.tap.hashing import BlockHasher
from kavier_twin.tap.metrics import TapMetrics
from kavier_twin.tap.prompts import Tokenizer
from kavier_twin.tap.recorder import Recorder
from kavier_twin.tap.server import server_config
from kavier_twin.tap.upstream import Upstream

PATIENCE_SECONDS = 30.0


def token_ids(text: str) -> list[int]:
    """The server's tokenizer: one token a character."""
    return [ord(character) for character in text]


class OpenAIServer:
    """Streams `tokens` chunks, `pause_seconds` apart; `max_tokens` of a request counts before it.

    It counts prompts as its tokenizer does, unless `counts_prompt_tokens` says otherwise. It knows its own paths with
    and without the prefix /llm, and with a slash at their end.
    """

    def __init__(self, pause_seconds: float = 0.0) -> None:
        self.pause_seconds = pause_seconds
        self.first_pause_seconds = 0.0
        self.tokenize_pause_seconds = 0.0
        self.tokenize_status = 200
        self.refuses_with: int | None = None
        self.counts_prompt_tokens: int | None = None
        self.renders: list[int] | None = None  # what /render answers, if it is there
        self.prefixed_only = False  # whether it has no path without the prefix
        self.answer: list[bytes] | None = None  # the events of a stream, in place of its own
        self.cancelled = threading.Event()
        self.requests: list[tuple[str, str, dict[bytes, bytes], bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                assert (await receive())["type"] == f"lifespan.{phase}"
                await send({"type": f"lifespan.{phase}.complete"})
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = "/" + "/".join(segment for segment in scope["path"].split("/") if segment)
        if self.prefixed_only and not path.startswith("/llm/"):
            path = "/absent"
        path = path.removeprefix("/llm")
        target = scope["raw_path"].decode() + "?" + scope["query_string"].decode()
        self.requests.append((scope["method"], target, dict(scope["headers"]), body))
        if path == "/tokenize":
            await asyncio.sleep(self.tokenize_pause_seconds)
            asked = json.loads(body)
            text = asked["prompt"] if "prompt" in asked else _rendered(asked["messages"])
            await _json(send, {"tokens": token_ids(text), "count": len(text)}, self.tokenize_status)
        elif path.endswith("/render") and self.renders is not None:
            await _json(send, {"token_ids": self.renders})
        elif path == "/v1/models":
            adapter = {"id": "adapter", "parent": "base", "root": "/adapters/one"}
            await _json(send, {"data": [{"id": "base", "parent": None, "root": "base"}, adapter]})
        elif path in _GENERATING:
            await asyncio.sleep(self.first_pause_seconds)
            if self.refuses_with is not None:
                await _json(send, {"error": {"message": "refused"}}, self.refuses_with)
            elif self.answer is not None:
                await self._stream(self.answer, receive, send)
            else:
                await self._generate(path, body, receive, send)
        elif path in ("/v1/audio/transcriptions", "/generate"):
            await _json(send, {"text": "x"})
        elif path == "/own":
            await _json(send, {"usage": {"prompt_tokens": 3, "completion_tokens": int(body or b"0")}})
        elif path == "/cut":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
        else:
            fields = [(b"x-one", b"1"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"keep-alive", b"timeout=5")]
            await send({"type": "http.response.start", "status": 418, "headers": fields})
            await send({"type": "http.response.body", "body": body})

    async def _generate(self, path: str, body: bytes, receive: Any, send: Any) -> None:
        try:
            asked = json.loads(body)
        except ValueError:
            await _json(send, {"error": {"message": "not JSON"}}, 400)
            return
        count = asked.get("max_tokens", asked.get("max_output_tokens", 4))
        prompts = _prompts(asked)
        choices = len(prompts) * asked.get("n", 1)
        prompt_tokens = sum(map(len, prompts)) if self.counts_prompt_tokens is None else self.counts_prompt_tokens
        if path == "/v1/responses":
            whole, events = _responses(count, prompt_tokens)
        elif path == "/v1/messages":
            whole, events = _messages(count, prompt_tokens)
        else:
            usage = {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": count * choices,
                "prompt_tokens_details": {"cached_tokens": 3},
            }
            with_usage = (asked.get("stream_options") or {}).get("include_usage")
            whole, events = _openai(count, choices, usage, with_usage=bool(with_usage), is_chat="chat" in path)
        if asked.get("stream"):
            await self._stream(events, receive, send)
        else:
            await _json(send, whole)

    async def _stream(self, events: list[bytes], receive: Any, send: Any) -> None:
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for event in events:
            if self.pause_seconds:
                await asyncio.wait({gone}, timeout=self.pause_seconds)
            if gone.done():
                self.cancelled.set()
                return
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        gone.cancel()


_GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def event(content: Any, name: str | None = None) -> bytes:
    """One event of a stream."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(content)}\n\n".encode()


def _openai(
    count: int, choices: int, usage: dict[str, Any], *, with_usage: bool, is_chat: bool
) -> tuple[dict[str, Any], list[bytes]]:
    def choice(index: int, text: str, **more: Any) -> dict[str, Any]:
        said = {"delta": {"content": text}} if is_chat else {"text": text}
        return {"choices": [{"index": index, **said, **more}]}

    events = [{"choices": [{"index": i, "delta": {"role": "assistant", "content": ""}}]} for i in range(choices)]
    events = events if is_chat else []
    events += [choice(index, "x") for _ in range(count) for index in range(choices)]
    events += [choice(index, "", finish_reason="length") for index in range(choices)]
    events += [{"choices": [], "usage": usage}] if with_usage else []
    texts = [{"message": {"content": "x" * count}} if is_chat else {"text": "x" * count}] * choices
    whole = {
        "choices": [{"index": index, "finish_reason": "length", **text} for index, text in enumerate(texts)],
        "usage": usage,
    }
    return whole, [*map(event, events), b"data: [DONE]\n\n"]


def _responses(count: int, prompt_tokens: int) -> tuple[dict[str, Any], list[bytes]]:
    usage = {"input_tokens": prompt_tokens, "output_tokens": count, "input_tokens_details": {"cached_tokens": 3}}
    content = [{"type": "output_text", "text": "x" * count}]
    output = [{"type": "message", "role": "assistant", "content": content}]
    whole = {"object": "response", "status": "completed", "error": None, "output": output, "usage": usage}
    begun = {"type": "response.created", "response": {"object": "response", "status": "in_progress", "usage": None}}
    deltas = [{"type": "response.output_text.delta", "delta": "x"}] * count
    events = [begun, *deltas, {"type": "response.completed", "response": whole}]
    return whole, [event(each, str(each["type"])) for each in events]


def _messages(count: int, prompt_tokens: int) -> tuple[dict[str, Any], list[bytes]]:
    usage = {"input_tokens": prompt_tokens - 3, "cache_read_input_tokens": 3, "output_tokens": count}
    content = [{"type": "text", "text": "x" * count}]
    whole = {"type": "message", "role": "assistant", "content": content, "stop_reason": "max_tokens", "usage": usage}
    begun = {"type": "message_start", "message": {"usage": {"input_tokens": prompt_tokens, "output_tokens": 0}}}
    deltas = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x"}}] * count
    end = {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": usage}
    events = [begun, {"type": "content_block_start", "content_block": {}}, *deltas, end, {"type": "message_stop"}]
    return whole, [event(each, str(each["type"])) for each in events]


def _prompts(asked: dict[str, Any]) -> list[Any]:
    if "messages" in asked:
        return [str(asked.get("system") or "") + _rendered(asked["messages"])]
    prompt = asked.get("prompt", asked.get("input", ""))
    prompt = str(asked.get("instructions") or "") + prompt if isinstance(prompt, str) else prompt
    return list(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _rendered(messages: Any) -> str:
    contents = [each["content"] for each in messages]
    parts = [[{"text": each}] if isinstance(each, str) else each for each in contents]
    return "".join(part.get("text", "") for each in parts for part in each)


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def _json(send: Any, content: Any, status: int = 200) -> None:
    fields = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


@dataclass
class Running:
    """A server in a thread."""

    url: str
    metrics: TapMetrics = field(default_factory=TapMetrics)
    records: list[Any] = field(default_factory=list)
    recorder: Recorder | None = None

    def put(self, record: Any) -> None:
        self.records.append(record)

    def raw(self, kind: str, count: int = 1) -> list[Any]:
        """Its records of a kind as they came, once there are `count`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            found = [record for record in self.records if record.kind == kind]
            if len(found) >= count or time.monotonic() > deadline:
                assert len(found) == count
                return found
            time.sleep(0.01)

    def of_kind(self, kind: str, count: int = 1) -> list[Any]:
        """The fullest record of a kind of each of `count` requests, once nothing more is to come of them."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            idle = self.recorder is None or not self.recorder._tasks
            found: dict[str, Any] = {}
            for record in [record for record in self.records if record.kind == kind]:
                if record.id not in found or record.completes(found[record.id]):
                    found[record.id] = record
            if (idle and len(found) >= count) or time.monotonic() > deadline:
                assert len(found) == count, self.records
                return list(found.values())
            time.sleep(0.01)

    def counted(self, name: str, count: float = 1.0, **labels: str) -> None:
        """Wait until a counter has reached a value."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (value := self.metrics.registry.get_sample_value(name, labels)) != count:
            assert time.monotonic() < deadline, f"{name}{labels} is {value}"
            time.sleep(0.01)


@contextmanager
def serving(app: Any, **more: Any) -> Iterator[Running]:
    """Run an application."""
    with _serving(lambda running: _config(app, more)) as running:
        yield running


@contextmanager
def tapped(
    upstream: str,
    *,
    mirror: bool = False,
    ask_engine: bool = True,
    tokenizer: Tokenizer | None = None,
    tls: ssl.SSLContext | None = None,
) -> Iterator[Running]:
    """Run a tap before `upstream` whose records are kept in the test, and are made in the process of the traffic."""

    sessions: list[Any] = []

    async def make(running: Running) -> uvicorn.Config:
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls or True))
        sessions.append(session)
        engine = Engine(session, upstream) if ask_engine else None
        hasher = BlockHasher("sha256", 4)
        recorder = Recorder(running, running.metrics, hasher, tokenizer, engine, "chat", None)  # type: ignore[arg-type]
        running.recorder = recorder
        config = server_config(None if mirror else Upstream(upstream, tls), recorder.take, 5.0)
        config.port = 0
        return config

    with _serving(make, sessions) as running:
        yield running


async def _config(app: Any, more: Any) -> uvicorn.Config:
    options = {"lifespan": "off", "log_config": None, "date_header": False, **more}
    return uvicorn.Config(app, port=0, ws="none", **options)


@contextmanager
def _serving(make: Any, sessions: Sequence[Any] = ()) -> Iterator[Running]:
    running = Running("")
    begun = threading.Event()
    servers: list[uvicorn.Server] = []

    async def main() -> None:
        server = uvicorn.Server(await make(running))
        servers.append(server)
        serve = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        running.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        begun.set()
        await serve
        for session in sessions:
            await session.close()

    thread = threading.Thread(target=lambda: uvloop.run(main()))
    thread.start()
    assert begun.wait(PATIENCE_SECONDS)
    try:
        yield running
    finally:
        servers[0].should_exit = True
        thread.join()
