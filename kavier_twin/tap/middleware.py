"""The tap inside the engine's own server: `vllm serve --middleware kavier_twin.tap.middleware.Tap`.

It watches requests and answers pass by in the ASGI server and hands them to a second process, which makes the records.
Its options are those of `kavier-twin tap`, in the environment variable KAVIER_TWIN_TAP.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from typing import Any, Final

from kavier_twin.errors import UserError
from kavier_twin.tap.bodies import Bodies
from kavier_twin.tap.exchanges import EngineAt, Passed, Request
from kavier_twin.tap.paths import generates
from kavier_twin.tap.watching import Watch
from kavier_twin.tap.worker import Worker

OPTIONS: Final = "KAVIER_TWIN_TAP"
_END_SECONDS: Final = 5.0  # that an engine which ends waits for records; the second process goes on without it
_AGAIN_SECONDS: Final = 2.0  # after which a second process that did not start is tried again, then twice as long
_MOST_AGAIN_SECONDS: Final = 300.0

log = logging.getLogger(__name__)


class Tap:
    """An ASGI middleware. Whatever goes wrong in it, requests and answers pass unchanged."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._bodies = Bodies()
        self._worker: Worker | None = None
        self._starting: asyncio.Task[None] | None = None
        self._knows_engine = False
        self._failed = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        if scope["type"] == "http" and scope["method"] == "POST" and (watch := self._watch(scope)) is not None:
            await _Exchange(self, watch, receive, send).run(self._app, scope)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, self._until_shutdown(send))
        else:
            if scope["type"] == "websocket" and generates(scope["path"]):
                self.hand_over(Passed("answered", unrecorded=scope["path"]))
            await self._app(scope, receive, send)

    def hand_over(self, told: Request | Passed | EngineAt) -> None:
        """To the second process, if there is one."""
        if self._worker is not None:
            self._worker.take(told)

    def fault(self, error: Exception) -> None:
        """Log an error of the tap's own, the first time. Its text might hold a prompt."""
        if not self._failed:
            self._failed = True
            log.error("kavier-twin tap: a fault, some requests make no records: %s", type(error).__name__)

    def _watch(self, scope: Any) -> Watch | None:
        try:
            if not self._knows_engine and self._worker is not None:
                self._knows_engine = True
                if (url := _url(scope)) is not None:
                    self.hand_over(EngineAt(url))
            return Watch(self.hand_over, self._bodies, scope)
        except Exception as error:
            self.fault(error)
            return None

    async def _start(self) -> None:
        """Start the second process, and try again where that fails. Without it the engine serves as ever."""
        told, pause_seconds = "", _AGAIN_SECONDS
        while self._worker is None:
            try:
                worker = Worker(shlex.split(os.environ.get(OPTIONS, "")))
                port = await asyncio.to_thread(worker.start)
                await worker.attend()
            except (UserError, ValueError, OSError) as error:
                if str(error) != told:
                    told = str(error)
                    log.error("kavier-twin tap: no records are made: %s (the options are in %s)", told, OPTIONS)
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2.0 * pause_seconds, _MOST_AGAIN_SECONDS)
                continue
            self._worker = worker
            print(f"kavier-twin tap: makes records, metrics at port {port}", file=sys.stderr, flush=True)

    def _until_shutdown(self, send: Any) -> Any:
        async def watched(message: Any) -> None:
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                if self._starting is not None:
                    self._starting.cancel()
                worker, self._worker = self._worker, None
                if worker is not None:
                    await worker.leave(_END_SECONDS)
            await send(message)

        return watched


class _Exchange:
    """One request and its answer on their way through the application."""

    def __init__(self, tap: Tap, watch: Watch, receive: Any, send: Any) -> None:
        self._tap = tap
        self._watch = watch
        self._receive = receive
        self._send = send
        self._received_whole = False
        self._client_gone = False
        self._status = 0
        self._sent_whole = False

    async def run(self, app: Any, scope: Any) -> None:
        """Let the application answer."""
        outcome = "cut"
        try:
            await app(scope, self._receive_watched, self._send_watched)
            outcome = self._outcome()
        except (asyncio.CancelledError, OSError):  # what a server raises where it sends to a client that is gone
            outcome = "cancelled"
            raise
        finally:
            try:
                self._watch.ended(outcome)
            except Exception as error:
                self._tap.fault(error)

    def _outcome(self) -> str:
        if not self._sent_whole:
            return "cancelled" if self._client_gone else "cut"
        return "answered" if self._status < 400 else "refused"

    async def _receive_watched(self) -> Any:
        message = await self._receive()
        try:
            if message["type"] == "http.request":
                self._watch.body(message.get("body", b""))
                if not message.get("more_body") and not self._received_whole:
                    self._received_whole = True
                    self._watch.began()
            elif not self._sent_whole:
                self._client_gone = True
        except Exception as error:
            self._tap.fault(error)
        return message

    async def _send_watched(self, message: Any) -> None:
        came_seconds = time.perf_counter()
        await self._send(message)
        try:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                self._watch.head(self._status, message.get("headers", ()))
            elif message["type"] == "http.response.body":
                if body := message.get("body"):
                    self._watch.piece(bytes(body), came_seconds)
                # An answer to a client that left before it began is none.
                self._sent_whole = not message.get("more_body") and not self._client_gone
        except Exception as error:
            self._tap.fault(error)


def _url(scope: Any) -> str | None:
    """Where this server answers, None at a socket in the file system."""
    host, port = scope.get("server") or (None, None)
    if not host or not port:
        return None
    return f"{scope.get('scheme', 'http')}://{f'[{host}]' if ':' in host else host}:{port}"
