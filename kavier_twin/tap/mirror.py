"""The receiver of mirrored traffic: outside the request path, so that it sees arrivals and nothing of answers."""

from __future__ import annotations

import time
from typing import Any

from kavier_twin.tap.bodies import Bodies, BodyCopy
from kavier_twin.tap.exchanges import Passed, Request
from kavier_twin.tap.paths import generates, kind_of
from kavier_twin.tap.watching import HandOver


class Mirror:
    """The ASGI application: answers 204 to everything, and makes the first record of requests to generate."""

    def __init__(self, hand_over: HandOver) -> None:
        self._hand_over = hand_over
        self._bodies = Bodies()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        arrived_unix_seconds = time.time()
        tapped = scope["method"] == "POST" and kind_of(scope["path"]) is not None
        body = BodyCopy(self._bodies)
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                body.take()
                self._hand_over(Passed("cut"))
                return
            if tapped:
                body.add(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        if tapped:
            fields = dict(scope["headers"])
            if request := Request.of(scope["path"], body, fields, arrived_unix_seconds, will_end=False):
                self._hand_over(request)
        unrecorded = scope["path"] if scope["method"] == "POST" and generates(scope["path"]) else None
        self._hand_over(Passed("mirrored", dropped=body.dropped, unrecorded=unrecorded))
