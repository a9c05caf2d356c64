"""How good the forecasts have been, as Prometheus metrics. KPIs are named as in the settings of objectives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from kavier_twin.forecast.scores import Scores

_PREFIX: Final = "kavier_twin"


def score_metrics(pool: str, scores: Scores) -> Iterator[Metric]:
    """All of them; a figure that is not known has no sample."""
    kpi = ["pool", "kpi", "horizon"]
    judged = _gauge("score_forecasts", "Forecasts judged that the scores of this KPI and horizon are of.", kpi)
    error = _gauge(
        "score_absolute_error",
        "Mean absolute error of what was foreseen (method=forecast) and of saying that the KPI stays as it was over as "
        "long a time before (method=persistence), in the KPI's unit.",
        [*kpi, "method"],
    )
    ratio = _gauge(
        "score_error_to_persistence_ratio", "Error of forecasts over that of persistence; below 1 is better.", kpi
    )
    coverage = _gauge(
        "score_coverage_ratio",
        "Share of intervals that held what came: as simulated, and widened by what was observed (0.9 is aimed at).",
        [*kpi, "interval"],
    )
    bound = _gauge(
        "prediction_bound",
        "Ends of the interval of the last forecast under today's policy, in the KPI's unit: as simulated, and widened.",
        [*kpi, "interval", "bound"],
    )
    for one in scores.kpis:
        labels = [pool, one.kpi, f"{one.horizon_seconds:g}"]
        _add(judged, labels, one.forecasts)
        _add(error, [*labels, "forecast"], one.error)
        _add(error, [*labels, "persistence"], one.persistence_error)
        _add(ratio, labels, one.error_to_persistence_ratio)
        _add(coverage, [*labels, "simulated"], one.coverage_ratio)
        _add(coverage, [*labels, "widened"], one.widened_coverage_ratio)
    for interval in scores.intervals:
        labels = [pool, interval.kpi, f"{interval.horizon_seconds:g}"]
        _add(bound, [*labels, "simulated", "low"], interval.low)
        _add(bound, [*labels, "simulated", "high"], interval.high)
        _add(bound, [*labels, "widened", "low"], interval.wide_low)
        _add(bound, [*labels, "widened", "high"], interval.wide_high)
    yield from (judged, error, ratio, coverage, bound)
    yield from _breaches(pool, scores)
    yield from _alerts(pool, scores)
    pending = _gauge("pending_forecasts", "Forecasts, by horizon, whose time has not come.", ["pool"])
    _add(pending, [pool], scores.pending)
    yield pending
    unscored = CounterMetricFamily(
        f"{_PREFIX}_unscored_forecasts",
        "Forecasts that could not be judged since the start: interrupted (the twin was not there all of their time).",
        labels=["pool", "reason"],
    )
    for reason, count in sorted(scores.unscored.items()):
        unscored.add_metric([pool, reason], count)
    yield unscored


def _breaches(pool: str, scores: Scores) -> Iterator[Metric]:
    slo = ["pool", "slo", "horizon"]
    brier = _gauge(
        "score_brier",
        "Mean squared error of breach probabilities (method=forecast), and of saying that it stays as it is "
        "(method=persistence); 0 is perfect.",
        [*slo, "method"],
    )
    said = _gauge(
        "score_reliability_said_ratio",
        "Mean breach probability of the forecasts in a bin of probabilities (its lower end).",
        [*slo, "bin"],
    )
    came = _gauge("score_reliability_came_ratio", "Share of the forecasts in the bin whose breach came.", [*slo, "bin"])
    count = _gauge("score_reliability_forecasts", "Forecasts in the bin.", [*slo, "bin"])
    for one in scores.breaches:
        labels = [pool, one.slo, f"{one.horizon_seconds:g}"]
        _add(brier, [*labels, "forecast"], one.brier)
        _add(brier, [*labels, "persistence"], one.persistence_brier)
        for found in one.reliability:
            _add(said, [*labels, f"{found.lower:g}"], found.probability)
            _add(came, [*labels, f"{found.lower:g}"], found.breached_ratio)
            _add(count, [*labels, f"{found.lower:g}"], found.forecasts)
    yield from (brier, said, came, count)


def _alerts(pool: str, scores: Scores) -> Iterator[Metric]:
    labels = ["pool", "slo"]
    alerts = _gauge("score_alerts", "Alerts judged: runs of forecasts that hold a breach as likely as not.", labels)
    breaches = _gauge("score_breaches", "Breaches that the alerts are judged by.", labels)
    precision = _gauge("score_alert_precision_ratio", "Share of alerts that a breach followed in time.", labels)
    recall = _gauge("score_alert_recall_ratio", "Share of breaches that an alert came before.", labels)
    lead = _gauge("score_alert_lead_seconds", "Median time from an alert to its breach.", labels)
    for one in scores.alerts:
        _add(alerts, [pool, one.slo], one.alerts)
        _add(breaches, [pool, one.slo], one.breaches)
        _add(precision, [pool, one.slo], one.precision)
        _add(recall, [pool, one.slo], one.recall)
        _add(lead, [pool, one.slo], one.median_lead_seconds)
    yield from (alerts, breaches, precision, recall, lead)


def _gauge(name: str, says: str, labels: list[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", says, labels=labels)


def _add(family: GaugeMetricFamily, labels: list[str], value: float) -> None:
    if math.isfinite(value):
        family.add_metric(labels, value)
