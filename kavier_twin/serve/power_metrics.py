"""Watts of real GPUs and of mirrored ones side by side, as metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from kavier_twin.serve.view import PowerBeside

_PREFIX: Final = "kavier_twin_gpu_power"


def power_metrics(pool: str, power: PowerBeside | None) -> Iterator[Metric]:
    """Of a pool whose power model is told. Nothing of a GPU's idle neighbours or of PUE is in these watts."""
    watts = GaugeMetricFamily(
        f"{_PREFIX}_watts",
        "Mean watts of one GPU over the last ten minutes of event time: observed by DCGM, and mirrored by the power "
        "model that was in use before they were observed.",
        labels=["pool", "side"],
    )
    error = GaugeMetricFamily(
        f"{_PREFIX}_error_ratio", "(Mirrored - observed) / observed mean watts of one GPU.", labels=["pool"]
    )
    fits = CounterMetricFamily(
        f"{_PREFIX}_calibrations", "Times that the power model was fitted to observed watts.", labels=["pool"]
    )
    if power is not None:
        fits.add_metric([pool], power.calibrations)
        for side, value in (("mirrored", power.mirrored_watts), ("observed", power.observed_watts)):
            if math.isfinite(value):
                watts.add_metric([pool, side], value)
        if math.isfinite(power.error_ratio):
            error.add_metric([pool], power.error_ratio)
    yield from (watts, error, fits)
