"""The reverse proxy: passes every HTTP request on to one address and its answer back, byte by byte as they come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import aiohttp
from yarl import URL

from kavier_twin.tap.answers import Answer
from kavier_twin.tap.metrics import TapMetrics
from kavier_twin.tap.prompts import TAPPED_PATHS
from kavier_twin.tap.recorder import MOST_BODY_BYTES, Recorder, Request

# RFC 9110 section 7.6.1: of one connection, never passed on; with them the fields that `Connection` names.
_HOP_BY_HOP: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
_OF_THIS_REQUEST: Final = frozenset(
    (b"host", b"expect")
)  # the client library sets the first, the server met the second
_KEEP_IDLE_SECONDS: Final = 2.0  # vLLM's server closes after 5 s: a request must not meet a connection that closes
_CONNECT_SECONDS: Final = 10.0
_BAD_GATEWAY: Final = b'{"error":{"message":"the engine cannot be reached","type":"bad_gateway","code":502}}'

log = logging.getLogger(__name__)


def client_session() -> aiohttp.ClientSession:
    """A client that changes nothing: no cookies, no decompression, no fields of its own, no limit in time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_IDLE_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        max_line_size=65_536,
        max_field_size=65_536,
    )


class Proxy:
    """The ASGI application. `upstream` is a URL without path."""

    def __init__(self, upstream: str, session: aiohttp.ClientSession, recorder: Recorder, metrics: TapMetrics) -> None:
        self._upstream = upstream.rstrip("/")
        self._session = session
        self._recorder = recorder
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        exchange = _Exchange(self._upstream, self._session, self._recorder, self._metrics, scope, receive, send)
        await exchange.run()


class _Exchange:
    """One request and its answer."""

    def __init__(
        self,
        upstream: str,
        session: aiohttp.ClientSession,
        recorder: Recorder,
        metrics: TapMetrics,
        scope: Any,
        receive: Any,
        send: Any,
    ) -> None:
        self._url = URL(f"{upstream}{_target(scope)}", encoded=True)
        self._session = session
        self._recorder = recorder
        self._metrics = metrics
        self._scope = scope
        self._receive = receive
        self._send = send
        self._tapped = scope["method"] == "POST" and scope["path"] in TAPPED_PATHS
        self._body = bytearray()  # a copy of a tapped request's
        self._sent_whole = asyncio.Event()
        self._client_gone = False
        self._request: Request | None = None
        self._answer: Answer | None = None
        self._arrived_unix_seconds = time.time()
        self._arrived_seconds = time.perf_counter()
        self._kept_seconds = 0.0

    async def run(self) -> None:
        """Pass it on until it ended or the client went away."""
        passing = asyncio.ensure_future(self._pass_on())
        watching = asyncio.ensure_future(self._until_gone())
        outcome = "cancelled"
        try:
            await asyncio.wait({passing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                outcome = passing.result()
        finally:
            ours = [task for task in (passing, watching) if not task.done()]
            for task in ours:
                task.cancel()
            await asyncio.gather(*ours, return_exceptions=True)  # its connection is closed: the engine stops
            self._record(outcome)
            self._metrics.requests.labels(outcome).inc()

    async def _pass_on(self) -> str:
        """Returns the outcome."""
        headers = _headers(self._scope["headers"], _HOP_BY_HOP | _OF_THIS_REQUEST)
        started = False
        try:
            data = await self._request_body()
            self._kept_seconds = time.perf_counter() - self._arrived_seconds
            async with self._session.request(
                self._scope["method"],
                self._url,
                headers=[(name.decode("latin-1"), value.decode("utf-8", "replace")) for name, value in headers],
                data=data,
                allow_redirects=False,
            ) as response:
                fields = _headers(((name.lower(), value) for name, value in response.raw_headers), _HOP_BY_HOP)
                self._look_at(response)
                await self._send({"type": "http.response.start", "status": response.status, "headers": fields})
                started = True
                first = True
                async for piece in response.content.iter_any():
                    came_seconds = time.perf_counter()
                    await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                    if first:
                        first = False
                        self._metrics.added.observe(self._kept_seconds + time.perf_counter() - came_seconds)
                    self._take(piece, came_seconds)
                await self._send({"type": "http.response.body", "body": b""})
                return "answered" if response.status < 400 else "refused"
        except (aiohttp.ClientError, OSError) as error:
            if self._client_gone:
                return "cancelled"
            log.warning("%s from the engine: %s", "half an answer" if started else "no answer", type(error).__name__)
            if started:  # without its end the server closes the connection: the client sees what happened
                return "cut"
            fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BAD_GATEWAY))]
            await self._send({"type": "http.response.start", "status": 502, "headers": fields})
            await self._send({"type": "http.response.body", "body": _BAD_GATEWAY})
            return "unreachable"

    async def _request_body(self) -> bytes | AsyncIterator[bytes] | None:
        """The body: at once if it came so, else piece by piece."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._client_gone = True
            raise ConnectionError
        data: bytes = message.get("body", b"")
        self._copy(data)
        if not message.get("more_body"):
            self._sent_whole.set()
            return data or None
        return self._pieces(data)

    async def _pieces(self, data: bytes) -> AsyncIterator[bytes]:
        if data:
            yield data
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._client_gone = True
                raise ConnectionError
            data = message.get("body", b"")
            self._copy(data)
            if not message.get("more_body"):
                self._sent_whole.set()
                if data:
                    yield data
                return
            if data:
                yield data

    def _copy(self, data: bytes) -> None:
        if self._tapped and len(self._body) <= MOST_BODY_BYTES:
            self._body += data

    async def _until_gone(self) -> None:
        """Return once the client went away."""
        await self._sent_whole.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._client_gone = True

    def _look_at(self, response: aiohttp.ClientResponse) -> None:
        if self._tapped and response.status == 200:
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            self._answer = Answer(streamed=response.content_type == "text/event-stream", encoded=encoded)

    def _take(self, piece: bytes, now_seconds: float) -> None:
        if self._answer is None:
            return
        self._answer.take(piece, now_seconds)
        if self._answer.first_token_seconds is not None and self._request is None and self._sent_whole.is_set():
            self._request = self._asked()
            if self._request is not None:
                self._recorder.begun(self._request, self._answer)

    def _asked(self) -> Request | None:
        if len(self._body) > MOST_BODY_BYTES:
            return None
        fields = dict(self._scope["headers"])
        if fields.get(b"content-encoding", b"identity") != b"identity":
            return None
        session = fields.get(b"x-session-id", b"").decode("latin-1")[:512]
        request = Request(
            self._scope["path"],
            bytes(self._body),
            session or None,
            fields.get(b"authorization", b"").decode("latin-1") or None,
            self._arrived_unix_seconds,
            self._arrived_seconds,
        )
        self._body.clear()
        return request

    def _record(self, outcome: str) -> None:
        if not self._tapped or outcome in ("refused", "unreachable") or not self._sent_whole.is_set():
            return
        if self._request is None:
            self._request = self._asked()
        if self._request is None:
            self._metrics.dropped.labels("body").inc()
            return
        answer = self._answer or Answer(streamed=True, encoded=False)
        reason = {"cancelled": "abort", "cut": "error"}.get(outcome)
        self._recorder.ended(self._request, answer, reason, time.perf_counter())


def _target(scope: Any) -> str:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return (path.split(b"?")[0] + (b"?" + query if query else b"")).decode("latin-1")


def _headers(fields: Iterable[tuple[bytes, bytes]], left_out: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """Header fields that belong to the message, not to one connection. Names in lower case."""
    listed = list(fields)
    named = {part.strip().lower() for name, value in listed if name == b"connection" for part in value.split(b",")}
    return [(name, value) for name, value in listed if name not in left_out and name not in named]
