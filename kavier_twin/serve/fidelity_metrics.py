"""How far the twin is to be trusted, as metrics: errors per KPI over windows of event time, and what follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from kavier_twin.serve.view import TwinView

PREFIX: Final = "kavier_twin"


def flag(trusted: bool) -> str:
    """The value of the label `trusted`."""
    return "1" if trusted else "0"


def fidelity_metrics(view: TwinView) -> Iterator[Metric]:
    """Errors of predictions made before the end was known, and trust."""
    errors = GaugeMetricFamily(
        f"{PREFIX}_fidelity_error_ratio",
        "Error of the mirror before it was corrected, over a window of event time that ends now: (predicted - "
        "observed) / observed, or predicted - observed for KPIs that are ratios.",
        labels=["pool", "kpi", "statistic", "window"],
    )
    observations = GaugeMetricFamily(
        f"{PREFIX}_fidelity_observed_requests",
        "Requests that the errors of the window were observed on; samples for running, waiting and KV cache usage.",
        labels=["pool", "kpi", "window"],
    )
    for entry in view.errors:
        if math.isfinite(entry.error):
            errors.add_metric([view.pool, entry.kpi, entry.statistic, entry.window], entry.error)
        if entry.statistic in ("", "mean"):
            observations.add_metric([view.pool, entry.kpi, entry.window], entry.observations)
    trusted = GaugeMetricFamily(
        f"{PREFIX}_trusted",
        "Whether predictions of the KPI are to be trusted (1): its errors lately lie within the bounds of the "
        "settings; or not (0), also for want of observations.",
        labels=["pool", "kpi"],
    )
    for kpi, trust in view.trust.items():
        trusted.add_metric([view.pool, kpi], float(trust.trusted))
    whole = GaugeMetricFamily(
        f"{PREFIX}_pool_trusted",
        "Whether every KPI that is observed is to be trusted and step times are fitted (1), or not (0).",
        labels=["pool"],
    )
    whole.add_metric([view.pool], float(view.trusted))
    yield from (errors, observations, trusted, whole)
