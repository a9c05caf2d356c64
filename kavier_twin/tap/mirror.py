"""The receiver of mirrored traffic: outside the request path, so that it sees arrivals and nothing of answers."""

from __future__ import annotations

import time
from typing import Any

from kavier_twin.tap.metrics import TapMetrics
from kavier_twin.tap.prompts import TAPPED_PATHS
from kavier_twin.tap.recorder import MOST_BODY_BYTES, Recorder, Request


class Mirror:
    """The ASGI application: answers 204 to everything, and makes the first record of requests to generate."""

    def __init__(self, recorder: Recorder, metrics: TapMetrics) -> None:
        self._recorder = recorder
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        arrived_unix_seconds, arrived_seconds = time.time(), time.perf_counter()
        tapped = scope["method"] == "POST" and scope["path"] in TAPPED_PATHS
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self._metrics.requests.labels("cut").inc()
                return
            if tapped and len(body) <= MOST_BODY_BYTES:
                body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        self._metrics.requests.labels("mirrored").inc()
        fields = dict(scope["headers"])
        if not tapped:
            return
        if len(body) > MOST_BODY_BYTES or fields.get(b"content-encoding", b"identity") != b"identity":
            self._metrics.dropped.labels("body").inc()
            return
        session = fields.get(b"x-session-id", b"").decode("latin-1")[:512] or None
        authorization = fields.get(b"authorization", b"").decode("latin-1") or None
        self._recorder.begun(
            Request(scope["path"], bytes(body), session, authorization, arrived_unix_seconds, arrived_seconds)
        )
