"""Watches one exchange pass by, in the proxy or in the engine's own server, and hands over what it was."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from kavier_twin.tap.answers import Answer
from kavier_twin.tap.bodies import Bodies, BodyCopy
from kavier_twin.tap.exchanges import End, EngineAt, Passed, Request
from kavier_twin.tap.paths import generates, kind_of

HandOver = Callable[[Request | Passed | EngineAt], None]
_HAND_OVER_SECONDS: Final = 0.002  # after the engine has the request, so that its first bytes do not wait for it
_COUNTED: Final = re.compile(rb'"(?:completion|output)_tokens":\s*[1-9]')  # an answer's usage, whatever its path


class Watch:
    """One exchange. What happens to it is told in this order; nothing that it does waits or raises.

    `began`: the engine has the whole body. Times of the answer are on the clock of `time.perf_counter`.
    """

    def __init__(self, hand_over: HandOver, bodies: Bodies, scope: Any) -> None:
        self._hand_over = hand_over
        self._scope = scope
        self._arrived_unix_seconds = time.time()
        self._arrived_seconds = time.perf_counter()
        is_post = scope["method"] == "POST"
        self.recorded = is_post and kind_of(scope["path"]) is not None
        self._body = BodyCopy(bodies) if self.recorded else None
        self._may_generate = is_post and not self.recorded
        self._generates = False
        self._request: Request | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._status = 0
        self._answer: Answer | None = None

    def body(self, data: bytes) -> None:
        """A piece of the request's body."""
        if self._body is not None:
            self._body.add(data)

    def began(self) -> None:
        """The engine has the request. It is handed over in a moment, while the engine works."""
        if self._body is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_HAND_OVER_SECONDS, self._begin)

    def _begin(self) -> None:
        if self._body is None or self._timer is None or self._request is not None:
            return
        self._timer.cancel()
        fields = dict(self._scope["headers"])
        self._request = Request.of(self._scope["path"], self._body, fields, self._arrived_unix_seconds, will_end=True)
        if self._request is not None:
            self._hand_over(self._request)

    def head(self, status: int, fields: Iterable[tuple[bytes, bytes]]) -> None:
        """The head of the answer."""
        self._status = status
        if status != 200 or not (self.recorded or self._may_generate):
            self._may_generate = False
            return
        named = {name.lower(): value.lower() for name, value in fields}
        streamed = named.get(b"content-type", b"").startswith(b"text/event-stream")
        if self.recorded:
            encoded = named.get(b"content-encoding", b"identity") != b"identity"
            self._answer = Answer(streamed=streamed, encoded=encoded)
        else:
            self._generates = streamed or generates(self._scope["path"])
            self._may_generate = not self._generates

    def piece(self, data: bytes, came_seconds: float) -> None:
        """A piece of the answer's body."""
        if self._answer is not None:
            self._answer.take(data, came_seconds)
            self._begin()
        elif self._may_generate and _COUNTED.search(data):
            self._generates, self._may_generate = True, False

    def ended(self, outcome: str, added_seconds: float | None = None) -> None:
        """It is over."""
        dropped = end = None
        self._begin()
        if self._body is not None:
            if self._body.dropped is not None and self._status < 400 and outcome != "unreachable":
                dropped = self._body.dropped
            self._body.take()
        if self._request is not None:
            end = self._end(self._request.id, outcome)
        unrecorded = self._scope["path"] if self._generates else None
        self._hand_over(Passed(outcome, added_seconds, dropped, unrecorded, end))

    def _end(self, id: str, outcome: str) -> End:
        reason = {"cancelled": "abort", "cut": "error", "refused": "error", "unreachable": "error"}.get(outcome)
        answer = self._answer or Answer(streamed=True, encoded=False)
        now_seconds, now_unix_seconds = time.perf_counter(), time.time()
        end = answer.end(id, reason, self._arrived_seconds, now_seconds, now_unix_seconds)
        if outcome not in ("refused", "unreachable"):
            return end
        return End(id, end.unix_seconds, end.e2e_seconds, refused=True, finish_reason=reason)
