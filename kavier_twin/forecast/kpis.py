"""KPIs of a simulated scenario from its beginning to a horizon, requests still under way included.

At a horizon some requests have no first token or no end yet, and just under overload these are the ones that wait
longest. They count with their age, a lower bound of what they will show. That may only raise a quantile: where load is
steady the requests done in a stretch of time are a fair sample, and young ones beside them would lower it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from kavier_twin.forecast.slo import METRICS, Metric
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.impact import Impact, impact
from kavier_twin.simulation.kpis import Counters, Distribution
from kavier_twin.simulation.state import FINISHED, FREE, Records

Floats = npt.NDArray[np.float64]

_TIMES: Final = ("arrival", "scheduled", "first_token", "finish")
_TRIMMED: Final = np.dtype([("status", np.int64), ("output", np.int64), *((name, np.float64) for name in _TIMES)])


def measure(
    fleet: Fleet, before: Counters, outcomes: Records, frontend_seconds: float, metrics: Collection[Metric] = METRICS
) -> dict[Metric, float]:
    """KPIs from `before`, read when the scenario began, to the fleet's present.

    `outcomes` are the requests that ended in between. Latencies in seconds, counted where their interval ended in
    between; queue time begins when the frontend is done, as vLLM's does. NaN where nothing was observed. Those of
    `metrics` only: what nobody asks for costs nothing.
    """
    seen = _Stretch(fleet, before, outcomes, frontend_seconds)
    return {metric: _KPIS[metric](seen) for metric in metrics}


def trimmed(outcomes: Records) -> Records:
    """Outcomes with what `measure` reads of them, a fifth of their size."""
    found = np.empty(outcomes.size, _TRIMMED)
    for name in _TRIMMED.names or ():
        found[name] = outcomes[name]
    return found


class _Stretch:
    """What happened in a stretch of time, worked out where it is asked for."""

    def __init__(self, fleet: Fleet, before: Counters, outcomes: Records, frontend_seconds: float) -> None:
        self._fleet = fleet
        self._frontend_seconds = frontend_seconds
        self.before, self.after = before, Counters.of(fleet.state, fleet.now_seconds)
        self.seconds = max(fleet.now_seconds - before.time_seconds, 1e-12)
        self.done = outcomes[outcomes["status"] == FINISHED]
        self.rejected = outcomes.size - self.done.size

    @cached_property
    def live(self) -> Records:
        requests = self._fleet.state.requests
        found: Records = requests[requests["state"] != FREE]
        return found

    @cached_property
    def ttft(self) -> tuple[Floats, Floats]:
        return self._until("first_token")

    @cached_property
    def queue(self) -> tuple[Floats, Floats]:
        return self._until("scheduled", self._frontend_seconds)

    @cached_property
    def e2e(self) -> tuple[Floats, Floats]:
        return self.done["finish"] - self.done["arrival"], self._fleet.now_seconds - self.live["arrival"]

    @cached_property
    def impact(self) -> Impact | None:
        before, after = self.before, self.after
        return impact(
            self._fleet.settings,
            [before.reading, after.reading],
            after.prompt_tokens - before.prompt_tokens,
            after.output_tokens - before.output_tokens,
        )

    def more(self, counter: str) -> float:
        """By how much a counter rose."""
        return float(getattr(self.after, counter) - getattr(self.before, counter))

    def rate(self, counter: str) -> float:
        return self.more(counter) / self.seconds

    def of_impact(self, name: str) -> float:
        return np.nan if self.impact is None else float(getattr(self.impact, name))

    def hit_ratio(self) -> float:
        queries = self.more("query_tokens")
        return self.more("hit_tokens") / queries if queries else np.nan

    def itl_p99(self) -> float:
        return Distribution.of_histogram(self.after.itl_counts - self.before.itl_counts).p99

    def tpot_p99(self) -> float:
        """Of the requests that ended in between and had several tokens: seconds per token after the first."""
        several = self.done[self.done["output"] > 1]
        values = (several["finish"] - several["first_token"]) / (several["output"] - 1)
        return float(np.quantile(values, 0.99)) if values.size else np.nan

    def _until(self, event: str, since_seconds: float = 0.0) -> tuple[Floats, Floats]:
        """Seconds from arrival + `since_seconds` to the event where it came, and ages where it is still to come."""
        done, live, now = self.done, self.live, self._fleet.now_seconds
        times = np.concatenate([done[event], live[event]])
        elapsed = times - np.concatenate([done["arrival"], live["arrival"]]) - since_seconds
        ages = now - live["arrival"][np.isnan(live[event])] - since_seconds
        return np.maximum(elapsed[times > self.before.time_seconds], 0.0), np.maximum(ages, 0.0)


_KPIS: Final[dict[Metric, Callable[[_Stretch], float]]] = {
    "ttft_p50_seconds": lambda seen: quantile_with_ages(*seen.ttft, 0.50),
    "ttft_p99_seconds": lambda seen: quantile_with_ages(*seen.ttft, 0.99),
    "itl_p99_seconds": _Stretch.itl_p99,
    "tpot_p99_seconds": _Stretch.tpot_p99,
    "e2e_p95_seconds": lambda seen: quantile_with_ages(*seen.e2e, 0.95),
    "queue_p95_seconds": lambda seen: quantile_with_ages(*seen.queue, 0.95),
    "prefix_cache_hit_ratio": _Stretch.hit_ratio,
    "kv_usage_mean_ratio": lambda seen: seen.rate("used_block_seconds") / max(seen.after.usable_blocks, 1),
    "running_mean": lambda seen: seen.rate("running_seconds"),
    "waiting_mean": lambda seen: seen.rate("waiting_seconds"),
    "output_tokens_per_second": lambda seen: seen.rate("output_tokens"),
    "requests_per_second": lambda seen: seen.done.size / seen.seconds,
    "preemptions": lambda seen: seen.more("preemptions"),
    "rejected_requests": lambda seen: float(seen.rejected),
    "power_mean_watts": lambda seen: seen.of_impact("power_mean_watts"),
    "energy_joules_per_million_tokens": lambda seen: seen.of_impact("energy_joules_per_million_tokens"),
    "carbon_grams_per_million_tokens": lambda seen: seen.of_impact("carbon_grams_per_million_tokens"),
    "cost_per_million_tokens": lambda seen: seen.of_impact("cost_per_million_tokens"),
}


def quantile_with_ages(complete: Floats, ages: Floats, share: float) -> float:
    """The larger of the quantile of complete intervals and that with the ages of those under way; NaN without any."""
    values = [np.quantile(sample, share) for sample in (complete, np.concatenate([complete, ages])) if sample.size]
    return float(max(values, default=np.nan))
