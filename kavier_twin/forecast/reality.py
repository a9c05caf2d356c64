"""What really happened, as the KPIs that a forecast foresees.

Requests are taken in as the stream tells them; `measure` gives the KPIs of a stretch of time by the definitions of
`forecast.measure`, as far as requests tell them: a latency counts where its interval ended, and what is still under
way at the end counts with its age where that raises the quantile.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.forecast.measure import quantile_with_ages
from kavier_twin.forecast.slo import Metric

Floats = npt.NDArray[np.float64]

ENDED_REMEMBERED: Final = 20_000  # identities: a restart repeats the records since the last checkpoint
_FIRST_ROWS: Final = 1024


class Ended(NamedTuple):
    """A request that ended. Times in seconds of event time; NaN where the stream does not tell."""

    arrival: float
    scheduled: float
    first_token: float
    finish: float
    prompt_tokens: float
    output_tokens: float
    cached_tokens: float


class Reality:
    """The requests of one pool over the last while. Memory is bounded by `forget`."""

    def __init__(self) -> None:
        self.since_seconds = math.inf  # it knows every request that arrived from here on
        self._rows = np.zeros((_FIRST_ROWS, len(Ended._fields)))
        self._count = 0
        self._live: dict[str, tuple[float, int]] = {}  # identity -> arrival, prompt tokens
        self._ended: dict[str, None] = {}  # identities, oldest first

    @property
    def requests(self) -> int:
        """Ended requests that are remembered."""
        return self._count

    @property
    def live(self) -> dict[str, tuple[float, int]]:
        """Requests that have not ended: identity -> arrival and prompt tokens."""
        return dict(self._live)

    def arrive(self, identity: str, arrival_seconds: float, prompt_tokens: int) -> None:
        """A request was seen."""
        self.since_seconds = min(self.since_seconds, arrival_seconds)
        if identity not in self._ended:
            self._live[identity] = arrival_seconds, prompt_tokens

    def end(
        self,
        identity: str,
        finish_seconds: float,
        output_tokens: int,
        *,
        ttft_seconds: float | None = None,
        e2e_seconds: float | None = None,
        queue_seconds: float | None = None,
        cached_tokens: int | None = None,
    ) -> Ended | None:
        """A request ended; None for one that was never seen, or has ended before."""
        found = self._live.pop(identity, None)
        if found is None:
            return None
        arrival, prompt = found
        ended = Ended(
            arrival,
            math.nan if queue_seconds is None else arrival + queue_seconds,
            math.nan if ttft_seconds is None else arrival + ttft_seconds,
            finish_seconds if e2e_seconds is None else arrival + e2e_seconds,
            prompt,
            output_tokens,
            math.nan if cached_tokens is None else cached_tokens,
        )
        self.restore(identity, ended)
        return ended

    def restore(self, identity: str, ended: Ended) -> None:
        """A request that ended, as it was remembered."""
        self._ended[identity] = None
        if len(self._ended) > ENDED_REMEMBERED:
            del self._ended[next(iter(self._ended))]
        if self._count == self._rows.shape[0]:
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[self._count] = ended
        self._count += 1
        self.since_seconds = min(self.since_seconds, ended.arrival)

    def forget(self, before_seconds: float) -> None:
        """Drop what ended before, and what arrived before and never ended."""
        rows = self._rows[: self._count]
        kept = rows[rows[:, 3] >= before_seconds]
        if kept.shape[0] < self._count:
            self._rows = np.concatenate([kept, np.zeros((max(_FIRST_ROWS, kept.shape[0] // 4), rows.shape[1]))])
            self._count = kept.shape[0]
            self.since_seconds = max(self.since_seconds, before_seconds)
        for identity in [name for name, (arrival, _) in self._live.items() if arrival < before_seconds]:
            del self._live[identity]

    def complete(self, until_seconds: float) -> bool:
        """Whether every request that arrived until then has ended: nothing about it can change any more."""
        return all(arrival > until_seconds for arrival, _ in self._live.values())

    def measure(self, start_seconds: float, stop_seconds: float) -> dict[Metric, float]:
        """KPIs of (start, stop]; NaN where nothing was observed. Where nothing tells a KPI at all, it is left out.

        Requests under way at the end of which neither first token nor end is known count in e2e only, by their age.
        """
        rows = self._rows[: self._count]
        rows = rows[(rows[:, 0] <= stop_seconds) & (rows[:, 3] > start_seconds)]
        arrival, scheduled, first, finish, prompt, output, cached = rows.T
        live = np.array([time for time, _ in self._live.values() if time <= stop_seconds])
        seconds = max(stop_seconds - start_seconds, 1e-12)

        def until(event: Floats, also_live: Floats) -> tuple[Floats, Floats]:
            told = np.isfinite(event)
            came = told & (event > start_seconds) & (event <= stop_seconds)
            ages = stop_seconds - np.concatenate([arrival[told & (event > stop_seconds)], also_live])
            return (event - arrival)[came], ages

        none = np.zeros(0)
        ttft, e2e = until(first, none), until(finish, live)
        found: dict[Metric, float] = {
            "ttft_p50_seconds": quantile_with_ages(*ttft, 0.50),
            "ttft_p99_seconds": quantile_with_ages(*ttft, 0.99),
            "e2e_p95_seconds": quantile_with_ages(*e2e, 0.95),
            "output_tokens_per_second": float(
                (output * _share(first, finish, start_seconds, stop_seconds)).sum() / seconds
            ),
            "requests_per_second": float(((finish > start_seconds) & (finish <= stop_seconds)).sum()) / seconds,
        }
        told = np.isfinite(cached)
        if told.any():
            began = np.where(np.isfinite(scheduled), scheduled, first)
            inside = told & (began > start_seconds) & (began <= stop_seconds)
            asked = float(prompt[inside].sum())
            found["prefix_cache_hit_ratio"] = float(cached[inside].sum()) / asked if asked else math.nan
        if np.isfinite(scheduled).any():
            found["queue_p95_seconds"] = quantile_with_ages(*until(scheduled, none), 0.95)
            found["waiting_mean"] = _overlap(arrival, scheduled, start_seconds, stop_seconds) / seconds
            found["running_mean"] = _overlap(scheduled, finish, start_seconds, stop_seconds) / seconds
        return found


def _share(begin: Floats, end: Floats, start: float, stop: float) -> Floats:
    """How much of each interval lies in (start, stop]; one without length lies where it ends."""
    begin = np.where(np.isfinite(begin), begin, end)
    length = end - begin
    inside = np.minimum(end, stop) - np.maximum(begin, start)
    point = ((end > start) & (end <= stop)).astype(np.float64)
    return np.where(length > 0.0, np.clip(inside / np.where(length > 0.0, length, 1.0), 0.0, 1.0), point)


def _overlap(begin: Floats, end: Floats, start: float, stop: float) -> float:
    """Seconds of all intervals in (start, stop] together."""
    told = np.isfinite(begin) & np.isfinite(end)
    return float(np.maximum(np.minimum(end[told], stop) - np.maximum(begin[told], start), 0.0).sum())
