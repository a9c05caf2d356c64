"""Connections to the engine, HTTP/1.1: heads and bodies go over them as they are, and nothing is added."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

_KEEP_IDLE_SECONDS: Final = 2.0  # vLLM's server closes after 5 s: a request must not meet a connection that closes
_CONNECT_SECONDS: Final = 10.0
_MOST_HEAD_BYTES: Final = 65_536
_MOST_WAITING_BYTES: Final = 262_144  # of an answer, before a client that reads slowly

Fields = list[tuple[bytes, bytes]]


class Upstream:
    """The one address that requests are passed on to, whatever they say. `url` has scheme, host and port."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        place = urlsplit(url)
        secure = place.scheme == "https"
        self.authority = place.netloc.rpartition("@")[2].encode("ascii")
        self._host = place.hostname or ""
        self._port = place.port or (443 if secure else 80)
        self._tls = (tls or ssl.create_default_context()) if secure else None
        self._idle: deque[tuple[float, Connection]] = deque()

    async def connection(self) -> Connection:
        """One to send a request over: kept from an earlier one, or new. Raises OSError, TimeoutError."""
        while self._idle:
            since_seconds, kept = self._idle.pop()
            if kept.lives and time.monotonic() - since_seconds < _KEEP_IDLE_SECONDS:
                return kept
            kept.close()
        async with asyncio.timeout(_CONNECT_SECONDS):
            loop = asyncio.get_running_loop()
            _, made = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        return made

    def give_back(self, connection: Connection) -> None:
        """Keep the connection for another request, if its answer leaves it fit for one."""
        if not connection.reusable:
            connection.close()
            return
        now_seconds = time.monotonic()
        while self._idle and now_seconds - self._idle[0][0] >= _KEEP_IDLE_SECONDS:
            self._idle.popleft()[1].close()
        self._idle.append((now_seconds, connection))

    def close(self) -> None:
        """Close what is kept."""
        while self._idle:
            self._idle.pop()[1].close()


class Connection(asyncio.Protocol):
    """One connection. For each request: `begin`, `write` what it is, then `head` and `piece` until that gives None.

    All three raise ConnectionError once the engine is gone or talks no HTTP.
    """

    def __init__(self) -> None:
        self.status = 0
        self.fields: Fields = []
        self.came_seconds = 0.0  # when the last data came, on the clock of `perf_counter`
        self.lives = True
        self.reusable = False
        self._transport: asyncio.Transport
        self._parser: httptools.HttpResponseParser | None = None
        self._bodiless = False
        self._head_bytes = 0
        self._headed = False
        self._ended = False
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._reading: asyncio.Future[None] | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()

    def begin(self, method: str) -> None:
        """A request of this method is about to be written."""
        self._parser = httptools.HttpResponseParser(self)
        self._bodiless = method == "HEAD"
        self._head_bytes = 0
        self._headed = self._ended = self.reusable = False

    async def write(self, data: bytes) -> None:
        """Send, and wait while the engine does not keep up."""
        if not self.lives:
            raise ConnectionResetError
        self._transport.write(data)
        await self._may_write.wait()

    async def head(self) -> None:
        """Wait for `status` and `fields` of the answer."""
        while not self._headed:
            await self._change()

    async def piece(self) -> bytes | None:
        """What has come of the body since the last call, at least something; None at its end."""
        while not self._pieces:
            if self._ended:
                return None
            await self._change()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if self._waiting_bytes > _MOST_WAITING_BYTES:
            self._transport.resume_reading()
        self._waiting_bytes = 0
        return data

    def close(self) -> None:
        """End the connection now: an engine that answers notices, and stops."""
        self.lives = self.reusable = False
        self._transport.abort()
        self._wake()

    async def _change(self) -> None:
        if not self.lives:
            raise ConnectionResetError
        self._reading = asyncio.get_running_loop().create_future()
        await self._reading

    def _wake(self) -> None:
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(None)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self._transport.set_write_buffer_limits(0)  # or uvloop writes only after everything else that is ready

    def data_received(self, data: bytes) -> None:
        self.came_seconds = time.perf_counter()
        if self._parser is None or self._ended:  # nobody asked
            self.close()
            return
        if not self._headed:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.close()
            return
        if not self._headed and self._head_bytes > _MOST_HEAD_BYTES:
            self.close()
        if self._waiting_bytes > _MOST_WAITING_BYTES:
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        names = {name.lower() for name, _ in self.fields}
        if self._headed and error is None and self.lives and not names & {b"content-length", b"transfer-encoding"}:
            self._ended = True  # such an answer lasts until the connection closes
        self.lives = self.reusable = False
        self._may_write.set()
        self._wake()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    # What the parser calls.

    def on_message_begin(self) -> None:
        self.fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._headed:  # what comes later are trailers
            self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        if self.status >= 200:  # before it there may be answers that only tell to wait
            self._headed = True
            self._ended = self._bodiless

    def on_body(self, data: bytes) -> None:
        if not self._bodiless:
            self._pieces.append(data)
            self._waiting_bytes += len(data)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._headed:
            self._ended = True
            self.reusable = self.lives and self._parser.should_keep_alive()
