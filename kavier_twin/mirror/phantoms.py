"""Requests that engines count and no record tells of, made up so that the mirror has as much to do as the fleet.

vLLM counts no arrivals. Requests are conserved, though: those that came between two samples of an engine are those that
have left and those that are still in it, so arrivals = change of (finished + running + waiting). What of that no record
tells is made up: a phantom arrives at a random moment of the interval, with the lengths and the cached prefix of a
recent request. When a record comes late, the interval is folded again with one phantom less, so a phantom gives way to
the record without any bookkeeping.

How many phantoms end follows from the balance: after the interval the mirror holds as many requests of the engine as
the engine says. Records and samples are cut at slightly different moments, so while records tell of nearly all
requests a difference of `TOLERANCE_REQUESTS` is nobody's.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from copy import copy
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.telemetry import EngineSample, RequestSeen

PREFIX: Final = "made-up:"
TOLERANCE_REQUESTS: Final = 2.0
_START_TOLERANCE_SECONDS: Final = 1.0  # of two ways to tell when the same process began
COVERED: Final = 0.9  # share of the arrivals counted that records tell of, above which the tolerance holds
_DELAYS_KEPT: Final = 2_000
_DELAYS_LEAST: Final = 30
_DELAYS_SECONDS: Final = 2.0
_COVERAGE_MEMORY_SECONDS: Final = 60.0
EXAMPLES: Final = 500  # recent requests whose lengths phantoms have

EngineKey = tuple[str, str, str]
"""Namespace, pod and data-parallel rank."""


class Recorded(NamedTuple):
    """What records tell of an engine between two of its samples: requests that came, and that ended."""

    arrivals: float
    ends: float


class Example(NamedTuple):
    """A recent request to take lengths from. `shared` are the hashes of the blocks that it found in the cache."""

    prompt_tokens: int
    shared: tuple[int, ...]
    block_tokens: int


class Arrival(NamedTuple):
    """A phantom arrives."""

    time_seconds: float
    number: int
    engine: EngineKey
    seen: RequestSeen


class End(NamedTuple):
    """One of an engine's phantoms ends."""

    time_seconds: float
    number: int
    engine: EngineKey


MadeUp = tuple[float, int, EngineKey, Arrival | End]
"""What is to come of a phantom, in the order of a heap."""


def is_phantom(identity: str) -> bool:
    """Whether a request was made up."""
    return identity.startswith(PREFIX)


def key_of(sample: EngineSample) -> EngineKey:
    """The engine that a sample is of."""
    return sample.namespace, sample.pod, sample.engine


def requests_inside(sample: EngineSample) -> float | None:
    """Running and waiting requests; None where the sample does not tell."""
    running, waiting = sample.requests_running, sample.requests_waiting
    return None if running is None or waiting is None else running + waiting


class Delays:
    """How late the records of arrivals came lately, by the clock of a live stream."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=_DELAYS_KEPT)  # (clock, delay)

    def add(self, clock_seconds: float, time_seconds: float) -> None:
        """A record of this time came now; ignored where no clock tells."""
        if math.isfinite(clock_seconds):
            self._recent.append((clock_seconds, max(0.0, clock_seconds - time_seconds)))
            while len(self._recent) > _DELAYS_LEAST and self._recent[0][0] < clock_seconds - _DELAYS_SECONDS:
                self._recent.popleft()  # an outage is soon over

    def later_than(self, ages_seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The share of records that come later than these ages."""
        known = np.sort(np.array([delay for _, delay in self._recent]))
        if not known.size:
            return np.zeros(ages_seconds.size)
        return 1.0 - np.searchsorted(known, ages_seconds, side="right") / known.size

    @property
    def longest_seconds(self) -> float:
        """Of the recent ones."""
        return max((delay for _, delay in self._recent), default=0.0)


@dataclass
class EngineLoad:
    """One engine as of its last sample that was applied."""

    last: EngineSample
    live: int  # requests of it that the mirror held then
    made_up_until: float = -math.inf  # event time
    phantoms: int = 0  # that arrived in the last interval
    arrivals_per_second: float = 0.0  # counted in it
    counted: float = 0.0  # arrivals lately, fading
    recorded: float = 0.0  # those of them that records tell of
    surplus: float = 0.0  # arrivals that gauges read too early told of, which counters have yet to make up for

    def fork(self) -> EngineLoad:
        """An independent copy."""
        return copy(self)

    def save(self) -> list[Any]:
        """As JSON types."""
        counts = [self.counted, self.recorded, self.surplus]
        numbers = [self.live, self.made_up_until, self.phantoms, self.arrivals_per_second, *counts]
        return [self.last.model_dump(mode="json", exclude_defaults=True), numbers]

    @classmethod
    def restored(cls, saved: list[Any]) -> EngineLoad:
        """What `save` gave."""
        sample, numbers = saved
        return cls(EngineSample.model_validate(sample), *numbers)

    @property
    def coverage(self) -> float:
        """Share of the arrivals lately that records tell of; 1 where nothing was counted."""
        return min(1.0, self.recorded / self.counted) if self.counted > 0.0 else 1.0


@dataclass
class Interval:
    """What is to be made up between two samples of an engine."""

    arrivals: int = 0
    ends: int = 0
    lost: int = 0  # requests that the engine holds no more, though no record tells of their end
    counted: float = 0.0
    recorded: float = 0.0
    surplus: float = 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing is to be made up."""
        return self.arrivals == 0 and self.ends == 0


def between(load: EngineLoad, after: EngineSample, recorded: Recorded, phantoms: int) -> Interval:
    """What is to be made up between an engine's last sample and the next, `phantoms` of it being in the mirror now."""
    found = Interval(recorded=recorded.arrivals, surplus=load.surplus)
    level, ended = requests_inside(after), finished_requests(after)
    was, ended_before = requests_inside(load.last), finished_requests(load.last)
    if level is None:
        return found
    if restarted(load.last, after):
        ended_before, was = 0.0, 0.0
    came = recorded.arrivals
    if ended is not None and was is not None and ended_before is not None:
        came = level + ended - was - ended_before - load.surplus
        found.surplus = max(0.0, -came)
        came = max(0.0, came)
    found.counted = came
    tolerance = TOLERANCE_REQUESTS if load.coverage >= COVERED else 0.0
    missing = came - recorded.arrivals
    found.arrivals = round(missing) if missing > tolerance else 0
    balance = load.live + recorded.arrivals + found.arrivals - recorded.ends - level
    if balance >= 0.0:
        found.ends = min(round(balance), phantoms + found.arrivals)
        found.lost = max(0, math.floor(balance - found.ends - TOLERANCE_REQUESTS))
    elif -balance > tolerance:
        found.arrivals += round(-balance)
    found.counted = max(found.counted, found.recorded + found.arrivals)
    return found


def take_over(load: EngineLoad, after: EngineSample, interval: Interval) -> None:
    """The interval up to this sample is made up."""
    seconds = max(after.time_seconds - load.last.time_seconds, 1e-9)
    keep = math.exp(-seconds / _COVERAGE_MEMORY_SECONDS)
    load.counted = keep * load.counted + interval.counted
    load.recorded = keep * load.recorded + min(interval.recorded, interval.counted)
    load.surplus = interval.surplus
    load.phantoms = interval.arrivals
    load.arrivals_per_second = interval.counted / seconds
    load.made_up_until = after.time_seconds


def make_up(
    pool: str, before: EngineSample, after: EngineSample, interval: Interval, phantoms: int, examples: list[Example]
) -> list[Arrival | End]:
    """Phantoms that arrive, and ends of phantoms, at random moments between two samples: the same for the same samples.

    There are `phantoms` before; an end comes when there is one to end. Without examples a phantom's prompt has the mean
    length that the engine's histogram tells.
    """
    engine = key_of(after)
    rng = np.random.default_rng(zlib.crc32(f"{engine}@{after.time_seconds}".encode()))
    start, stop = before.time_seconds, after.time_seconds
    events: list[Arrival | End] = []
    arrivals = np.sort(rng.uniform(start, stop, interval.arrivals)).tolist()
    for number, time in enumerate(arrivals):
        events.append(Arrival(time, number, engine, phantom(pool, engine, after, time, number, examples, rng)))
    for number in range(interval.ends):
        since = start if number < phantoms else arrivals[number - phantoms]
        events.append(End(float(rng.uniform(since, stop)), interval.arrivals + number, engine))
    return sorted(events, key=lambda event: event[:2])


def phantom(
    pool: str,
    engine: EngineKey,
    sample: EngineSample,
    time_seconds: float,
    number: int,
    examples: list[Example],
    rng: np.random.Generator,
) -> RequestSeen:
    """One phantom."""
    if examples:
        example = examples[int(rng.integers(len(examples)))]
    else:
        prompts = sample.request_prompt_tokens
        mean = prompts.sum / prompts.count if prompts is not None and prompts.count else 1.0
        example = Example(max(1, round(mean)), (), 0)
    return RequestSeen(
        id=f"{PREFIX}{engine[1]}/{engine[2]}@{sample.time_seconds:.3f}#{number}",
        time_seconds=time_seconds,
        pool=pool,
        model=sample.model,
        prompt_tokens=example.prompt_tokens,
        block_hashes=example.shared,
        block_tokens=example.block_tokens if example.shared else None,
        pod=engine[1] or None,
    )


def restarted(before: EngineSample, after: EngineSample) -> bool:
    """Whether another process counts: it says so, or a counter fell."""
    if before.started_seconds is not None and after.started_seconds is not None:
        return abs(after.started_seconds - before.started_seconds) > _START_TOLERANCE_SECONDS
    counters = ("prompt_tokens", "generation_tokens", "prefix_cache_queries_tokens")
    pairs = [(getattr(before, name), getattr(after, name)) for name in counters]
    pairs.append((finished_requests(before), finished_requests(after)))
    return any(a is not None and b is not None and b < a for a, b in pairs)


def finished_requests(sample: EngineSample) -> float | None:
    """Requests that left, whatever the reason."""
    if sample.requests_finished_by_reason:
        return sum(sample.requests_finished_by_reason.values())
    return sample.e2e_seconds.count if sample.e2e_seconds else None
