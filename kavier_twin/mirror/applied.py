"""What a mirror applied, in event order: the one account of what happened to a pool's requests.

Scores and reports read these events and keep no account of their own. Times are seconds of event time.
"""

from __future__ import annotations

from typing import NamedTuple

from kavier_twin.telemetry import RequestFinished


class Arrived(NamedTuple):
    """A request is under way."""

    id: str
    time_seconds: float


class Ended(NamedTuple):
    """The record of a request's end was applied. It holds whatever was assumed before, a `GivenUp` included."""

    arrival_seconds: float
    prompt_tokens: int
    finished: RequestFinished


class GivenUp(NamedTuple):
    """No record of its end came, so the mirror gave the request up.

    Its length is drawn from recent ones, its times are simulated; NaN: it never got so far.
    """

    id: str
    arrival_seconds: float
    scheduled_seconds: float
    first_token_seconds: float
    finish_seconds: float
    prompt_tokens: int
    output_tokens: int


class Dropped(NamedTuple):
    """A request is no longer under way: its replica restarted, or could not hold it. An `Ended` may still follow."""

    id: str


class Sized(NamedTuple):
    """The number of replicas, once a second."""

    time_seconds: float
    replicas: int


Applied = Arrived | Ended | GivenUp | Dropped | Sized
