"""`--closed-loop users=64,prompt=1024,output=128`: a benchmark at a fixed concurrency, as text."""

from __future__ import annotations

import re
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kavier_twin.errors import UserError, problems_of
from kavier_twin.simulation.workload import Workload, make_workload, take_rows

FORM = "users=64,prompt=1024,output=128,requests=640,think=0,ramp=0,seed=0"
_DRAWN = "exponential:"
_REQUESTS_PER_USER = 10


def _range(value: object) -> object:
    """`100-200` is drawn evenly between both, `100` is always 100."""
    found = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", value) if isinstance(value, str) else None
    if found is None or int(found[1]) > int(found[2] or found[1]):
        raise ValueError("expected a number of tokens, or LOW-HIGH")
    return int(found[1]), int(found[2] or found[1])


def _think(value: object) -> object:
    """`exponential:2` is drawn with that mean, `2` is always 2."""
    if isinstance(value, str) and value.startswith(_DRAWN):
        return value.removeprefix(_DRAWN), True
    return value, False


Tokens = Annotated[int, Field(ge=1, le=2**30)]
Seconds = Annotated[float, Field(ge=0.0, le=1e9)]
Lengths = Annotated[tuple[Tokens, Tokens], BeforeValidator(_range)]


class ClosedLoop(BaseModel):
    """`users` that each wait for an answer and think before they ask again. `ramp`: seconds within which they start,
    one after the other, evenly spread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    users: Annotated[int, Field(ge=1, le=1_000_000)]
    prompt: Lengths | None = None
    output: Lengths | None = None
    requests: Annotated[int | None, Field(ge=1, le=100_000_000)] = None
    think: Annotated[tuple[Seconds, bool], BeforeValidator(_think)] = (0.0, False)
    ramp: Seconds = 0.0
    seed: Annotated[int, Field(ge=0)] = 0

    def workload(self) -> Workload:
        """Requests with nothing in common. Raises UserError unless prompt and output are given."""
        if self.prompt is None or self.output is None:
            raise UserError(f"--closed-loop: without a trace, prompt and output are needed: {FORM}")
        count = self.requests or _REQUESTS_PER_USER * self.users
        rng = np.random.default_rng(self.seed)
        prompt = rng.integers(self.prompt[0], self.prompt[1], count, endpoint=True)
        output = rng.integers(self.output[0], self.output[1], count, endpoint=True)
        return self.started(make_workload(np.zeros(count), prompt, output))

    def started(self, workload: Workload) -> Workload:
        """These requests (or the first of them), of which the first of every user arrives when the ramp says."""
        count = min(self.requests or workload.index.size, workload.index.size)
        arrival = np.minimum(np.arange(count) / self.users, 1.0) * self.ramp
        return take_rows(workload, np.arange(count))._replace(arrival=arrival, delivered=arrival.copy())

    def think_seconds(self, requests: int) -> npt.NDArray[np.float64]:
        """Before each request, seconds."""
        seconds, drawn = self.think
        if not drawn:
            return np.full(requests, seconds)
        return np.random.default_rng([self.seed, 1]).exponential(seconds, requests)


def parse_closed_loop(text: str) -> ClosedLoop:
    """Raises UserError naming what is wrong."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator or not value:
            raise UserError(f"--closed-loop: {part!r}: expected NAME=VALUE, as in {FORM}")
        values[name.strip()] = value.strip()
    try:
        return ClosedLoop.model_validate(values)
    except ValidationError as error:
        problem, *_ = problems_of(error, known=lambda _: ClosedLoop.model_fields)
        raise UserError(f"--closed-loop: {problem}; expected something like {FORM}") from None
