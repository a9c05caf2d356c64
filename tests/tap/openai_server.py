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

PATIENCE_SECONDS = 60.0


def token_ids(text: str) -> list[int]:
    """The server's tokenizer: one token a character."""
    return [ord(character) for character in text]


class OpenAIServer:
    """Streams `tokens` chunks, `pause_seconds` apart; `max_tokens` of a request counts before it."""

    def __init__(self, pause_seconds: float = 0.0) -> None:
        self.pause_seconds = pause_seconds
        self.tokenize_status = 200
        self.cancelled = threading.Event()
        self.requests: list[tuple[str, str, dict[bytes, bytes], bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        target = scope["raw_path"].decode() + "?" + scope["query_string"].decode()
        self.requests.append((scope["method"], target, dict(scope["headers"]), body))
        if path == "/tokenize":
            asked = json.loads(body)
            text = asked["prompt"] if "prompt" in asked else "".join(m["content"] for m in asked["messages"])
            await _json(send, {"tokens": token_ids(text), "count": len(text)}, self.tokenize_status)
        elif path == "/v1/models":
            await _json(send, {"data": [{"id": "base", "parent": None}, {"id": "adapter", "parent": "base"}]})
        elif path in ("/v1/chat/completions", "/v1/completions"):
            await self._generate(body, receive, send)
        elif path == "/cut":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
        else:
            fields = [(b"x-one", b"1"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"keep-alive", b"timeout=5")]
            await send({"type": "http.response.start", "status": 418, "headers": fields})
            await send({"type": "http.response.body", "body": body})

    async def _generate(self, body: bytes, receive: Any, send: Any) -> None:
        try:
            asked = json.loads(body)
        except ValueError:
            await _json(send, {"error": {"message": "not JSON"}}, 400)
            return
        count = asked.get("max_tokens", 4)
        usage = {"prompt_tokens": 11, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 3}}
        if not asked.get("stream"):
            choice = {"message": {"content": "x" * count}, "finish_reason": "length"}
            await _json(send, {"choices": [choice], "usage": usage})
            return
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        events: list[Any] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": "x"}}]}] * count
        events += [{"choices": [{"delta": {}, "finish_reason": "length"}]}]
        if (asked.get("stream_options") or {}).get("include_usage"):
            events += [{"choices": [], "usage": usage}]
        for event in events:
            if self.pause_seconds:
                await asyncio.wait({gone}, timeout=self.pause_seconds)
            if gone.done():
                self.cancelled.set()
                return
            data = f"data: {json.dumps(event)}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        gone.cancel()


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

    def put(self, record: Any) -> None:
        self.records.append(record)

    def of_kind(self, kind: str, count: int = 1) -> list[Any]:
        """Its records of a kind, once there are `count`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            found = [record for record in self.records if record.kind == kind]
            if len(found) >= count or time.monotonic() > deadline:
                assert len(found) == count
                return found
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
        config = server_config(None if mirror else Upstream(upstream, tls), recorder.take, 5.0)
        config.port = 0
        return config

    with _serving(make, sessions) as running:
        yield running


async def _config(app: Any, more: Any) -> uvicorn.Config:
    return uvicorn.Config(app, port=0, lifespan="off", ws="none", log_config=None, date_header=False, **more)


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
