"""How step times follow the fleet, as metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from kavier_twin.serve.metrics.families import add, counter, gauge, pool_gauge
from kavier_twin.serve.models import TwinView


def calibration_metrics(view: TwinView) -> Iterator[Metric]:
    """Coefficients' uncertainty, when they were last fitted, jumps of the fleet's speed."""
    deviations = gauge(
        "step_time_coefficient_deviation_seconds",
        "Standard deviation of a fitted step-time coefficient (a lower bound), in the coefficient's unit.",
        ["pool", "coefficient"],
    )
    for name, deviation in view.step_time_deviation.items():
        add(deviations, [view.pool, name], deviation)
    yield deviations
    yield pool_gauge(
        "calibration_last_timestamp_seconds",
        "Event time of the last fit of step times, in Unix seconds for live sources.",
        view.pool,
        view.calibration.event_seconds,
    )
    yield counter(
        "calibration_changes",
        "Number of sudden changes of the engines' speed that were detected. Older observations are discarded.",
        ["pool"],
        [([view.pool], view.calibration.changes)],
    )
    yield pool_gauge(
        "calibration_change_ratio",
        "Duration of an engine step after the last sudden change of speed, divided by its duration before.",
        view.pool,
        view.calibration.change_ratio,
    )
    yield counter(
        "calibration_failures",
        "Number of fits of step times that failed: too_few_latencies (too few requests with TTFT and "
        "end-to-end latency).",
        ["pool", "reason"],
        [([view.pool, reason], count) for reason, count in sorted(view.calibration.failures.items())],
    )
