"""Watts of real GPUs and of mirrored ones side by side, as metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from kavier_twin.serve.metrics.families import add, counter, gauge
from kavier_twin.serve.models import GpuPower


def power_metrics(pool: str, power: GpuPower | None) -> Iterator[Metric]:
    """Of a pool whose power model is told. Nothing of a GPU's idle neighbours or of PUE is in these watts."""
    watts = gauge(
        "gpu_power_watts",
        "Mean watts of one GPU over the last ten minutes of event time: as the GPU exporter tells, and mirrored by the "
        "power model that was in use before they were observed.",
        ["pool", "side"],
    )
    error = gauge("gpu_power_error_ratio", "(Mirrored - observed) / observed mean watts of one GPU.", ["pool"])
    fits = counter(
        "gpu_power_calibrations",
        "Times that the power model was fitted to observed watts.",
        ["pool"],
        [] if power is None else [([pool], power.calibrations)],
    )
    if power is not None:
        for side, value in (("mirrored", power.mirrored_watts), ("observed", power.observed_watts)):
            add(watts, [pool, side], value)
        add(error, [pool], power.error_ratio)
    yield from (watts, error, fits)
