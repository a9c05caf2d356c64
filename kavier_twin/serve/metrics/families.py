"""Metric families of the twin: their common prefix, and samples only of what is known."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from kavier_twin.serve.models import Horizon, PolicyOutlook

PREFIX: Final = "kavier_twin"


def gauge(name: str, says: str, labels: list[str]) -> GaugeMetricFamily:
    """A gauge without samples."""
    return GaugeMetricFamily(f"{PREFIX}_{name}", says, labels=labels)


def pool_gauge(name: str, says: str, pool: str, value: float) -> GaugeMetricFamily:
    """A gauge that has one value a pool."""
    family = gauge(name, says, ["pool"])
    add(family, [pool], value)
    return family


def counter(name: str, says: str, labels: list[str], values: Iterable[tuple[list[str], int]]) -> CounterMetricFamily:
    """A counter with its samples, each the values of its labels and the count."""
    family = CounterMetricFamily(f"{PREFIX}_{name}", says, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def add(family: GaugeMetricFamily, labels: list[str], value: float) -> None:
    """A sample, unless the value is not known."""
    if math.isfinite(value):
        family.add_metric(labels, value)


def policy_labels(pool: str, policy: PolicyOutlook) -> list[str]:
    """The values of the labels `pool`, `policy` and `in_force`: rules ask for the policy in force whatever its name."""
    return [pool, policy.name, flag(policy.in_force)]


def breach_flag(horizon: Horizon, slo: str) -> str:
    """That of a breach of the SLO within the horizon."""
    return flag(horizon.breach_trusted.get(slo, False))


def flag(trusted: bool) -> str:
    """The value of the label `trusted`."""
    return "1" if trusted else "0"
