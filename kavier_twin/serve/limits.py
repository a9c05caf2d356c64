"""What all requests have in common: limits, HEAD beside GET, security headers on every answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kavier_twin.serve.problems import answer

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_ALWAYS: Final = frozenset(
    {"/healthz", "/readyz", "/metrics"}
)  # probes and scrapes get through however busy the API is
TOO_LONG: Final = "the body exceeds http.max_body_bytes"


@dataclass(frozen=True)
class Limits:
    """What clients may cost."""

    body_bytes: int = 65_536
    at_once: int = 32  # requests, other than probes and scrapes
    horizon_seconds: float = 3_600.0  # that a what-if may look ahead
    requests: int = 1_000_000  # that one scenario of a what-if may have


class Envelope:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Cache-Control", "no-store")
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        length = Headers(scope=scope).get("Content-Length", "0")
        if length.isdecimal() and int(length) > self._limits.body_bytes:
            await answer(413, TOO_LONG)(scope, receive, with_headers)
            return
        counted = scope["path"] not in _ALWAYS
        if counted and self._under_way >= self._limits.at_once:
            busy = answer(503, "too many concurrent requests; try again in a second", headers={"Retry-After": "1"})
            await busy(scope, receive, with_headers)
            return
        if scope["method"] == "HEAD":  # the server leaves the body out
            scope = {**scope, "method": "GET"}
        self._under_way += counted
        try:
            await self._app(scope, _bounded(receive, self._limits.body_bytes), with_headers)
        finally:
            self._under_way -= counted


def _bounded(receive: Receive, most_bytes: int) -> Receive:
    """The same body, refused where it turns out too long: one sent in chunks has no length."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most_bytes:
            raise HTTPException(413, TOO_LONG)
        return message

    return bounded
