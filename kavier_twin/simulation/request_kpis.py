"""KPIs of requests over a stretch of time: one definition for simulated and for observed requests.

A latency counts where it ends within the stretch, as in vLLM's histograms. A request whose latency has not ended by
then counts with its age, which the latency will exceed. Under overload these are the requests that wait longest. Ages
may only raise a quantile: where load is steady, requests that ended are a fair sample, and young ones would lower it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.kpi_table import KPIS, METRICS, Kpi, Metric, share
from kavier_twin.simulation.state import Records

Floats = npt.NDArray[np.float64]

_LATENCIES: Final = [(kpi, kpi.metrics) for kpi in KPIS.values() if kpi.interval is not None]


class Requests(NamedTuple):
    """Requests as columns, each [requests]. Times in seconds on one clock; NaN: unknown, infinity: not yet."""

    arrival: Floats
    queued: Floats  # it reached the engine
    scheduled: Floats
    first_token: Floats
    finish: Floats
    output_tokens: Floats

    @staticmethod
    def simulated(done: Records, live: Records | None = None, frontend_seconds: float = 0.0) -> Requests:
        """Finished requests, and live ones. `frontend_seconds` pass between arrival and engine."""
        both = [done] if live is None else [done, live]

        def column(name: str) -> Floats:
            values = np.concatenate([requests[name] for requests in both])
            values[done.size :][np.isnan(values[done.size :])] = np.inf
            return values

        arrival = column("arrival")
        alive = arrival.size - done.size
        return Requests(
            arrival,
            arrival + frontend_seconds,
            column("scheduled"),
            column("first_token"),
            np.concatenate([done["finish"], np.full(alive, np.inf)]),
            np.concatenate([done["output"], np.full(alive, np.nan)]),
        )


def durations(kpi: Kpi, requests: Requests) -> Floats:
    """This latency of each request, seconds. Not finite where it is unknown or has not ended, and NaN where a request
    has none: one of a single token has no time per output token."""
    assert kpi.interval is not None
    begin, end = (getattr(requests, moment) for moment in kpi.interval)
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds: Floats = np.maximum(end - begin, 0.0)
        if kpi.per_token:
            steps = requests.output_tokens - 1.0
            seconds = np.where(steps > 0.0, seconds / steps, np.nan)
    return seconds


def latency_kpis(
    requests: Requests, start_seconds: float, stop_seconds: float, metrics: Collection[Metric] = METRICS
) -> dict[Metric, float]:
    """Quantiles of latencies over (start, stop], those of `metrics` only; NaN where nothing happened.

    A latency that is unknown for every finished request is left out.
    """
    found: dict[Metric, float] = {}
    finished = np.isfinite(requests.finish)
    for kpi, statistics in _LATENCIES:
        asked = [metric for metric in statistics if metric in metrics]
        if not asked or _unknown(kpi, requests, finished):
            continue
        complete, ages = _latency(kpi, requests, start_seconds, stop_seconds)
        for metric in asked:
            found[metric] = quantile_with_ages(complete, ages, share(statistics[metric]))
    return found


def load_kpis(requests: Requests, start_seconds: float, stop_seconds: float) -> dict[Metric, float]:
    """Means over (start, stop] of what engines count and report, estimated from requests.

    Output tokens are spread evenly between the first and the last. A preempted request counts as running. Requests
    running and waiting are left out unless every finished request has a scheduling time.
    """
    _, queued, scheduled, first, finish, output = requests
    seconds = max(stop_seconds - start_seconds, 1e-12)
    ended = np.isfinite(finish)
    found: dict[Metric, float] = {}
    found["requests_per_second"] = float(((finish > start_seconds) & (finish <= stop_seconds)).sum()) / seconds
    tokens = output[ended] * _part(first[ended], finish[ended], start_seconds, stop_seconds)
    found["output_tokens_per_second"] = float(tokens.sum()) / seconds
    if ended.any() and np.isfinite(scheduled[ended]).all():
        found["requests_running"] = _overlap(scheduled, finish, start_seconds, stop_seconds) / seconds
        found["requests_waiting"] = _overlap(queued, scheduled, start_seconds, stop_seconds) / seconds
    return found


def quantile_with_ages(complete: Floats, ages: Floats, quantile: float) -> float:
    """The larger of the quantile of complete intervals and that with the ages of those under way; NaN without any."""
    samples = (complete, np.concatenate([complete, ages])) if ages.size else (complete,)
    return float(max((np.quantile(sample, quantile) for sample in samples if sample.size), default=np.nan))


def _unknown(kpi: Kpi, requests: Requests, finished: npt.NDArray[np.bool_]) -> bool:
    """Whether no finished request has this latency, though there are some."""
    assert kpi.interval is not None
    return bool(finished.any()) and any(np.isnan(getattr(requests, moment)[finished]).all() for moment in kpi.interval)


def _latency(kpi: Kpi, requests: Requests, start: float, stop: float) -> tuple[Floats, Floats]:
    """Seconds of the latencies that ended in (start, stop], and the ages of those that had not ended by then."""
    assert kpi.interval is not None
    begin, end = (getattr(requests, moment) for moment in kpi.interval)
    seconds = durations(kpi, requests)
    complete = seconds[(end > start) & (end <= stop) & np.isfinite(seconds)]
    if kpi.per_token:  # a mean over tokens has no age
        return complete, np.zeros(0)
    under_way = (end > stop) & (requests.arrival <= stop)
    return complete, np.maximum(stop - begin[under_way], 0.0)


def _part(begin: Floats, end: Floats, start: float, stop: float) -> Floats:
    """How much of each interval lies in (start, stop], 0 to 1; one without length, or begin, lies where it ends."""
    begin = np.where(np.isfinite(begin), begin, end)
    length = end - begin
    inside = np.minimum(end, stop) - np.maximum(begin, start)
    point = ((end > start) & (end <= stop)).astype(np.float64)
    return np.where(length > 0.0, np.clip(inside / np.where(length > 0.0, length, 1.0), 0.0, 1.0), point)


def _overlap(begin: Floats, end: Floats, start: float, stop: float) -> float:
    """Seconds of all intervals in (start, stop] together, without those of which an end is unknown."""
    inside = np.minimum(end, stop) - np.maximum(begin, start)
    return float(np.maximum(inside[~np.isnan(inside)], 0.0).sum())
