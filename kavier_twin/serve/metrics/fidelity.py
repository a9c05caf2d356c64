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
        "Error of the mirror before it was corrected, over a window of event time that ends now: (predicted - "
        "observed) / observed, or predicted - observed for KPIs that are ratios.",
        ["pool", "kpi", "statistic", "window"],
    )
    observations = gauge(
        "fidelity_observed_requests",
        "Requests that the errors of the window were observed on; samples for running, waiting and KV cache usage.",
        ["pool", "kpi", "window"],
    )
    for entry in view.errors:
        add(errors, [view.pool, entry.kpi, entry.statistic, entry.window], entry.error)
        if entry.statistic in ("", "mean"):
            observations.add_metric([view.pool, entry.kpi, entry.window], entry.observations)
    trusted = gauge(
        "trusted",
        "Whether predictions of the KPI are to be trusted (1): its errors lately lie within the bounds of the "
        "settings; or not (0), also for want of observations.",
        ["pool", "kpi"],
    )
    for kpi, trust in view.trust.items():
        trusted.add_metric([view.pool, kpi], float(trust.trusted))
    yield from (errors, observations, trusted)
    yield pool_gauge(
        "pool_trusted",
        "Whether every KPI that is observed is to be trusted and step times are fitted (1), or not (0).",
        view.pool,
        float(view.trusted),
    )
