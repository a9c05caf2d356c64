"""What a mirror applied, in event order: the one account of what happened to a pool's requests.

Scores and reports read these events and keep no account of their own. Times are seconds of event time.
"""

from __future__ import annotations

from typing import NamedTuple

from kavier_twin.telemetry import RequestFinished, RequestSeen


class Arrived(NamedTuple):
    """A request is under way on a replica. `seen` is its record."""

    id: str
    time_seconds: float
    seen: RequestSeen | None = None
    replica: int = -1


class Ended(NamedTuple):
    """The record of a request's end was applied. It holds whatever was assumed before, a `GivenUp` included."""

    arrival_seconds: float
    prompt_tokens: int
    finished: RequestFinished
    cached_tokens: int | None = None  # that the mirror found in the prefix cache; None where it was not simulated


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
    cached_tokens: int | None = None  # that the mirror found in the prefix cache


class Dropped(NamedTuple):
    """A request is no longer under way: its replica restarted, or could not hold it. An `Ended` may still follow."""

    id: str


class Restarted(NamedTuple):
    """A replica lost its cache at this time. The same restart may be told again."""

    replica: int
    time_seconds: float


class Sized(NamedTuple):
    """The number of replicas, once a second."""

    time_seconds: float
    replicas: int


Applied = Arrived | Ended | GivenUp | Dropped | Restarted | Sized
