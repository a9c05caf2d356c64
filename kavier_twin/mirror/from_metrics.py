"""A request stream behind engines' metrics, for a pool of which nothing else is known.

Between two samples of an engine its counters and gauges tell how many requests came and ended, how long those were,
how long they took, and how much the prefix cache gave (vLLM's v1/metrics/stats.py). Requests made up
to match go into the mirror like real ones. What no counter tells is drawn, from a seed that the sample itself gives,
so that the same samples make the same stream: when in the interval something happened (evenly spread at random, as
for Poisson arrivals), and which request a length belongs to.

Which prompts share what is not known either. The share of prompt tokens found in the cache is: every prompt begins
with that much of one text per engine, which is always cached, and goes on with a text of its own. A smaller cache
therefore costs these requests no hits, as it would real ones.
"""

from __future__ import annotations

import heapq
import math
import zlib
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kavier_twin.mirror.calibration.requests import CalibrationError
from kavier_twin.mirror.calibration.steps import Counted, calibrate_counters
from kavier_twin.mirror.fidelity.windows import find_score
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.mirror.phantoms import finished_requests, restarted
from kavier_twin.simulation.settings import EngineSettings
from kavier_twin.telemetry import EngineSample, Histogram, RequestFinished, RequestSeen

Floats = npt.NDArray[np.float64]
Event = RequestSeen | RequestFinished

LENGTHS_FROM_SECONDS: Final = 120.0  # how far back prompts are looked at for the length of new ones
SHORTEST_SECONDS: Final = 5.0  # between samples that are used: in less, most requests neither come nor end
KEPT_INTERVALS: Final = 200  # of each engine, to calibrate on
FORGET_SECONDS: Final = 600.0  # an engine silent for so long is gone, and what was in it with it
SILENT_SECONDS: Final = 60.0  # after which an engine without a sample is not waited for
CALIBRATE_EVERY_SECONDS: Final = 60.0
_FEW_PROMPTS: Final = 20  # too few to have a mean of their own
_NEVER: Final = 2**62
_LONGEST_HOLD_SECONDS: Final = 0.1  # less than beside real ends: these are off by as much as requests lie apart
_TAIL_FACTOR: Final = 1.5  # a value above the last limit of a histogram: so many times that limit


def mirror_settings(settings: MirrorSettings) -> MirrorSettings:
    """For a mirror that follows such a stream.

    It is calibrated from outside (`MetricsStream.lead`), and replicas hardly wait for ends that are no real ones.
    """
    return replace(
        settings, phantoms=False, calibrate_after_requests=_NEVER, longest_hold_seconds=_LONGEST_HOLD_SECONDS
    )


class MetricsStream:
    """Turns samples into records of requests. Samples of one engine come in order of time."""

    def __init__(self, pool: str, engine: EngineSettings) -> None:
        self._pool = pool
        self._settings = engine
        self._engines: dict[tuple[str, str, str], _Engine] = {}
        self._ready: list[tuple[float, int, str, Event]] = []  # heap
        self._calibrated_seconds = -math.inf

    def use(self, engine: EngineSettings) -> None:
        """Go on with these settings of the engines."""
        self._settings = engine
        for known in self._engines.values():
            known.use(engine)

    def take(self, sample: EngineSample) -> None:
        """Take in a sample of an engine."""
        key = (sample.namespace, sample.pod, sample.engine)
        engine = self._engines.setdefault(key, _Engine(self._pool, self._settings))
        events = engine.take(sample)
        for gone in [k for k, e in self._engines.items() if e.newest_seconds < sample.time_seconds - FORGET_SECONDS]:
            events += self._engines.pop(gone).lost(sample.time_seconds)
        for event in events:
            order = 0 if isinstance(event, RequestSeen) else 1
            heapq.heappush(self._ready, (event.time_seconds, order, event.id, event))

    def due(self) -> list[Event]:
        """The records up to the time from which on an engine may still tell of more, in order."""
        newest = [engine.last.time_seconds for engine in self._engines.values() if engine.last is not None]
        heard = [time for time in newest if time >= max(newest) - SILENT_SECONDS]
        until = min(heard, default=-math.inf)
        events = []
        while self._ready and self._ready[0][0] <= until:
            events.append(heapq.heappop(self._ready)[3])
        return events

    def lead(self, mirror: Mirror) -> None:
        """Hand what is due to the mirror, and now and then step times fitted to the counters of the last samples.

        Its own calibration needs requests whose durations are their own.
        """
        for event in self.due():
            mirror.ingest(event)
        newest = max((e.last.time_seconds for e in self._engines.values() if e.last is not None), default=-math.inf)
        if newest < self._calibrated_seconds + CALIBRATE_EVERY_SECONDS:
            return
        self._calibrated_seconds = newest
        rows = np.array([row for engine in self._engines.values() for row in engine.counted], np.float64)
        counted = Counted(*rows.reshape(-1, len(Counted._fields)).T)
        capacity = (self._settings.num_gpu_blocks - 1) * self._settings.block_size
        counted = counted._replace(context_tokens=counted.context_tokens * capacity)
        try:
            found = calibrate_counters(counted, prior=mirror.settings.prior, floor=mirror.settings.floor)
        except CalibrationError:
            return
        queue = find_score(mirror.scores, "queue_seconds", "mean")
        waited = queue.predicted - queue.observed if queue is not None else 0.0
        found = replace(found, frontend_seconds=max(0.0, self._outside_seconds() - max(0.0, waited)))
        mirror.use(found.step_time, found.frontend_seconds, found)

    def _outside_seconds(self) -> float:
        """Mean part of the end-to-end latency that queue, prefill and decode leave, of late; 0 if unknown.

        That is the frontend's, and the end of a step that was under way: an engine sees a request, and begins to
        count its queue time, only between two steps (vLLM's v1/engine/core.py), where the simulation lets it queue.
        """
        total = count = 0.0
        for engine in self._engines.values():
            first, last = engine.recent[0], engine.recent[-1]
            names = ("e2e_seconds", "queue_seconds", "prefill_seconds", "decode_seconds")
            e2e, *inside = [risen(getattr(first, name), getattr(last, name)) for name in names]
            known = [part.sum for part in inside if part is not None]
            if e2e is not None and len(known) == len(inside):
                total += e2e.sum - sum(known)
                count += e2e.count
        return total / count if count else 0.0

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "engines": [[*key, engine.save()] for key, engine in self._engines.items()],
            "ready": [[order, event.model_dump(mode="json")] for _, order, _, event in sorted(self._ready)],
            "calibrated_seconds": self._calibrated_seconds,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """What `save` gave."""
        self._calibrated_seconds = saved["calibrated_seconds"]
        for namespace, pod, rank, state in saved["engines"]:
            self._engines[namespace, pod, rank] = _Engine.restored(self._pool, self._settings, state)
        for order, content in saved["ready"]:
            event: Event = (RequestFinished if order else RequestSeen).model_validate(content)
            self._ready.append((event.time_seconds, order, event.id, event))  # sorted, which is a heap


class _Engine:
    """One engine: its last sample, and the requests made up that are still in it."""

    def __init__(self, pool: str, settings: EngineSettings) -> None:
        self.last: EngineSample | None = None
        self.recent: deque[EngineSample] = deque()  # of one process, over LENGTHS_FROM_SECONDS
        self.counted: deque[Floats] = deque(maxlen=KEPT_INTERVALS)  # as `_counted` gives them
        self._pool = pool
        self._settings = settings
        self._inside: list[tuple[float, str, int]] = []  # (arrival, id, tokens it has from the cache), rising
        self._surplus = 0.0  # arrivals told of by gauges read too early, which counters have yet to make up for
        self._hit_ratio = 0.0
        self._hits_owed = 0.0  # tokens, from rounding hits to blocks
        self._prompts_owed = 0.0  # tokens that counters told of and no prompt had yet

    def use(self, settings: EngineSettings) -> None:
        self._settings = settings

    def take(self, sample: EngineSample) -> list[Event]:
        before = self.last
        if before is not None and sample.time_seconds < before.time_seconds + SHORTEST_SECONDS:
            return []
        self.last = sample
        events: list[Event] = []
        anew = before is not None and restarted(before, sample)
        if anew:
            assert before is not None
            events += self.lost(before.time_seconds)
            self.recent.clear()
        elif before is not None and (row := _counted(before, sample)) is not None:
            self.counted.append(row)
        self.recent.append(sample)
        while self.recent[0].time_seconds < sample.time_seconds - LENGTHS_FROM_SECONDS and len(self.recent) > 2:
            self.recent.popleft()
        level = _inside(sample)
        ended = finished_requests(sample)
        if level is None or ended is None:
            return events
        rng = np.random.default_rng(zlib.crc32(f"{sample.pod}/{sample.engine}/{sample.time_seconds}".encode()))
        if before is None:
            # What is in the engine at first came before: all of it now, so that the mirror has as much to do.
            return events + list(self._arrive(round(level), sample.time_seconds, sample.time_seconds, sample, rng))
        was = _inside(before)
        ended_before = 0.0 if anew else finished_requests(before)
        if was is None or ended_before is None:
            return events
        came = level + ended - (0.0 if anew else was + ended_before) - self._surplus
        self._surplus = max(0.0, -came)
        self._learn_hits(None if anew else before, sample)
        start, stop = before.time_seconds, sample.time_seconds
        events += self._arrive(max(0, round(came)), start, stop, sample, rng)
        events += self._end(round(ended - ended_before), start, None if anew else before, sample, rng)
        return events

    def save(self) -> dict[str, Any]:
        return {
            "recent": [sample.model_dump(mode="json") for sample in self.recent],
            "counted": [row.tolist() for row in self.counted],
            "inside": self._inside,
            "numbers": [self._surplus, self._hit_ratio, self._hits_owed, self._prompts_owed],
        }

    @classmethod
    def restored(cls, pool: str, settings: EngineSettings, saved: Mapping[str, Any]) -> _Engine:
        engine = cls(pool, settings)
        engine.recent.extend(map(EngineSample.model_validate, saved["recent"]))
        engine.counted.extend(map(np.array, saved["counted"]))
        engine.last = engine.recent[-1]
        engine._inside = [(arrival, id, hits) for arrival, id, hits in saved["inside"]]
        engine._surplus, engine._hit_ratio, engine._hits_owed, engine._prompts_owed = saved["numbers"]
        return engine

    @property
    def newest_seconds(self) -> float:
        """Of its last sample."""
        return -math.inf if self.last is None else self.last.time_seconds

    def lost(self, time_seconds: float) -> list[Event]:
        """The process ended, and what was in it with it."""
        lost = [
            RequestFinished(id=id, time_seconds=time_seconds, pool=self._pool, output_tokens=0, finish_reason="abort")
            for _, id, _ in self._inside
        ]
        self._inside.clear()
        return list(lost)

    def _learn_hits(self, before: EngineSample | None, sample: EngineSample) -> None:
        queries, hits = (
            _rise(None if before is None else getattr(before, name), getattr(sample, name))
            for name in ("prefix_cache_queries_tokens", "prefix_cache_hits_tokens")
        )
        if queries > 0.0:
            self._hit_ratio = min(1.0, hits / queries)

    def _arrive(
        self, count: int, start: float, stop: float, sample: EngineSample, rng: np.random.Generator
    ) -> Iterable[Event]:
        times = np.sort(rng.uniform(start, stop, count))
        for number, (time, prompt) in enumerate(zip(times.tolist(), self._prompts(count, rng), strict=True)):
            id = f"{sample.pod}/{sample.engine}@{sample.time_seconds:.3f}#{number}"
            blocks = self._shared_blocks(prompt)
            insort(self._inside, (time, id, blocks * self._settings.block_size))
            text = zlib.crc32(f"{sample.namespace}/{sample.pod}/{sample.engine}".encode()) << 32
            yield RequestSeen(
                id=id,
                time_seconds=time,
                pool=self._pool,
                model=sample.model,
                prompt_tokens=prompt,
                block_hashes=tuple(range(text, text + blocks)),
                block_tokens=self._settings.block_size if blocks else None,
                pod=sample.pod or None,
            )

    def _prompts(self, count: int, rng: np.random.Generator) -> list[int]:
        """Lengths as they were lately: distributed like those of requests that ended, with the mean of those begun."""
        first, last = self.recent[0], self.recent[-1]
        lengths = risen(first.request_prompt_tokens, last.request_prompt_tokens) or last.request_prompt_tokens
        begun = risen(first.ttft_seconds, last.ttft_seconds)
        tokens = _rise(first.prompt_tokens, last.prompt_tokens)
        mean = tokens / begun.count if begun is not None and begun.count and tokens else None
        if lengths is None or not lengths.sum:
            lengths = Histogram(sum=mean or 1.0, count=1.0)
        longest = self._settings.max_model_len - 2
        drawn = rng.permutation(quantiles(lengths, (np.arange(count) + rng.uniform(0.0, 1.0, count)) / max(count, 1)))
        expected = mean if mean is not None else lengths.sum / lengths.count
        typical = float(quantiles(lengths, (np.arange(256) + 0.5) / 256).mean())
        late = self._prompts_owed / (expected * max(count, _FEW_PROMPTS))
        scale = expected / typical * min(max(1.0 + late, 0.5), 2.0)
        found = [int(min(max(1, round(length * scale)), longest)) for length in drawn.tolist()]
        if len(self.recent) > 1 and last.prompt_tokens is not None:
            self._prompts_owed += _rise(self.recent[-2].prompt_tokens, last.prompt_tokens) - sum(found)
        return found

    def _shared_blocks(self, prompt_tokens: int) -> int:
        """How many blocks a prompt has from the cache, so that all together have the engine's share."""
        wanted = self._hit_ratio * prompt_tokens + self._hits_owed
        size = self._settings.block_size
        blocks = min(max(0, round(wanted / size)), (prompt_tokens - 1) // size)
        self._hits_owed = max(-4.0 * size, min(wanted - blocks * size, 4.0 * size))
        return blocks

    def _end(
        self, count: int, start: float, before: EngineSample | None, sample: EngineSample, rng: np.random.Generator
    ) -> Iterable[Event]:
        """Ends in this interval, of those that came first. Durations are dealt out so that they end within it; the
        longest answers took longest.
        """
        stop, count = sample.time_seconds, min(count, len(self._inside))
        outputs = _drawn("request_generation_tokens", count, before, sample)
        e2e = _drawn("e2e_seconds", count, before, sample)
        ttft = _drawn("ttft_seconds", count, before, sample)
        queue = _drawn("queue_seconds", count, before, sample)
        turn = rng.permutation(count).tolist()
        ending, self._inside = self._inside[:count], self._inside[count:]
        old = bisect_left(ending, (start,))
        ranks, durations = list(range(count)), [0.0] * count if e2e is None else e2e.tolist()
        # Those from before the interval need long durations, the latest ones short ones: they choose first.
        for arrival, id, hits in [*ending[:old], *reversed(ending[old:])]:
            if arrival < start:
                least = min(bisect_left(durations, start - arrival), len(durations) - 1)
                place = int(rng.integers(least, len(durations)))
            else:
                place = int(rng.integers(0, max(1, bisect_right(durations, stop - arrival))))
            rank, end = ranks.pop(place), arrival + durations.pop(place)
            yield RequestFinished(
                id=id,
                time_seconds=end if max(start, arrival) < end <= stop else 0.5 * (max(start, arrival) + stop),
                pool=self._pool,
                output_tokens=max(1, round(_at(outputs, rank) or 1.0)),
                e2e_seconds=_at(e2e, rank),
                ttft_seconds=_at(ttft, turn[rank]),
                queue_seconds=_at(queue, turn[rank]),
                cached_tokens=hits,
            )


def risen(before: Histogram | None, after: Histogram | None) -> Histogram | None:
    """What a histogram of one process observed in between; None where nothing or unknown."""
    if after is None or before is None or after.count <= before.count:
        return None
    buckets = {limit: max(0.0, count - before.buckets.get(limit, 0.0)) for limit, count in after.buckets.items()}
    return Histogram(buckets=buckets, sum=max(0.0, after.sum - before.sum), count=after.count - before.count)


def quantiles(histogram: Histogram, shares: Floats) -> Floats:
    """The values below which these shares (0..1) of the observations lie: straight lines within buckets."""
    limits = sorted(histogram.buckets)
    if not limits:
        return np.full(shares.size, histogram.sum / histogram.count)
    below = [0.0, *(histogram.buckets[limit] for limit in limits), histogram.count]
    values = [0.0, *limits, limits[-1] * _TAIL_FACTOR]
    return np.interp(shares * histogram.count, np.maximum.accumulate(below), values)


def _drawn(name: str, count: int, before: EngineSample | None, sample: EngineSample) -> Floats | None:
    """So many values as the named histogram tells of, rising and with its mean."""
    after: Histogram | None = getattr(sample, name)
    seen = after if before is None else risen(getattr(before, name), after)
    if seen is None or count == 0 or not seen.count:
        return None
    values = quantiles(seen, (np.arange(count) + 0.5) / count)
    return values * (seen.sum / seen.count / max(float(values.mean()), 1e-12))


def _counted(before: EngineSample, after: EngineSample) -> Floats | None:
    """An entry of `Counted`, context as a share of the cache; None where something needed is not told."""
    steps, latency = (
        risen(getattr(before, name), getattr(after, name)) for name in ("step_tokens", "inter_token_latency_seconds")
    )
    usage = (before.kv_cache_usage_ratio, after.kv_cache_usage_ratio)
    computed = _computed(before, after)
    if steps is None or latency is None or usage[0] is None or usage[1] is None or computed is None:
        return None
    context = 0.5 * (usage[0] + usage[1])
    return np.array([steps.count, computed, latency.count, context, latency.sum])


def _computed(before: EngineSample, after: EngineSample) -> float | None:
    """Prompt tokens that the engine computed; by the hit ratio where it does not tell, as older versions do not."""
    told = [sample.prompt_tokens_by_source.get("local_compute") for sample in (before, after)]
    if None not in told:
        return _rise(told[0], told[1])
    if before.prompt_tokens is None or after.prefix_cache_queries_tokens is None:
        return None
    queries = _rise(before.prefix_cache_queries_tokens, after.prefix_cache_queries_tokens)
    hits = _rise(before.prefix_cache_hits_tokens, after.prefix_cache_hits_tokens)
    hits += _rise(before.external_prefix_cache_hits_tokens, after.external_prefix_cache_hits_tokens)
    return _rise(before.prompt_tokens, after.prompt_tokens) * (max(0.0, 1.0 - hits / queries) if queries else 1.0)


def _inside(sample: EngineSample) -> float | None:
    running, waiting = sample.requests_running, sample.requests_waiting
    return None if running is None or waiting is None else running + waiting


def _rise(before: float | None, after: float | None) -> float:
    """Of a counter; from zero where it was not there before, 0 where it is not there."""
    return 0.0 if after is None else max(0.0, after - (before or 0.0))


def _at(values: Floats | None, place: int) -> float | None:
    return None if values is None else float(values[place])
