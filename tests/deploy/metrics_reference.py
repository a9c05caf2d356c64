"""docs/metrics.md, made from a scrape of a view that has everything.

PYTHONPATH=tests python -m deploy.metrics_reference > docs/metrics.md
"""

from __future__ import annotations

from prometheus_client.metrics_core import Metric

from kavier_twin.serve.metrics.exporter import _build, _metrics
from kavier_twin.serve.metrics.kernels import kernel_metrics
from serve.views import full_view

_HEAD = """# Metrics

What `/metrics` serves, in the Prometheus text format or as OpenMetrics. Generated from the code: see
`tests/deploy/metrics_reference.py`; a test keeps it up to date.

- Units are in the names, always base units. A ratio is 0 to 1.
- `pool` is the pool's name in the settings. `horizon` is in seconds from the forecast's start, `statistic` (mean, p50,
  p90, p95, p99) is over requests, `quantile` over the simulated scenarios. `in_force="1"` marks the
  policy in force, whatever its name.
- What is not known has no sample. Compare counters with `rate()`: they begin anew when the twin does.
- A summary here has quantiles alone, no count and no sum.

| metric | type | labels | says |
|---|---|---|---|
"""
_OF_THE_PROCESS = """
## The process
From prometheus_client, on Linux: `process_cpu_seconds_total`, `process_resident_memory_bytes`,
`process_virtual_memory_bytes`, `process_start_time_seconds`, `process_open_fds`, `process_max_fds`.
"""


def families() -> list[Metric]:
    """Every metric of the twin, those included that the view has no value for."""
    view = full_view()
    return sorted([_build(), *kernel_metrics(view.kernels), *_metrics(view)], key=lambda family: family.name)


def name_of(family: Metric) -> str:
    """As Prometheus stores it."""
    suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
    return f"{family.name}{suffix}"


def reference() -> str:
    """The page."""
    rows = []
    for family in families():
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels) or family._labelnames
        listed = ", ".join(f"`{label}`" for label in labels)
        says = family.documentation.replace("|", "\\|")
        rows.append(f"| `{name_of(family)}` | {family.type} | {listed} | {says} |\n")
    return _HEAD + "".join(rows) + _OF_THE_PROCESS


if __name__ == "__main__":
    print(reference(), end="")
