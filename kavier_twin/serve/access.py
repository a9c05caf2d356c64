"""Who may ask for what: reading is open unless told otherwise; what changes something or costs needs a bearer token."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from kavier_twin.serve.problems import ProblemError


@dataclass(frozen=True)
class Access:
    """`token` reads the bearer token that is valid now; None: nobody may change anything."""

    token: Callable[[], str] | None = None
    open_reading: bool = True

    def to_read(self, request: Request) -> None:
        """Refuse a reader without right. Raises ProblemError."""
        if not self.open_reading:
            self.to_change(request)

    def to_change(self, request: Request) -> None:
        """Refuse a caller without the token. Raises ProblemError."""
        if self.token is None:
            raise ProblemError(
                HTTPStatus.FORBIDDEN,
                "this needs a token, and none is configured; set http.token (env or file) in the settings file",
            )
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # compare_digest takes as long wherever the difference lies.
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token().encode()):
            raise ProblemError(
                HTTPStatus.UNAUTHORIZED,
                "send the token configured in http.token: Authorization: Bearer TOKEN",
                headers={"WWW-Authenticate": 'Bearer realm="kavier-twin"'},
            )


def guarded(check: Callable[[Request], None]) -> type[APIRoute]:
    """Routes that let `check` refuse a request before anything of its body is read."""

    class Guarded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def checked(request: Request) -> Response:
                check(request)
                return await handle(request)

            return checked

    return Guarded
