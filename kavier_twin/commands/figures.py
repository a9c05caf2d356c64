"""The forecaster's KPIs in words, and their values in units that are read at a glance."""

from __future__ import annotations

import math
from typing import Final

from kavier_twin.forecast.slo import METRICS, Metric

NAMES: Final[dict[Metric, str]] = {
    "ttft_p50_seconds": "TTFT p50",
    "ttft_p99_seconds": "TTFT p99",
    "itl_p99_seconds": "ITL p99",
    "tpot_p99_seconds": "TPOT p99",
    "e2e_p95_seconds": "e2e p95",
    "queue_p95_seconds": "queue p95",
    "prefix_cache_hit_ratio": "cache hit ratio",
    "kv_usage_mean_ratio": "KV usage",
    "running_mean": "running",
    "waiting_mean": "waiting",
    "output_tokens_per_second": "output tokens/s",
    "requests_per_second": "requests/s",
    "preemptions": "preemptions",
    "rejected_requests": "refused",
    "power_mean_watts": "power",
    "energy_joules_per_million_tokens": "energy/M tokens",
    "carbon_grams_per_million_tokens": "carbon/M tokens",
    "cost_per_million_tokens": "cost/M tokens",
}


def place(metric: Metric) -> int:
    """Where it comes in a table."""
    return METRICS.index(metric)


def figure(metric: Metric, value: float | None) -> str:
    """With its unit; a dash where it is not known."""
    return spread(metric, value, value, value)


def spread(metric: Metric, low: float | None, middle: float | None, high: float | None) -> str:
    """A value with its range, all in the unit that fits the largest; a dash where it is not known."""
    values = [math.nan if value is None else value for value in (low, middle, high)]
    if not all(map(math.isfinite, values)):
        return "–"
    factor, sign = unit(metric, max(map(abs, values)))
    texts = [_digits(factor * value) for value in values]
    return f"{texts[1]}{sign}" if texts[0] == texts[2] else f"{texts[1]}{sign} ({texts[0]}–{texts[2]})"


def unit(metric: Metric, largest: float) -> tuple[float, str]:
    """Factor and sign of the unit that fits a value so large."""
    if metric.endswith("_ratio"):
        return 100.0, " %"
    if metric.endswith("_seconds"):
        return (1.0, " s") if largest >= 1.0 else (1e3, " ms")
    if metric.endswith("_watts"):
        return (1.0, " W") if largest < 1e4 else (1e-3, " kW")
    if metric.startswith("energy"):
        return (1e-6, " MJ") if largest >= 1e5 else (1e-3, " kJ")
    if metric.startswith("carbon"):
        return 1.0, " g"
    return 1.0, ""


def _digits(value: float) -> str:
    """Three that count, and no exponent."""
    size = abs(value)
    if size >= 100.0 or value == 0.0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10.0 else f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"
