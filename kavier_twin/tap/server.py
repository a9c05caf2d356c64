"""A running tap: sockets, server, and the order in which it ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kavier_twin.errors import UserError
from kavier_twin.tap.mirror import Mirror
from kavier_twin.tap.proxy import Proxy
from kavier_twin.tap.upstream import Upstream
from kavier_twin.tap.watching import HandOver
from kavier_twin.tap.worker import RecordSettings, Worker

_BACKLOG: Final = 2048  # connections that wait to be accepted
_HEAD_SECONDS: Final = 30.0  # that a client may take for the head of a request
_MOST_HEAD_BYTES: Final = 65_536
_HEAD_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)


@dataclass(frozen=True)
class TapSettings:
    """How a tap runs. Without `upstream` it is a receiver of mirrored traffic."""

    host: str
    port: int
    upstream: str | None
    upstream_ca: Path | None
    grace_seconds: float


def serve(settings: TapSettings, records: RecordSettings, stopped: Callable[[], bool]) -> None:
    """Run until a signal; then finish the answers under way and hand over the records.

    `stopped` tells of a signal that came before the server could hear it.
    """
    with _listen(settings.host, settings.port) as listening:
        worker = Worker(records)
        metrics_port = worker.start()
        print(f"tap at http://{settings.host}:{listening.getsockname()[1]}, ", end="")
        print(f"metrics at http://{records.host}:{metrics_port}/metrics", flush=True)
        uvloop.run(_serve(settings, worker, listening, stopped))


async def _serve(settings: TapSettings, worker: Worker, listening: socket.socket, stopped: Callable[[], bool]) -> None:
    gc.freeze()  # what was imported stays; looking through it again would hold up answers
    await worker.attend()
    upstream = None
    if settings.upstream is not None:
        upstream = Upstream(settings.upstream, ssl.create_default_context(cafile=settings.upstream_ca))
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # an answer that was cut is told by the proxy
    server = uvicorn.Server(server_config(upstream, worker.take, settings.grace_seconds))
    if not stopped():
        await server.serve(sockets=[listening])
    if upstream is not None:
        upstream.close()
    await worker.end()


def server_config(upstream: Upstream | None, hand_over: HandOver, grace_seconds: float) -> uvicorn.Config:
    """The server of a tap: a proxy, or without `upstream` a receiver of mirrored traffic."""
    return uvicorn.Config(
        Mirror(hand_over) if upstream is None else Proxy(upstream, hand_over),
        http=_Connection,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        date_header=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(grace_seconds)),
    )


class _Connection(HttpToolsProtocol):
    """Bounds the head of a request, in bytes and in time, and knows nothing of what follows a body in chunks."""

    _in_head = True
    _head_bytes = 0
    _late: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # or uvloop writes only after everything else that is ready
        self._late = self.loop.call_later(_HEAD_SECONDS, self._close_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > _MOST_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_HEAD_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._late.cancel()
        self._late = self.loop.call_later(_HEAD_SECONDS, self._close_late)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._late.cancel()
        super().on_headers_complete()

    def _close_late(self) -> None:
        self.transport.close()


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(_BACKLOG)  # before the address is told, so that nobody is refused
    except OSError as error:
        listening.close()
        raise UserError(f"--port {port}: cannot listen at {host}: {error.strerror}; give another one") from error
    return listening
