"""The forecast that is served: what was simulated, moved and widened by what earlier forecasts missed.

Only the policy in force can be compared with what came. What was learnt of it is applied to all alike, so that the
difference between two policies stays what their simulations in the same scenarios say: medians are multiplied by the
same factor, and intervals become wider by as much, in proportion to the medians. Odds of a breach follow from the
served median and interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import special

from kavier_twin.forecast.result import Forecast, Quantiles, Row
from kavier_twin.forecast.slo import Slo
from kavier_twin.forecast.statistics import share_interval
from kavier_twin.scores.conformal import COVERAGE, INTERVAL_END
from kavier_twin.simulation.kpi_table import RATIO, Metric, kpi_of


class Foretold(NamedTuple):
    """One KPI over one horizon under the policy in force, in its unit."""

    low: float  # as simulated
    median: float
    high: float
    wide_low: float  # as served
    served: float
    wide_high: float
    known: float  # the same KPI over as long a time before, as far as it was known then; NaN: not at all


def interval(values: Quantiles) -> tuple[float, float, float]:
    """Low end, median and high end: the quantiles nearest to those between which COVERAGE of all scenarios lie."""
    tail = 0.5 * (1.0 - COVERAGE)
    low, high = (min(values.values, key=lambda quantile: abs(quantile - end)) for end in (tail, 1.0 - tail))
    return values.values[low], values.p50, values.values[high]


def served(forecast: Forecast, told: Mapping[tuple[float, Metric], Foretold], slos: Sequence[Slo]) -> Forecast:
    """The forecast with all rows as they are served; KPIs of which nothing is told stay as simulated."""
    rows = tuple(_row(row, told, slos) for row in forecast.rows)
    return dataclasses.replace(forecast, rows=rows)


def breach_probability(slo: Slo, low: float, median: float, high: float) -> float:
    """Of a KPI with this median and interval, normal on either side of the median."""
    half = high - median if slo.threshold >= median else median - low
    if half <= 0.0:
        return float(slo.breached(median))
    above = float(special.ndtr((median - slo.threshold) / half * INTERVAL_END))
    return 1.0 - above if slo.higher_is_better else above


def _row(row: Row, told: Mapping[tuple[float, Metric], Foretold], slos: Sequence[Slo]) -> Row:
    kpis, breaches, credible = dict(row.kpis), dict(row.breach_probability), dict(row.breach_interval)
    for metric, values in row.kpis.items():
        one = told.get((row.horizon_seconds, metric))
        if one is None or not math.isfinite(values.p50):
            continue
        moved = _Moved(one, values.p50)
        kpis[metric] = Quantiles(
            {
                at: possible(metric, moved.value(value, special.ndtri(at) / INTERVAL_END))
                for at, value in values.values.items()
            }
        )
        low, median, high = interval(values)
        places = ((low, -1.0), (median, 0.0), (high, 1.0))
        ends = tuple(possible(metric, moved.value(value, place)) for value, place in places)
        for slo in slos:
            if slo.metric == metric and slo.name in breaches:
                breaches[slo.name] = breach_probability(slo, *ends)
                credible[slo.name] = share_interval(breaches[slo.name] * row.scenarios, row.scenarios)
    return dataclasses.replace(row, kpis=kpis, breach_probability=breaches, breach_interval=credible)


def possible(metric: Metric, value: float) -> float:
    """The nearest value that the KPI can have: none is below 0, and no ratio above 1. NaN stays."""
    if math.isnan(value):
        return value
    most = 1.0 if kpi_of(metric).unit == RATIO else math.inf
    return min(max(0.0, value), most)


def movement(simulated: float, served: float) -> tuple[float, float]:
    """Factor and shift that make the served median of the simulated one: in proportion, where it is not 0."""
    return (served / simulated, 0.0) if simulated > 0.0 else (1.0, served - simulated)


class _Moved:
    """What one KPI of a row becomes whose simulated median is `median`."""

    def __init__(self, one: Foretold, median: float) -> None:
        self._factor, self._shift = movement(one.median, one.served)
        size = median / one.median if one.median > 0.0 else 1.0
        self._below = size * ((one.served - one.wide_low) - self._factor * (one.median - one.low))
        self._above = size * ((one.wide_high - one.served) - self._factor * (one.high - one.median))
        self._median = self._factor * median + self._shift

    def value(self, simulated: float, deviations: float) -> float:
        """Of a simulated quantile; `deviations`: its place, from -1 and 1 at the ends of the interval."""
        moved = self._factor * simulated + self._shift
        if deviations < 0.0:
            return max(0.0, min(self._median, moved + deviations * self._below))
        return max(self._median, moved + deviations * self._above)
