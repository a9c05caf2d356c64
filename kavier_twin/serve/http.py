"""The server: uvicorn on a thread of its own, so that the daemon stays in charge of signals and of its end."""

from __future__ import annotations

import asyncio
import socket
from threading import Thread
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kavier_twin.serve.access import Access
from kavier_twin.serve.app import Twin, make_app
from kavier_twin.serve.limits import Limits
from kavier_twin.serve.problems import answer

IDLE_SECONDS: Final = 15.0  # a client that says nothing for so long is let go
BACKLOG: Final = 64
CLOSE_SECONDS: Final = 3.0  # that answers under way are given when the server ends


class AddressError(OSError):
    """The address cannot be listened on. The message names it."""


class HttpServer:
    """Serves a twin from `start` to `close`. Raises AddressError.

    Port 0 takes a free one: `port` tells which.
    """

    def __init__(
        self, twin: Twin, host: str, port: int, access: Access | None = None, limits: Limits | None = None
    ) -> None:
        self._socket = _bound(host, port)
        self.host = host
        self.port = int(self._socket.getsockname()[1])
        config = uvicorn.Config(
            make_app(twin, access or Access(), limits or Limits()),
            http=_Connection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._server.run, args=([self._socket],), name="http", daemon=True)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening; answers that take longer are cut when the process ends. May be called twice."""
        if self._thread.is_alive():
            self._server.should_exit = True
            self._thread.join(CLOSE_SECONDS)
        self._socket.close()


class _Connection(H11Protocol):
    """Closes a connection whose client leaves a request unfinished, sends none, or does not take its answer, for
    `IDLE_SECONDS` or two; tells a request that is no HTTP so in a problem document."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again(None)

    def _look_again(self, before: Any) -> None:
        self.loop.call_later(IDLE_SECONDS, self._look, before)

    def _look(self, before: Any) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is before and (self.conn.their_state is not h11.DONE or self.flow.write_paused):
            self.transport.abort()  # `close` would wait for the answer to be taken
        else:
            self._look_again(self.cycle)

    def send_400_response(self, msg: str) -> None:
        told = answer(400, "not an HTTP request, or its headers are too long")
        headers = [*told.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(told.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises AddressError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise AddressError(error.errno, f"cannot listen on {host}:{port}: {error.strerror or error}") from None
