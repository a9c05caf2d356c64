"""The reverse proxy: passes every HTTP request on to one address and its answer back, byte by byte as they come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any, Final

from kavier_twin.tap.bodies import Bodies
from kavier_twin.tap.upstream import Connection, Fields, Upstream
from kavier_twin.tap.watching import HandOver, Watch

# RFC 9110 section 7.6.1: of one connection, never passed on; with them the fields that `Connection` names.
_HOP_BY_HOP: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
# `Host` becomes the engine's, `Expect` was met by the server; of `Content-Length` see `_head`.
_OF_THIS_REQUEST: Final = _HOP_BY_HOP | {b"host", b"expect", b"content-length"}
_BAD_GATEWAY: Final = b'{"error":{"message":"the engine cannot be reached","type":"bad_gateway","code":502}}'
_BAD_TARGET: Final = b'{"error":{"message":"the target of a request is a path","type":"bad_request","code":400}}'

log = logging.getLogger(__name__)


class Proxy:
    """The ASGI application. `hand_over` is told of requests and their ends, and must return at once."""

    def __init__(self, upstream: Upstream, hand_over: HandOver) -> None:
        self.upstream = upstream
        self.hand_over = hand_over
        self.bodies = Bodies()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, proxy: Proxy, scope: Any, receive: Any, send: Any) -> None:
        self._proxy = proxy
        self._scope = scope
        self._receive = receive
        self._send = send
        self._arrived_seconds = time.perf_counter()
        self._connection: Connection | None = None
        self._client_gone = False
        self._sent_whole = False
        self._watch = Watch(proxy.hand_over, proxy.bodies, scope)
        self._added_seconds: float | None = None

    async def run(self) -> None:
        """Pass it on until it ended or the client went away."""
        outcome = "cancelled"  # as by the server, which ends
        try:
            outcome = await self._pass_on()
        finally:
            self._watch.ended(outcome, self._added_seconds)

    async def _pass_on(self) -> str:
        """Returns the outcome."""
        target = _target(self._scope)
        if not target.startswith(b"/"):
            await self._say(400, _BAD_TARGET)
            return "refused"
        listening: asyncio.Task[None] | None = None
        started = False
        try:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._client_gone = True
                return "cancelled"
            connection = self._connection = await self._proxy.upstream.connection()
            connection.begin(self._scope["method"])
            head, chunked = _head(self._scope, target, self._proxy.upstream.authority)
            first = self._part(message, chunked)
            kept_seconds = time.perf_counter() - self._arrived_seconds
            await connection.write(head + first)
            if self._sent_whole:
                self._watch.began()
            listening = asyncio.ensure_future(self._listen(connection, chunked))
            await connection.head()
            fields = _end_to_end(connection.fields, _HOP_BY_HOP)
            self._watch.head(connection.status, fields)
            status = connection.status
            await self._send({"type": "http.response.start", "status": status, "headers": fields})
            started = True
            while (piece := await connection.piece()) is not None:
                came_seconds = connection.came_seconds
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                if self._added_seconds is None:
                    self._added_seconds = kept_seconds + time.perf_counter() - came_seconds
                self._watch.piece(piece, came_seconds)
            listening.cancel()  # before the answer ends: the client that leaves then has its whole answer
            self._connection = None
            if self._sent_whole:
                self._proxy.upstream.give_back(connection)
            else:
                connection.close()
            await self._send({"type": "http.response.body", "body": b""})
            return "answered" if status < 400 else "refused"
        except (OSError, TimeoutError) as error:
            if self._client_gone:
                return "cancelled"
            log.warning("%s from the engine: %s", "half an answer" if started else "no answer", type(error).__name__)
            if started:  # without its end the server closes the connection: the client sees what happened
                return "cut"
            await self._say(502, _BAD_GATEWAY)
            return "unreachable"
        finally:
            if listening is not None:
                listening.cancel()
            if self._connection is not None:
                self._connection.close()  # the engine sees it, and stops

    async def _listen(self, connection: Connection, chunked: bool) -> None:
        """Pass on the rest of the body; then wait for the client to go away, and end it for the engine too."""
        try:
            while not self._sent_whole:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    break
                if data := self._part(message, chunked):
                    await connection.write(data)
            if self._sent_whole:
                self._watch.began()
            while self._sent_whole and (await self._receive())["type"] != "http.disconnect":
                pass
        except OSError:
            return  # the engine is gone, which its answer tells
        self._client_gone = True
        connection.close()

    def _part(self, message: Any, chunked: bool) -> bytes:
        """A piece of the request's body, as it goes on the wire."""
        data: bytes = message.get("body", b"")
        self._sent_whole = not message.get("more_body")
        self._watch.body(data)
        if not chunked:
            return data
        part = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        return part + b"0\r\n\r\n" if self._sent_whole else part

    async def _say(self, status: int, body: bytes) -> None:
        fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": status, "headers": fields})
        await self._send({"type": "http.response.body", "body": body})


def _target(scope: Any) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return path.split(b"?")[0] + (b"?" + query if query else b"")


def _head(scope: Any, target: bytes, authority: bytes) -> tuple[bytes, bool]:
    """The head of the request for the engine, and whether its body goes in chunks, as it does where it came so.

    One of both frames the body, never both (RFC 9112, 6.1): the engine must not see another end than the tap.
    """
    fields = scope["headers"]
    chunked = any(name == b"transfer-encoding" for name, _ in fields)
    lines = [scope["method"].encode() + b" " + target + b" HTTP/1.1\r\nhost: " + authority]
    if chunked:
        lines.append(b"transfer-encoding: chunked")
    else:
        lines += [b"content-length: " + value for name, value in fields if name == b"content-length"][:1]
    lines += [name + b": " + value for name, value in _end_to_end(fields, _OF_THIS_REQUEST)]
    return b"\r\n".join(lines) + b"\r\n\r\n", chunked


def _end_to_end(fields: Iterable[tuple[bytes, bytes]], left_out: frozenset[bytes]) -> Fields:
    """Header fields that belong to the message, not to one connection."""
    listed = [(name, name.lower(), value) for name, value in fields]
    named = {part.strip().lower() for _, name, value in listed if name == b"connection" for part in value.split(b",")}
    return [(name, value) for name, lower, value in listed if lower not in left_out and lower not in named]
