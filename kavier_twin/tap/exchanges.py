"""What the process that passes traffic on tells the one that makes records."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from kavier_twin.tap.bodies import BodyCopy


@dataclass(frozen=True)
class Request:
    """A request to generate. It has the prompt: neither is ever shown, and it lasts until that is tokenised."""

    path: str
    body: bytes = field(repr=False)
    session: str | None
    priority: int | None  # of the header field, which takes precedence over the body's
    authorization: str | None = field(repr=False)
    arrived_unix_seconds: float
    will_end: bool  # whether an `End` follows
    id: str = field(default_factory=lambda: f"tap-{uuid.uuid4().hex}")

    @classmethod
    def of(
        cls, path: str, body: BodyCopy, fields: Mapping[bytes, bytes], arrived_unix_seconds: float, *, will_end: bool
    ) -> Request | None:
        """With what its header fields (names in lower case) tell. None if its body is not to be had."""
        if fields.get(b"content-encoding", b"identity") != b"identity":
            body.drop("body")
        if body.dropped is not None:
            return None
        session = fields.get(b"x-session-id", b"").decode("latin-1")[:512]
        authorization = fields.get(b"authorization", b"").decode("latin-1")
        try:
            priority = int(fields.get(b"x-vllm-priority", b""))
        except ValueError:
            priority = None
        return cls(path, body.take(), session or None, priority, authorization or None, arrived_unix_seconds, will_end)


@dataclass(frozen=True)
class ChoiceEnd:
    """How one choice of an answer ended. Seconds count from the arrival; what was not measured is None.

    `chunks` counts the pieces of a stream that had output, or the characters of an answer that is no stream. `pieces`
    are the pieces of its text, None unless it was all text. It lasts until that is tokenised.
    """

    chunks: int = 0
    tokens: int | None = None  # as the engine counts, where it counts choice by choice
    first_seconds: float | None = None
    end_seconds: float | None = None
    finish_reason: str | None = None
    pieces: tuple[str, ...] | None = field(default=None, repr=False)
    token_ids: tuple[int, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class End:
    """How the answer to the request of this id ended. What was not told or measured is None.

    `refused` tells that no engine took the request. `output_tokens` is of all choices together.
    """

    id: str
    unix_seconds: float
    e2e_seconds: float
    refused: bool = False
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None  # of choices that give none themselves
    choices: tuple[ChoiceEnd, ...] = ()


@dataclass(frozen=True)
class Passed:
    """An exchange is over, whatever it was.

    `dropped` is why a request to generate makes no record, `unrecorded` the path of one that the tap does not know.
    """

    outcome: str
    added_seconds: float | None = None
    dropped: str | None = None
    unrecorded: str | None = None
    end: End | None = None


@dataclass(frozen=True)
class EngineAt:
    """Where the engine answers, where only its requests tell."""

    url: str
