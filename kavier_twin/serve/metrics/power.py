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
        "Mean power of one GPU in watts over the last ten minutes of event time: as observed by the GPU "
        "exporter, and as mirrored by the power model in use before.",
        ["pool", "side"],
    )
    error = gauge(
        "gpu_power_error_ratio",
        "Error of the mirrored mean power of one GPU: (mirrored - observed) / observed.",
        ["pool"],
    )
    fits = counter(
        "gpu_power_calibrations",
        "Number of times that the power model was fitted to observed watts.",
        ["pool"],
        [] if power is None else [([pool], power.calibrations)],
    )
    if power is not None:
        for side, value in (("mirrored", power.mirrored_watts), ("observed", power.observed_watts)):
            add(watts, [pool, side], value)
        add(error, [pool], power.error_ratio)
    yield from (watts, error, fits)
