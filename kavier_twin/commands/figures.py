"""Values of KPIs in units that are read at a glance."""

from __future__ import annotations

import math

import numpy as np

from kavier_twin.simulation.kpi_table import METRICS, Metric, Scale, kpi_of


def place(metric: Metric) -> int:
    """Where it comes in a table."""
    return METRICS.index(metric)


def figure(name: str, value: float | None) -> str:
    """A value of this KPI or metric with its unit; a dash where it is not known."""
    return spread(name, value, value, value)


def spread(name: str, low: float | None, middle: float | None, high: float | None) -> str:
    """A value with its range, all in the unit that fits the largest; a dash where it is not known."""
    values = [math.nan if value is None else value for value in (low, middle, high)]
    if not all(map(math.isfinite, values)):
        return "–"
    scale = scale_of(name, max(map(abs, values)))
    texts = [_digits(scale.factor * value, whole=not scale.sign) for value in values]
    return f"{texts[1]}{scale.sign}" if texts[0] == texts[2] else f"{texts[1]}{scale.sign} ({texts[0]}–{texts[2]})"


def scale_of(name: str, largest: float) -> Scale:
    """The scale that fits a value so large."""
    return next(scale for scale in reversed(kpi_of(name).unit.scales) if largest >= scale.from_value)


def _digits(value: float, *, whole: bool) -> str:
    """Three significant digits. `whole`: numbers of things have no decimals where they need none."""
    size = abs(value)
    if size >= 100.0 or value == 0.0 or (whole and value.is_integer()):
        return f"{value:,.0f}"
    if size < 0.1:
        return np.format_float_positional(value, 2, fractional=False, trim="-")
    return f"{value:.1f}" if size >= 10.0 else f"{value:.2f}"
