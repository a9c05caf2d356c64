"""The workload behind an engine's counters: how many requests came, how long they were, how much the cache gave them.

vLLM counts no arrivals. Requests are conserved, though: those that came are those that have left and those still in
the engine, so arrivals = change of (finished + running + waiting). Lengths follow from tokens and requests counted at
the same moment: a prompt's tokens are counted with its first token, as is the TTFT histogram's observation; an
output's length with the request's end. Prefix-cache counters count tokens, at admission (vLLM's v1/metrics/stats.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kavier_twin.telemetry import EngineSample, Histogram

Curve = npt.NDArray[np.float64]
Counts = Mapping[tuple[float, float], float]
"""Requests by length in tokens: above the first limit, up to and with the second."""

_START_TOLERANCE_SECONDS = 1.0  # of two ways to tell when the same process began


@dataclass(frozen=True)
class WorkloadWindow:
    """The workload of all engines between two moments. Means and ratios are NaN where nothing was counted.

    Counts are fractions of requests where a window ends between two samples: counters are read as if they moved
    evenly from sample to sample.
    """

    start_seconds: float
    end_seconds: float
    arrivals: float  # requests that came and were let in
    rejected: float  # requests that a full queue turned away
    first_tokens: float  # requests that got their first token
    finished: float
    prompt_tokens_mean: float
    output_tokens_mean: float
    hit_ratio: float  # tokens found in the prefix cache per prompt token, at admission
    prompt_tokens: Counts = field(default_factory=dict)  # of requests that finished
    output_tokens: Counts = field(default_factory=dict)

    @property
    def rate_per_second(self) -> float:
        """Requests let in per second."""
        return self.arrivals / (self.end_seconds - self.start_seconds)


def reconstruct(samples: Iterable[EngineSample], edges_seconds: Sequence[float]) -> list[WorkloadWindow]:
    """The workload in each window between neighbouring edges, which must rise.

    Samples may come from several engines and in any order. An engine counts from its first sample on: what its
    counters held then happened before. After a restart they begin at zero, and what an engine counted between its
    last sample and its end is lost. Between samples far apart, as after an outage of the telemetry, all that happened
    is spread evenly.
    """
    engines: dict[tuple[str, str, str], dict[float, EngineSample]] = defaultdict(dict)
    for sample in samples:
        engines[sample.namespace, sample.pod, sample.engine][sample.time_seconds] = sample
    edges = np.asarray(edges_seconds, np.float64)
    if len(edges) < 2 or not (np.diff(edges) > 0.0).all():
        raise ValueError("expected two edges or more, each later than the one before")
    totals: dict[str, Curve] = defaultdict(lambda: np.zeros(len(edges) - 1))
    lengths: dict[str, dict[tuple[float, float], Curve]] = {"prompt": {}, "output": {}}
    for by_time in engines.values():
        engine = _Engine([by_time[time] for time in sorted(by_time)])
        for name, curve in engine.curves().items():
            totals[name] = totals[name] + engine.between(edges, curve)
        for name, histograms in (("prompt", engine.prompts()), ("output", engine.outputs())):
            for interval, curve in engine.lengths(histograms).items():
                known = lengths[name].get(interval, np.zeros(len(edges) - 1))
                lengths[name][interval] = known + np.maximum(engine.between(edges, curve), 0.0)
    return [
        WorkloadWindow(
            start_seconds=float(start),
            end_seconds=float(end),
            arrivals=float(totals["arrivals"][k]),
            rejected=float(totals["rejected"][k]),
            first_tokens=float(totals["first_tokens"][k]),
            finished=float(totals["finished"][k]),
            prompt_tokens_mean=_ratio(totals["prompt_tokens"][k], totals["prompts"][k]),
            output_tokens_mean=_ratio(totals["output_tokens"][k], totals["outputs"][k]),
            hit_ratio=_ratio(totals["hits"][k], totals["queries"][k]),
            prompt_tokens={interval: float(curve[k]) for interval, curve in lengths["prompt"].items()},
            output_tokens={interval: float(curve[k]) for interval, curve in lengths["output"].items()},
        )
        for k, (start, end) in enumerate(pairwise(edges))
    ]


class _Engine:
    """One engine's samples in order of time, and its counters as curves that never fall."""

    def __init__(self, samples: list[EngineSample]) -> None:
        self._samples = samples
        self._times = np.array([sample.time_seconds for sample in samples])
        self._restarted = [False, *(restarted(a, b) for a, b in pairwise(samples))]

    def between(self, edges: Curve, curve: Curve) -> Curve:
        """By how much a curve rises from edge to edge."""
        return np.diff(np.interp(edges, self._times, curve))

    def curves(self) -> dict[str, Curve]:
        first_tokens = [_count(sample.ttft_seconds) for sample in self._samples]
        finished = [finished_requests(sample) for sample in self._samples]
        found = {
            "first_tokens": self._counter(first_tokens),
            "finished": self._counter(finished),
            "rejected": self._counter([_sum(sample.requests_rejected_by_reason) for sample in self._samples]),
            "arrivals": self._arrivals(finished),
            "hits": self._counter([sample.prefix_cache_hits_tokens for sample in self._samples]),
            "queries": self._counter([sample.prefix_cache_queries_tokens for sample in self._samples]),
        }
        prompts, outputs = self.prompts(), self.outputs()
        prompt_tokens = [sample.prompt_tokens for sample in self._samples]
        if _unknown(prompt_tokens) or _unknown(first_tokens):
            prompt_tokens, first_tokens = [_total(h) for h in prompts], [_count(h) for h in prompts]
        output_tokens, ended = [_total(h) for h in outputs], [_count(h) for h in outputs]
        if _unknown(output_tokens):
            # Right in the long run: tokens are counted as they come, requests at their end.
            output_tokens, ended = [sample.generation_tokens for sample in self._samples], finished
        found |= {"prompt_tokens": self._counter(prompt_tokens), "prompts": self._counter(first_tokens)}
        return found | {"output_tokens": self._counter(output_tokens), "outputs": self._counter(ended)}

    def prompts(self) -> list[Histogram | None]:
        return [sample.request_prompt_tokens for sample in self._samples]

    def outputs(self) -> list[Histogram | None]:
        return [sample.request_generation_tokens for sample in self._samples]

    def lengths(self, histograms: list[Histogram | None]) -> dict[tuple[float, float], Curve]:
        """By interval of lengths, the requests that ended with such a length."""
        limits = sorted({limit for histogram in histograms if histogram for limit in histogram.buckets})
        below = [
            self._counter([histogram.buckets.get(limit) if histogram else None for histogram in histograms])
            for limit in limits
        ]
        if not limits:
            return {}
        below.append(self._counter([_count(histogram) for histogram in histograms]))
        intervals = pairwise([0.0, *limits, math.inf])
        return dict(zip(intervals, np.diff(below, axis=0, prepend=0.0), strict=True))

    def _counter(self, values: list[float | None]) -> Curve:
        """What a counter has counted since the first sample that has it, across restarts."""
        total, last, curve = 0.0, None, []
        for value, restarted in zip(values, self._restarted, strict=True):
            if restarted and last is not None:
                last = 0.0
            if value is not None:
                if last is not None:
                    total += value - last if value >= last else value
                last = value
            curve.append(total)
        return np.array(curve)

    def _arrivals(self, finished: list[float | None]) -> Curve:
        """Requests that came. Gauges and counters are not read at quite the same moment, so that their sum may fall
        by a few for a while: that is made up for by the arrivals that follow and not counted twice.
        """
        total, last, curve = 0.0, None, []
        for sample, ended, restarted in zip(self._samples, finished, self._restarted, strict=True):
            inside = (sample.requests_running, sample.requests_waiting)
            if restarted and last is not None:
                last = 0.0  # what was in the engine is gone, and was counted when it came
            if ended is not None and inside[0] is not None and inside[1] is not None:
                level = ended + inside[0] + inside[1]
                total += 0.0 if last is None else level - last
                last = level
            curve.append(total)
        return np.maximum.accumulate(np.array(curve))


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
    counted = _sum(sample.requests_finished_by_reason)
    return counted if counted is not None else _count(sample.e2e_seconds)


def _sum(entries: Mapping[str, float]) -> float | None:
    return sum(entries.values()) if entries else None


def _count(histogram: Histogram | None) -> float | None:
    return histogram.count if histogram else None


def _total(histogram: Histogram | None) -> float | None:
    return histogram.sum if histogram else None


def _unknown(values: Iterable[float | None]) -> bool:
    return all(value is None for value in values)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b > 0.0 else math.nan
