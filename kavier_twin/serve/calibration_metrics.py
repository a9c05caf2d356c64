"""How step times follow the fleet, as metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from kavier_twin.serve.view import TwinView

_PREFIX: Final = "kavier_twin"


def calibration_metrics(view: TwinView) -> Iterator[Metric]:
    """Coefficients' uncertainty, when they were last fitted, jumps of the fleet's speed."""
    deviations = GaugeMetricFamily(
        f"{_PREFIX}_step_time_coefficient_deviation_seconds",
        "One standard deviation of a fitted coefficient, a lower bound, in the coefficient's unit.",
        labels=["pool", "coefficient"],
    )
    for name, deviation in view.step_time_deviation.items():
        if math.isfinite(deviation):
            deviations.add_metric([view.pool, name], deviation)
    last = GaugeMetricFamily(
        f"{_PREFIX}_calibration_last_timestamp_seconds",
        "Event time of the last fit of step times: unix time for live sources.",
        labels=["pool"],
    )
    if math.isfinite(view.calibration.event_seconds):
        last.add_metric([view.pool], view.calibration.event_seconds)
    changes = CounterMetricFamily(
        f"{_PREFIX}_calibration_changes",
        "Jumps of the fleet's speed that were found and met by forgetting what was before.",
        labels=["pool"],
    )
    changes.add_metric([view.pool], view.calibration.changes)
    ratio = GaugeMetricFamily(
        f"{_PREFIX}_calibration_change_ratio",
        "Duration of an engine step after the last such jump over that before it.",
        labels=["pool"],
    )
    if math.isfinite(view.calibration.change_ratio):
        ratio.add_metric([view.pool], view.calibration.change_ratio)
    failures = CounterMetricFamily(
        f"{_PREFIX}_calibration_failures",
        "Fits of step times that could not be made: too_few_latencies (of requests with TTFT and end-to-end latency).",
        labels=["pool", "reason"],
    )
    for reason, count in sorted(view.calibration.failures.items()):
        failures.add_metric([view.pool, reason], count)
    yield from (deviations, last, changes, ratio, failures)
