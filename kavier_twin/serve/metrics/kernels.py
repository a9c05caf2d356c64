"""The simulation's compiled kernels as metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from kavier_twin.serve.metrics.families import counter, gauge
from kavier_twin.serve.models import KernelCounts


def kernel_metrics(kernels: KernelCounts) -> Iterator[Metric]:
    """Of the whole process, whatever its pools."""
    compiling = gauge("compiling_kernel_libraries", "Number of kernel libraries that are being compiled.", [])
    compiling.add_metric([], kernels.compiling)
    yield compiling
    yield counter(
        "kernel_libraries_compiled",
        "Number of kernel libraries that were compiled instead of loaded from the cache.",
        [],
        [([], kernels.compiled)],
    )
