"""What really happened, as the KPIs that a forecast foresees.

Requests are taken in as the stream tells them; `measure` gives the KPIs of a stretch of time by the definitions that
forecasts follow (`simulation.request_kpis`). What requests do not tell comes from `readings` of engines and GPUs.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.forecast.rows import Rows
from kavier_twin.scores.readings import Observed, Readings
from kavier_twin.simulation.footprint import Footprint
from kavier_twin.simulation.kpi_table import Metric
from kavier_twin.simulation.power import JOULES_PER_KWH
from kavier_twin.simulation.request_kpis import Requests, latency_kpis, load_kpis

Floats = npt.NDArray[np.float64]

ENDED_REMEMBERED: Final = 20_000  # identities: a restart repeats the records since the last checkpoint
_MILLION: Final = 1e6


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
        self.readings = Readings()
        self._rows = Rows(len(Ended._fields))
        self._live: dict[str, tuple[float, int]] = {}  # identity -> arrival, prompt tokens
        self._ended: dict[str, None] = {}  # identities, oldest first

    @property
    def requests(self) -> int:
        """Ended requests that are remembered."""
        return len(self._rows)

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
        self._rows.append(ended)
        self.since_seconds = min(self.since_seconds, ended.arrival)

    def forget(self, before_seconds: float) -> None:
        """Drop what ended before, and what arrived before and never ended."""
        self.readings.forget(before_seconds)
        kept = self._rows.values[:, 3] >= before_seconds
        if not kept.all():
            self._rows.keep(kept)
            self.since_seconds = max(self.since_seconds, before_seconds)
        for identity in [name for name, (arrival, _) in self._live.items() if arrival < before_seconds]:
            del self._live[identity]

    def complete(self, until_seconds: float) -> bool:
        """Whether every request that arrived until then has ended, and engines were read since: nothing changes."""
        ended = all(arrival > until_seconds for arrival, _ in self._live.values())
        return ended and self.readings.complete(until_seconds)

    def measure(
        self, start_seconds: float, stop_seconds: float, footprint: Footprint | None = None
    ) -> dict[Metric, float]:
        """KPIs of (start, stop]; NaN where nothing happened. Where nothing tells a KPI, it is left out.

        Requests under way at the end of which neither first token nor end is known count in e2e only, by their age.
        `footprint` turns watts and replicas observed into the site's watts, energy, carbon and cost.
        """
        rows = self._rows.values
        rows = rows[(rows[:, 0] <= stop_seconds) & (rows[:, 3] > start_seconds)]
        _, scheduled, first, finish, prompt, _, cached = rows.T
        live = np.array([time for time, _ in self._live.values() if time <= stop_seconds])
        requests = _requests(rows, live)
        seconds = max(stop_seconds - start_seconds, 1e-12)
        found = latency_kpis(requests, start_seconds, stop_seconds) | load_kpis(requests, start_seconds, stop_seconds)
        told = np.isfinite(cached)
        if told.any():
            began = np.where(np.isfinite(scheduled), scheduled, first)
            inside = told & (began > start_seconds) & (began <= stop_seconds)
            asked = float(prompt[inside].sum())
            found["prefix_cache_hit_ratio"] = float(cached[inside].sum()) / asked if asked else math.nan
        read = self.readings.measure(start_seconds, stop_seconds)
        found = {**read.kpis, **found}
        if footprint is not None:
            began = np.where(np.isfinite(first), first, finish)
            prompts = float(prompt[(began > start_seconds) & (began <= stop_seconds)].sum())
            tokens = prompts + seconds * found["output_tokens_per_second"]
            found |= _impact(footprint, read, start_seconds, stop_seconds, tokens)
        return found


def _requests(rows: Floats, live: Floats) -> Requests:
    """Ended requests, and the arrivals of those of which nothing else is known."""
    unknown, never = np.full(live.size, np.nan), np.full(live.size, np.inf)
    arrival, scheduled, first_token, finish, _, output, _ = rows.T
    arrival = np.concatenate([arrival, live])
    return Requests(
        arrival,
        arrival,
        np.concatenate([scheduled, unknown]),
        np.concatenate([first_token, unknown]),
        np.concatenate([finish, never]),
        np.concatenate([output, unknown]),
    )


def _impact(footprint: Footprint, read: Observed, start: float, stop: float, tokens: float) -> dict[Metric, float]:
    """As `simulation.impact` has them: at the site's meter, per million tokens of prompts and outputs."""
    found: dict[Metric, float] = {}
    millions = tokens / _MILLION if tokens > 0.0 else math.nan
    if not math.isnan(read.watts):
        zero = footprint.time_zero.timestamp()
        joules = footprint.pue * read.watts * (stop - start)
        grams = footprint.carbon.mean_gco2_per_kwh(zero + start, zero + stop) * joules / JOULES_PER_KWH
        found["power_watts"] = footprint.pue * read.watts
        found["energy_joules_per_million_tokens"] = joules / millions
        found["carbon_grams_per_million_tokens"] = grams / millions
    if footprint.price_per_gpu_hour is not None and not math.isnan(read.replicas):
        gpu_hours = footprint.gpus_per_replica * read.replicas * (stop - start) / 3600.0
        found["cost_per_million_tokens"] = footprint.price_per_gpu_hour * gpu_hours / millions
    return found
