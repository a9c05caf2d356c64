"""The twin over HTTP: metrics, health, and a status page.

| path | answers |
|---|---|
| `/` | the status page |
| `/metrics` | Prometheus text or OpenMetrics, as the scraper asks |
| `/status.json` | the views by pool, which the page is drawn from |
| `/healthz` | 200 while the process serves |
| `/readyz` | 200 once there are figures to serve, else 503 and why |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socketserver import TCPServer
from threading import Thread
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kavier_twin.serve.exporter import registry_of
from kavier_twin.serve.view import TwinView

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 15.0  # a client that says nothing for so long is let go
_TEXT: Final = "text/plain; charset=utf-8"
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
}


class AddressError(OSError):
    """The address cannot be listened on. The message names it."""


class _Answer(NamedTuple):
    status: HTTPStatus
    content_type: str
    body: bytes


class HttpServer:
    """Serves the current views by pool, each connection on a thread of its own. Raises AddressError.

    Port 0 takes a free one: `port` tells which.
    """

    def __init__(self, current: Callable[[], Mapping[str, TwinView]], host: str, port: int) -> None:
        self._current = current
        self._registry = registry_of(current)
        try:
            self._server = _Server((host, port), self)
        except OSError as error:
            raise AddressError(error.errno, f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        self.host = host
        self.port = int(self._server.server_address[1])
        self._thread = Thread(target=self._server.serve_forever, args=(0.1,), name="http", daemon=True)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening; answers under way are cut when the process ends. May be called twice."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def answer(self, path: str, accept: str) -> _Answer:
        """What a GET of this path is answered."""
        if path == "/metrics":
            return _metrics(self._registry, accept)
        if path == "/":
            return _Answer(HTTPStatus.OK, "text/html; charset=utf-8", _page())
        if path == "/status.json":
            pools = {name: view.to_dict() for name, view in self._current().items()}
            body = json.dumps({"pools": pools}, allow_nan=False).encode()
            return _Answer(HTTPStatus.OK, "application/json", body)
        if path == "/healthz":
            return _Answer(HTTPStatus.OK, _TEXT, b"ok\n")
        if path == "/readyz":
            reasons = [f"{name}: {why}" for name, view in self._current().items() for why in view.not_ready()]
            if not reasons:
                return _Answer(HTTPStatus.OK, _TEXT, b"ready\n")
            body = "".join(f"not ready: pool {why}\n" for why in reasons).encode()
            return _Answer(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, body)
        return _Answer(HTTPStatus.NOT_FOUND, _TEXT, b"nothing here; try /, /metrics, /status.json, /healthz, /readyz\n")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], owner: HttpServer) -> None:
        self.owner = owner
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's also asks the DNS for the host's name, which can hang

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a client's connection broke", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "kavier-twin"
    sys_version = ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self._reply(self._found())

    def do_HEAD(self) -> None:
        self._reply(self._found(), with_body=False)

    def _refuse(self) -> None:
        self.close_connection = True  # a body that came along is not read
        answer = _Answer(HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"only GET and HEAD\n")
        self._reply(answer, extra={"Allow": "GET, HEAD", "Connection": "close"})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse  # noqa: N815

    def _found(self) -> _Answer:
        try:
            return self.server.owner.answer(urlsplit(self.path).path, self.headers.get("Accept", ""))
        except Exception:
            log.exception("answering %s failed", urlsplit(self.path).path)
            return _Answer(HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, b"internal error; the log says more\n")

    def _reply(self, answer: _Answer, *, with_body: bool = True, extra: dict[str, str] | None = None) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in {**_HEADERS, **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.address_string(), format % args)


def _metrics(registry: CollectorRegistry, accept: str) -> _Answer:
    encode, content_type = choose_encoder(accept)
    return _Answer(HTTPStatus.OK, content_type, encode(registry))


@cache
def _page() -> bytes:
    return files("kavier_twin.serve").joinpath("page.html").read_bytes()
