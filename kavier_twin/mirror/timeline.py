"""All that is known to have happened to a pool lately, in the order in which it happened.

The order depends on the content of the events alone, never on when they reached the twin. An event that comes late is
put in its place, and the mirror folds its state again from there (`mirror.Mirror`). Events are kept for as long as that
is possible.

One absurd time must not make everything after it late: a record that is `MAX_JUMP_SECONDS` ahead of all others waits
until `CONFIRMED_BY` in a row are. If one with a time like those before comes first, it is refused as `future_time`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Mapping
from copy import copy
from typing import Any, Final, NamedTuple

from kavier_twin.mirror.calibration.requests import Calibration
from kavier_twin.mirror.phantoms import Recorded, finished_requests, requests_inside, restarted
from kavier_twin.simulation.policies import Override
from kavier_twin.simulation.settings import StepTime
from kavier_twin.telemetry import CarbonSample, EngineSample, RequestFinished, RequestSeen

REMEMBERED_IDS: Final = 200_000  # record identities kept to recognise duplicates
MAX_JUMP_SECONDS: Final = 600.0
CONFIRMED_BY: Final = 3
REFUSED_WITHIN_SECONDS: Final = 5.0  # an error that takes longer, such as a timeout, follows a stay in the engine

Request = RequestSeen | RequestFinished


class Adopted(NamedTuple):
    """The engines turned out to have these settings."""

    time_seconds: float
    overrides: Mapping[str, Override]


class Fitted(NamedTuple):
    """Step times were fitted outside of the fold."""

    time_seconds: float
    step_time: StepTime
    frontend_seconds: float
    calibration: Calibration | None


Event = Request | EngineSample | CarbonSample | Adopted | Fitted
Key = tuple[float, int, str]
"""Time in seconds of event time, rank of the kind at equal times, and name."""

BEFORE: Final = (-1, "")
"""With a time: a key before those of all events of that time."""


class Entry:
    """An event in its place, and what was made of it so far: the first prediction is the one that is scored."""

    __slots__ = ("booked", "counted", "event", "key", "scored")

    def __init__(self, key: Key, event: Event) -> None:
        self.key = key
        self.event = event
        self.booked = False  # what it did was handed on (`applied`)
        self.scored = False  # what was predicted of it was compared with it
        self.counted = False  # what became of it was counted

    @property
    def time_seconds(self) -> float:
        """Event time at which it takes effect."""
        return self.key[0]


class Timeline:
    """Events in order, of which the first `position` were applied. Bounded by `forget`."""

    def __init__(self, ordering_seconds: float, remembered_ids: int = REMEMBERED_IDS) -> None:
        self.entries: list[Entry] = []
        self.position = 0
        self.newest_seconds = -math.inf
        self.floor_seconds = -math.inf  # no event can be put in its place before
        self.dirty_seconds = math.inf  # the earliest event that was put behind the position
        self._ordering_seconds = ordering_seconds
        self._remembered_ids = remembered_ids
        self._ahead: list[tuple[Request, bool]] = []  # far ahead of all others and not confirmed; whether foretold
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._clock_seconds = -math.inf
        self._applied_seconds = -math.inf  # how far the fold has come
        self._arrived: dict[str, tuple[float, str | None]] = {}  # by request: when, and the pod that its record names
        self._refused: set[str] = set()  # requests that no engine took
        self._samples: dict[str, list[float]] = {}  # times of each engine's samples, rising
        self._numbered = 0

    @property
    def watermark_seconds(self) -> float:
        """Event time up to which events are applied: a moment behind the newest, so that most are in order."""
        return max(self.newest_seconds, self._clock_seconds) - self._ordering_seconds

    @property
    def clock_seconds(self) -> float:
        """Event time that has passed by the clock; -inf where no clock tells."""
        return self._clock_seconds

    @property
    def last_seconds(self) -> float:
        """Event time of the last event that is known of, an end that was foretold included."""
        known = [self.entries[-1].time_seconds] if self.entries else []
        return max([self.newest_seconds, *known, *(event.time_seconds for event, _ in self._ahead)])

    @property
    def buffered(self) -> int:
        """Events that were not applied yet."""
        return len(self.entries) - self.position + len(self._ahead)

    def pass_to(self, clock_seconds: float) -> tuple[str, ...]:
        """Time passed up to here, whether or not records came. Returns what became of those that waited for it."""
        self._clock_seconds = max(self._clock_seconds, clock_seconds)
        return self.confirm(clock_seconds + MAX_JUMP_SECONDS)

    def offer(self, event: Request, *, foretold: bool = False) -> tuple[str, ...]:
        """Take a record in. Returns what became of it and of those that waited for it: one word for each.

        The words are "accepted", "completed" (it takes the place of one that tells less), "duplicate", "late" (beyond
        the time for which events are kept) and "future_time". A record that is `foretold`, the end in one record with
        its arrival, does not tell how far the stream has come.
        """
        identity = (event.kind, event.id)
        if identity in self._known:
            return ("completed",) if self._complete(event) else ("duplicate",)
        late = event.time_seconds < self.floor_seconds
        if late and isinstance(event, RequestSeen):
            return ("late",)
        self._known[identity] = None
        if len(self._known) > self._remembered_ids:
            self._known.popitem(last=False)
        if late:  # an end takes effect now: without it the request would run on for ever
            self._insert((self._applied_seconds, 1, event.id), event)
            return ("late",)
        newest = max(self.newest_seconds, self._clock_seconds)
        if foretold:
            waits = any(event.id == other.id for other, _ in self._ahead)
        else:
            waits = event.time_seconds > newest + MAX_JUMP_SECONDS > -math.inf
        if waits:
            self._ahead.append((event, foretold))
            counted = sum(not foretold for _, foretold in self._ahead)
            return self.confirm() if counted >= CONFIRMED_BY else ()
        refused = () if foretold else ("future_time",) * len(self._ahead)
        if refused:
            self._ahead.clear()
        self._accept(event, foretold=foretold)
        return (*refused, "accepted")

    def confirm(self, until_seconds: float = math.inf) -> tuple[str, ...]:
        """Those that wait far ahead of all others are right, as far as they lie before this time."""
        right = [entry for entry in self._ahead if entry[0].time_seconds <= until_seconds]
        self._ahead = [entry for entry in self._ahead if entry[0].time_seconds > until_seconds]
        for event, foretold in right:
            self._accept(event, foretold=foretold)
        return ("accepted",) * len(right)

    def observe(self, sample: EngineSample | CarbonSample) -> None:
        """Take a sample in. One that is too late is left out, as is one that is known."""
        if isinstance(sample, EngineSample):
            key = (sample.time_seconds, 2, f"{sample.namespace}/{sample.pod}/{sample.engine}")
        else:
            key = (sample.time_seconds, 3, "")
        if sample.time_seconds >= self.floor_seconds and not self._holds(key):
            self._insert(key, sample)
            if isinstance(sample, EngineSample):
                insort(self._samples.setdefault(key[2], []), sample.time_seconds)

    def following(self, sample: EngineSample) -> EngineSample | None:
        """The next sample of the same engine; None where there is none yet."""
        name = f"{sample.namespace}/{sample.pod}/{sample.engine}"
        times = self._samples.get(name, [])
        place = bisect_right(times, sample.time_seconds)
        if place >= len(times):
            return None
        return self._sample(name, times[place])

    def newest(self, sample: EngineSample) -> EngineSample:
        """The last sample of the same engine that is known."""
        name = f"{sample.namespace}/{sample.pod}/{sample.engine}"
        times = self._samples.get(name)
        return self._sample(name, times[-1]) if times else sample

    def recorded(self, pod: str, after_seconds: float, until_seconds: float) -> Recorded:
        """What records tell of a pod in (after, until]: all of them where they name no pod. Ends count where the
        arrival is known."""
        arrivals = ends = 0.0
        engines = [name.split("/") for name in self._samples]
        ranks = max(1, sum(name[1] == pod for name in engines))
        begin = bisect_right(self.entries, (after_seconds, math.inf, ""), key=_key)
        for place in range(begin, len(self.entries)):
            entry = self.entries[place]
            if entry.time_seconds > until_seconds:
                break
            event = entry.event
            if isinstance(event, Request) and event.id in self._refused:
                continue
            if isinstance(event, RequestSeen):
                arrivals += _share(event.pod, pod, ranks, len(engines))
            elif isinstance(event, RequestFinished) and event.id in self._arrived:
                ends += _share(self._arrived[event.id][1], pod, ranks, len(engines))
        return Recorded(arrivals, ends)

    def arrivals(self, begin_seconds: float, end_seconds: float) -> tuple[float, float]:
        """Arrivals that records tell of, and that engines counted, between samples of each engine around these times.

        Both 0 where no engine has two samples, or none that tells.
        """
        recorded = counted = 0.0
        engines = [name.split("/") for name in self._samples]
        came: dict[str | None, list[float]] = {}  # times by pod, rising
        begin = bisect_left(self.entries, (begin_seconds, *BEFORE), key=_key)
        for place in range(begin, bisect_right(self.entries, (end_seconds, math.inf, ""), key=_key)):
            entry = self.entries[place]
            if isinstance(entry.event, RequestSeen) and entry.event.id not in self._refused:
                came.setdefault(entry.event.pod, []).append(entry.time_seconds)
        for name, times in self._samples.items():
            first, last = bisect_left(times, begin_seconds), bisect_right(times, end_seconds) - 1
            if first >= last:
                continue
            before, after = (self._sample(name, times[place]) for place in (first, last))
            was, level = requests_inside(before), requests_inside(after)
            ended_before, ended = finished_requests(before), finished_requests(after)
            if was is None or level is None or ended is None or ended_before is None or restarted(before, after):
                continue
            pod = name.split("/")[1]
            ranks = max(1, sum(one[1] == pod for one in engines))
            counted += max(0.0, level + ended - was - ended_before)
            for named, at in came.items():
                requests = bisect_right(at, times[last]) - bisect_right(at, times[first])
                recorded += requests * _share(named, pod, ranks, len(engines))
        return recorded, counted

    def _sample(self, name: str, time_seconds: float) -> EngineSample:
        found = self.entries[bisect_left(self.entries, (time_seconds, 2, name), key=_key)].event
        assert isinstance(found, EngineSample)
        return found

    def is_refused(self, event: Event) -> bool:
        """Whether this is the arrival or the end of a request that no engine took."""
        return isinstance(event, Request) and event.id in self._refused

    def fold_again_from(self, time_seconds: float) -> None:
        """What happened since then has to be applied again."""
        self.dirty_seconds = min(self.dirty_seconds, time_seconds)

    def put(self, event: Adopted | Fitted) -> None:
        """Something that takes effect after what was applied so far."""
        self._numbered += 1
        self._insert((max(event.time_seconds, self._applied_seconds), 4, f"{self._numbered:012d}"), event)

    def due(self, until_seconds: float) -> Entry | None:
        """The next event up to this time; None where there is none."""
        if self.position < len(self.entries) and self.entries[self.position].time_seconds <= until_seconds:
            return self.entries[self.position]
        return None

    def applied(self, time_seconds: float) -> None:
        """The fold has come to this time."""
        self._applied_seconds = time_seconds

    def go_back(self, time_seconds: float) -> None:
        """Whatever happened from this time on is to be applied again."""
        self.position = bisect_left(self.entries, (time_seconds, *BEFORE), key=_key)
        self._applied_seconds = time_seconds
        self.dirty_seconds = math.inf

    def events_since(self, time_seconds: float) -> int:
        """How many events are known of from this time on."""
        return len(self.entries) - bisect_left(self.entries, (time_seconds, *BEFORE), key=_key)

    def forget(self, before_seconds: float) -> list[Entry]:
        """Nothing is put in its place before this time any more. Returns the events that are dropped."""
        self.floor_seconds = before_seconds
        count = min(self.position, bisect_left(self.entries, (before_seconds, *BEFORE), key=_key))
        dropped, self.entries = self.entries[:count], self.entries[count:]
        self.position -= count
        for entry in dropped:
            if isinstance(entry.event, RequestFinished):
                self._arrived.pop(entry.event.id, None)
                self._refused.discard(entry.event.id)
        while len(self._arrived) > self._remembered_ids:  # of requests whose end never came
            del self._arrived[next(iter(self._arrived))]
        for times in self._samples.values():
            del times[: bisect_left(times, before_seconds)]
        return dropped

    def fork(self) -> Timeline:
        """A copy that hands out what was not applied yet; nothing may be offered to it."""
        twin = copy(self)
        twin.entries, twin.position = self.entries[self.position :], 0
        twin.dirty_seconds = math.inf
        return twin

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "entries": [[*e.key, *_saved(e.event), e.booked, e.scored, e.counted] for e in self.entries],
            "position": self.position,
            "ahead": [[*_saved(event), foretold] for event, foretold in self._ahead],
            "known": list(self._known),
            "numbers": [
                self.newest_seconds,
                self.floor_seconds,
                self.dirty_seconds,
                self._clock_seconds,
                self._applied_seconds,
                self._numbered,
            ],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        for time, rank, name, kind, content, *flags in saved["entries"]:
            entry = Entry((time, rank, name), _restored(kind, content))
            entry.booked, entry.scored, entry.counted = flags
            self.entries.append(entry)
            if isinstance(entry.event, RequestSeen):
                self._arrived[entry.event.id] = entry.time_seconds, entry.event.pod
            elif isinstance(entry.event, RequestFinished):
                if _is_refusal(entry.event):
                    self._refused.add(entry.event.id)
            elif isinstance(entry.event, EngineSample):
                self._samples.setdefault(name, []).append(time)
        self.position = saved["position"]
        for kind, content, foretold in saved["ahead"]:
            event = _restored(kind, content)
            assert isinstance(event, RequestSeen | RequestFinished)
            self._ahead.append((event, foretold))
        self._known = OrderedDict(((kind, identity), None) for kind, identity in saved["known"])
        (
            self.newest_seconds,
            self.floor_seconds,
            self.dirty_seconds,
            self._clock_seconds,
            self._applied_seconds,
            self._numbered,
        ) = saved["numbers"]

    def _complete(self, event: Request) -> bool:
        """Put a fuller record in the place of one of the same request, if there is one to complete."""
        key = (event.time_seconds, 0 if isinstance(event, RequestSeen) else 1, event.id)
        place = bisect_left(self.entries, key, key=_key)
        if place >= len(self.entries) or self.entries[place].key != key:
            return False
        entry = self.entries[place]
        other = entry.event
        if isinstance(event, RequestSeen) and isinstance(other, RequestSeen):
            fuller = event.completes(other)
        else:
            fuller = (
                isinstance(event, RequestFinished) and isinstance(other, RequestFinished) and event.completes(other)
            )
        if fuller:
            entry.event = event
            if place < self.position:
                self.dirty_seconds = min(self.dirty_seconds, self._made_up_since(key[0]))
        return fuller

    def _accept(self, event: Request, *, foretold: bool) -> None:
        if not foretold:
            self.newest_seconds = max(self.newest_seconds, event.time_seconds)
        # At equal times a request is seen before it finishes.
        self._insert((event.time_seconds, 0 if isinstance(event, RequestSeen) else 1, event.id), event)

    def _insert(self, key: Key, event: Event) -> None:
        place = bisect_left(self.entries, key, key=_key)
        self.entries.insert(place, Entry(key, event))
        if isinstance(event, RequestSeen):
            self._arrived[event.id] = key[0], event.pod
        elif isinstance(event, RequestFinished) and _is_refusal(event):
            self._refused.add(event.id)
            arrival_seconds = self._arrived.get(event.id, (math.inf, None))[0]
            if self.floor_seconds <= arrival_seconds <= self._applied_seconds:
                self.fold_again_from(self._made_up_since(arrival_seconds))
        since = self._made_up_since(key[0])
        if place < self.position or min(key[0], since) < self._applied_seconds:
            self.position += place < self.position
            self.dirty_seconds = min(self.dirty_seconds, since)

    def _made_up_since(self, time_seconds: float) -> float:
        """The beginning of all intervals between samples that a time lies in: what is made up in them changes."""
        since = [time_seconds]
        for times in self._samples.values():
            place = bisect_left(times, time_seconds)
            if 0 < place < len(times):
                since.append(times[place - 1])
        return min(since)

    def _holds(self, key: Key) -> bool:
        place = bisect_left(self.entries, key, key=_key)
        return place < len(self.entries) and self.entries[place].key == key


def _is_refusal(finished: RequestFinished) -> bool:
    """Whether an engine or a gateway refused the request, so that no engine ever worked on it or queued it."""
    nothing = finished.output_tokens == 0 and finished.ttft_seconds is None
    return finished.finish_reason == "error" and nothing and (finished.e2e_seconds or 0.0) <= REFUSED_WITHIN_SECONDS


def _share(named: str | None, pod: str, ranks: int, engines: int) -> float:
    """How much of a request counts for an engine of this pod: records do not tell ranks, and may not tell pods."""
    if named is None:
        return 1.0 / max(engines, 1)
    return 1.0 / ranks if named == pod else 0.0


def _key(entry: Entry) -> Key:
    return entry.key


def _saved(event: Event) -> list[Any]:
    if isinstance(event, Adopted):
        return ["adopted", [event.time_seconds, dict(event.overrides)]]
    if isinstance(event, Fitted):
        calibration = None if event.calibration is None else event.calibration.save()
        return [
            "fitted",
            [event.time_seconds, event.step_time.model_dump(mode="json"), event.frontend_seconds, calibration],
        ]
    return [event.kind, event.model_dump(mode="json", exclude_defaults=True)]


_RECORDS: Final = {
    "request_seen": RequestSeen,
    "request_finished": RequestFinished,
    "engine_sample": EngineSample,
    "carbon_sample": CarbonSample,
}


def _restored(kind: str, content: Any) -> Event:
    if kind == "adopted":
        return Adopted(*content)
    if kind == "fitted":
        time, step_time, frontend_seconds, calibration = content
        found = None if calibration is None else Calibration.restored(calibration)
        return Fitted(time, StepTime.model_validate(step_time), frontend_seconds, found)
    event: Event = _RECORDS[kind].model_validate(content)  # type: ignore[attr-defined]
    return event
