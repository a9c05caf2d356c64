"""How far the twin is to be trusted, as metrics: errors per KPI over windows of event time, and what follows."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from kavier_twin.serve.metrics.families import add, gauge, pool_gauge
from kavier_twin.serve.models import TwinView


def fidelity_metrics(view: TwinView) -> Iterator[Metric]:
    """Errors of predictions made before the end was known, and trust."""
    errors = gauge(
        "fidelity_error_ratio",
        "Error of the mirror before correction, over a window of event time that ends now: (mirrored - "
        "observed) / observed, or mirrored - observed for ratios.",
        ["pool", "kpi", "statistic", "window"],
    )
    observations = gauge(
        "fidelity_observed_requests",
        "Number of observations behind the errors of the window: requests, or samples for running, "
        "waiting and KV cache usage.",
        ["pool", "kpi", "window"],
    )
    for entry in view.errors:
        add(errors, [view.pool, entry.kpi, entry.statistic, entry.window], entry.error)
        if entry.statistic in ("", "mean"):
            observations.add_metric([view.pool, entry.kpi, entry.window], entry.observations)
    trusted = gauge(
        "trusted",
        "Whether predictions of the KPI are trusted (1) because its recent errors are within the "
        "configured bounds, or not (0). A KPI without observations is not trusted.",
        ["pool", "kpi"],
    )
    for kpi, trust in view.trust.items():
        trusted.add_metric([view.pool, kpi], float(trust.trusted))
    yield from (errors, observations, trusted)
    yield pool_gauge(
        "pool_trusted",
        "Whether all observed KPIs are trusted and step times are fitted (1) or not (0).",
        view.pool,
        float(view.trusted),
    )
