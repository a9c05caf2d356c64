"""What really happened, as the KPIs that a forecast foresees.

Requests come from what the mirror applied, in event order; which of them are live is the mirror's to say. `measure`
gives the KPIs of a stretch of time by the definitions of `simulation.request_kpis`, which forecasts follow too. A
request that the mirror gave up, as its end record never came, counts in rates and means of load with the mirror's
figures, and in no latency: nobody observed one. What requests do not tell comes from `readings` of engines and GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.scores.readings import Observed, Readings, Rows
from kavier_twin.simulation.footprint import Footprint
from kavier_twin.simulation.kpi_table import Metric
from kavier_twin.simulation.power import JOULES_PER_KWH
from kavier_twin.simulation.request_kpis import Requests, latency_kpis, load_kpis

Floats = npt.NDArray[np.float64]

_MILLION: Final = 1e6


class Outcome(NamedTuple):
    """A request that is over. Times in seconds of event time; NaN: unknown."""

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
        self.until_seconds = -math.inf  # and everything that happened up to here
        self.readings = Readings()
        self._rows = Rows(len(Outcome._fields))
        self._live: dict[str, float] = {}  # identity -> arrival
        self._given_up: dict[str, Outcome] = {}  # as assumed, until an end record comes after all

    @property
    def requests(self) -> int:
        """Ended requests that are remembered."""
        return len(self._rows)

    @property
    def live(self) -> Mapping[str, float]:
        """Arrivals of the requests under way, by identity."""
        return self._live

    def arrive(self, identity: str, arrival_seconds: float) -> None:
        """A request is under way."""
        self.since_seconds = min(self.since_seconds, arrival_seconds)
        self._live[identity] = arrival_seconds

    def end(self, identity: str, outcome: Outcome) -> None:
        """A request ended so. What was assumed of it does not hold any more."""
        self._live.pop(identity, None)
        self._given_up.pop(identity, None)
        self._rows.append(outcome)

    def give_up(self, identity: str, assumed: Outcome) -> None:
        """A request is taken to have ended so, without a record."""
        self._live.pop(identity, None)
        self._given_up[identity] = assumed

    def drop(self, identity: str) -> None:
        """A request is under way no more, and did not end."""
        self._live.pop(identity, None)

    def forget(self, before_seconds: float) -> None:
        """Drop what ended before."""
        self.readings.forget(before_seconds)
        self._given_up = {name: one for name, one in self._given_up.items() if one.finish >= before_seconds}
        kept = self._rows.values[:, 3] >= before_seconds
        if not kept.all():
            self._rows.keep(kept)
            self.since_seconds = max(self.since_seconds, before_seconds)

    def save(self) -> tuple[dict[str, Any], dict[str, Floats]]:
        """As JSON types, and arrays by name."""
        readings, arrays = self.readings.save()
        document = {
            "since_seconds": self.since_seconds,
            "until_seconds": self.until_seconds,
            "live": self._live,
            "given_up": self._given_up,
            "readings": readings,
        }
        return document, {"requests": self._rows.values.copy(), **arrays}

    def restore(self, document: Mapping[str, Any], arrays: Mapping[str, Floats]) -> None:
        """What `save` gave."""
        self.since_seconds, self.until_seconds = document["since_seconds"], document["until_seconds"]
        self._live = dict(document["live"])
        self._given_up = {name: Outcome(*one) for name, one in document["given_up"].items()}
        self._rows = Rows.of(arrays["requests"])
        self.readings.restore(document["readings"], arrays)

    def complete(self, until_seconds: float, patience_seconds: float = 0.0) -> bool:
        """Whether every request that arrived until then is over, and engines were read since: nothing changes.

        A request that was given up may still turn out to have been a long one: its record has `patience_seconds` to
        come after all.
        """
        waits = any(
            one.arrival <= until_seconds and self.until_seconds < one.finish + patience_seconds
            for one in self._given_up.values()
        )
        known = self.until_seconds >= until_seconds and all(arrival > until_seconds for arrival in self._live.values())
        return known and not waits and self.readings.complete(until_seconds)

    def measure(
        self, start_seconds: float, stop_seconds: float, footprint: Footprint | None = None
    ) -> dict[Metric, float]:
        """KPIs of (start, stop]; NaN where nothing happened. Where nothing tells a KPI, it is left out.

        Requests under way at the end of which neither first token nor end is known count in e2e only, by their age.
        `footprint` turns watts and replicas observed into the site's watts, energy, carbon and cost.
        """
        rows = _touching(self._rows.values, start_seconds, stop_seconds)
        assumed = np.array(list(self._given_up.values())).reshape(-1, len(Outcome._fields))
        everything = np.concatenate([rows, _touching(assumed, start_seconds, stop_seconds)])
        live = np.array([time for time in self._live.values() if time <= stop_seconds])
        seconds = max(stop_seconds - start_seconds, 1e-12)
        found = latency_kpis(_requests(rows, live), start_seconds, stop_seconds)
        found |= load_kpis(_requests(everything, live), start_seconds, stop_seconds)
        scheduled, first, prompt, cached = rows[:, 1], rows[:, 2], rows[:, 4], rows[:, 6]
        told = np.isfinite(cached)
        if told.any():
            began = np.where(np.isfinite(scheduled), scheduled, first)
            inside = told & (began > start_seconds) & (began <= stop_seconds)
            asked = float(prompt[inside].sum())
            found["prefix_cache_hit_ratio"] = float(cached[inside].sum()) / asked if asked else math.nan
        read = self.readings.measure(start_seconds, stop_seconds)
        found = {**read.kpis, **found}
        if footprint is not None:
            first, finish, prompt = everything[:, 2], everything[:, 3], everything[:, 4]
            began = np.where(np.isfinite(first), first, finish)
            prompts = float(prompt[(began > start_seconds) & (began <= stop_seconds)].sum())
            tokens = prompts + seconds * found["output_tokens_per_second"]
            found |= _impact(footprint, read, start_seconds, stop_seconds, tokens)
        return found


def _touching(rows: Floats, start: float, stop: float) -> Floats:
    """The requests that were under way in (start, stop]."""
    return rows[(rows[:, 0] <= stop) & (rows[:, 3] > start)]


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
