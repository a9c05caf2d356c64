"""KPIs of a simulated future from its beginning to a horizon, requests still under way included.

At a horizon some requests have no first token or no end yet, and just under overload these are the ones that wait
longest. They count with their age, a lower bound of what they will show. That may only raise a quantile: where load is
steady the requests done in a stretch of time are a fair sample, and young ones beside them would lower it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kavier_twin.forecast.slo import Metric
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.impact import impact
from kavier_twin.simulation.kpis import Counters, Distribution
from kavier_twin.simulation.state import FINISHED, FREE, Records

Floats = npt.NDArray[np.float64]


def measure(fleet: Fleet, before: Counters, outcomes: Records, frontend_seconds: float) -> dict[Metric, float]:
    """KPIs from `before`, read when the future began, to the fleet's present.

    `outcomes` are the requests that ended in between. Latencies in seconds, counted where their interval ended in
    between; queue time begins when the frontend is done, as vLLM's does. NaN where nothing was observed.
    """
    now, start = fleet.now_seconds, before.time_seconds
    after = Counters.of(fleet.state, now)
    seconds = max(now - start, 1e-12)
    live = fleet.state.requests[fleet.state.requests["state"] != FREE]
    done = outcomes[outcomes["status"] == FINISHED]

    def until(event: str, since_seconds: float = 0.0) -> tuple[Floats, Floats]:
        """Seconds from arrival + `since_seconds` to the event where it came, and ages where it is still to come."""
        times = np.concatenate([done[event], live[event]])
        elapsed = times - np.concatenate([done["arrival"], live["arrival"]]) - since_seconds
        ages = now - live["arrival"][np.isnan(live[event])] - since_seconds
        return np.maximum(elapsed[times > start], 0.0), np.maximum(ages, 0.0)

    ttft, queue = until("first_token"), until("scheduled", frontend_seconds)
    e2e = done["finish"] - done["arrival"], now - live["arrival"]
    queries = after.query_tokens - before.query_tokens
    energy = impact(
        fleet.settings,
        [before.reading, after.reading],
        after.prompt_tokens - before.prompt_tokens,
        after.output_tokens - before.output_tokens,
    )
    usable_block_seconds = after.usable_blocks * seconds
    return {
        "ttft_p50_seconds": _quantile(*ttft, 0.50),
        "ttft_p99_seconds": _quantile(*ttft, 0.99),
        "itl_p99_seconds": Distribution.of_histogram(after.itl_counts - before.itl_counts).p99,
        "e2e_p95_seconds": _quantile(*e2e, 0.95),
        "queue_p95_seconds": _quantile(*queue, 0.95),
        "prefix_cache_hit_ratio": (after.hit_tokens - before.hit_tokens) / queries if queries else np.nan,
        "kv_usage_mean_ratio": (after.used_block_seconds - before.used_block_seconds) / usable_block_seconds,
        "running_mean": (after.running_seconds - before.running_seconds) / seconds,
        "waiting_mean": (after.waiting_seconds - before.waiting_seconds) / seconds,
        "output_tokens_per_second": (after.output_tokens - before.output_tokens) / seconds,
        "requests_per_second": done.size / seconds,
        "preemptions": float(after.preemptions - before.preemptions),
        "rejected_requests": float(outcomes.size - done.size),
        "power_mean_watts": np.nan if energy is None else energy.power_mean_watts,
        "energy_joules_per_million_tokens": np.nan if energy is None else energy.energy_joules_per_million_tokens,
        "carbon_grams_per_million_tokens": np.nan if energy is None else energy.carbon_grams_per_million_tokens,
        "cost_per_million_tokens": np.nan if energy is None else energy.cost_per_million_tokens,
    }


def _quantile(complete: Floats, ages: Floats, share: float) -> float:
    """The larger of the quantile of complete intervals and that with the ages of those under way; NaN without any."""
    values = [np.quantile(sample, share) for sample in (complete, np.concatenate([complete, ages])) if sample.size]
    return float(max(values, default=np.nan))
