"""How good the forecasts have been, as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from kavier_twin.scores.scorer import Scores
from kavier_twin.serve.metrics.families import add, counter, gauge, pool_gauge
from kavier_twin.simulation.kpi_table import STATISTICS


def score_metrics(pool: str, scores: Scores) -> Iterator[Metric]:
    """All of them; a figure that is not known has no sample."""
    kpi = ["pool", "kpi", "statistic", "horizon"]
    judged = gauge("score_forecasts", "Number of forecasts scored for this KPI and horizon.", kpi)
    error = gauge(
        "score_absolute_error",
        'Mean absolute error in the KPI\'s unit: of the simulation (method="forecast"), of the simulation '
        'corrected by past errors ("served"), and of the KPI\'s value over an equally long time before '
        'the forecast ("persistence").',
        [*kpi, "method"],
    )
    ratio = gauge(
        "score_error_to_persistence_ratio",
        'Mean absolute error divided by that of persistence, for the simulation (method="forecast") and '
        'for the corrected forecast ("served"). Below 1 is better than persistence.',
        [*kpi, "method"],
    )
    coverage = gauge(
        "score_coverage_ratio",
        "Share of observed values that were inside the 90 % interval: as simulated, and widened by past "
        "errors. The target is 0.9.",
        [*kpi, "interval"],
    )
    bound = gauge(
        "prediction_bound",
        "Bounds and median of the last forecast's 90 % interval under the current policy, in the KPI's "
        "unit: as simulated, and as served (widened and corrected by past errors).",
        [*kpi, "interval", "bound"],
    )
    for one in scores.kpis:
        labels = [pool, *STATISTICS[one.kpi], f"{one.horizon_seconds:g}"]
        add(judged, labels, one.forecasts)
        add(error, [*labels, "forecast"], one.error)
        add(error, [*labels, "served"], one.served_error)
        add(error, [*labels, "persistence"], one.persistence_error)
        add(ratio, [*labels, "forecast"], one.error_to_persistence_ratio)
        add(ratio, [*labels, "served"], one.served_error_to_persistence_ratio)
        add(coverage, [*labels, "simulated"], one.coverage_ratio)
        add(coverage, [*labels, "widened"], one.widened_coverage_ratio)
    for interval in scores.intervals:
        labels = [pool, *STATISTICS[interval.kpi], f"{interval.horizon_seconds:g}"]
        add(bound, [*labels, "simulated", "low"], interval.low)
        add(bound, [*labels, "simulated", "median"], interval.median)
        add(bound, [*labels, "simulated", "high"], interval.high)
        add(bound, [*labels, "widened", "low"], interval.wide_low)
        add(bound, [*labels, "widened", "median"], interval.served)
        add(bound, [*labels, "widened", "high"], interval.wide_high)
    yield from (judged, error, ratio, coverage, bound)
    yield from _breaches(pool, scores)
    yield from _alerts(pool, scores)
    yield pool_gauge(
        "pending_forecasts",
        "Number of forecasts, summed over horizons, whose horizon has not ended yet.",
        pool,
        scores.pending,
    )
    yield counter(
        "unscored_forecasts",
        "Number of forecasts that could not be scored: interrupted (the twin was not running for the whole horizon).",
        ["pool", "reason"],
        [([pool, reason], count) for reason, count in sorted(scores.unscored.items())],
    )
    yield counter(
        "score_unobserved_forecasts",
        "Number of forecasts that could not be scored for this KPI because no telemetry reported it.",
        ["pool", "kpi", "statistic"],
        [([pool, *STATISTICS[metric]], count) for metric, count in sorted(scores.unobserved.items())],
    )


def _breaches(pool: str, scores: Scores) -> Iterator[Metric]:
    slo = ["pool", "slo", "horizon"]
    brier = gauge(
        "score_brier",
        "Brier score (mean squared error) of the SLO violation probability: as served "
        '(method="forecast"), as the plain share of scenarios ("simulated"), and for the assumption that '
        'the SLO\'s state does not change ("persistence"). 0 is perfect.',
        [*slo, "method"],
    )
    said = gauge(
        "score_reliability_predicted_ratio",
        "Mean predicted probability of the forecasts in this bin. The label is the bin's lower bound.",
        [*slo, "bin"],
    )
    came = gauge(
        "score_reliability_observed_ratio",
        "Share of the forecasts in this bin that were followed by a violation.",
        [*slo, "bin"],
    )
    count = gauge("score_reliability_forecasts", "Number of forecasts in this bin.", [*slo, "bin"])
    for one in scores.breaches:
        labels = [pool, one.slo, f"{one.horizon_seconds:g}"]
        add(brier, [*labels, "forecast"], one.brier)
        add(brier, [*labels, "simulated"], one.simulated_brier)
        add(brier, [*labels, "persistence"], one.persistence_brier)
        for found in one.reliability:
            add(said, [*labels, f"{found.lower:g}"], found.probability)
            add(came, [*labels, f"{found.lower:g}"], found.breached_ratio)
            add(count, [*labels, f"{found.lower:g}"], found.forecasts)
    yield from (brier, said, came, count)


def _alerts(pool: str, scores: Scores) -> Iterator[Metric]:
    labels = ["pool", "slo"]
    alerts = gauge(
        "score_alerts",
        "Number of alerts scored, as defined by KavierTwinSloBreachPredicted of severity warning.",
        labels,
    )
    breaches = gauge("score_breaches", "Number of SLO violations that alerts are scored against.", labels)
    precision = gauge(
        "score_alert_precision_ratio",
        "Share of alerts that were followed by a violation within the longest horizon.",
        labels,
    )
    recall = gauge("score_alert_recall_ratio", "Share of violations that were preceded by an alert.", labels)
    lead = gauge("score_alert_lead_seconds", "Median time from an alert to the violation, in seconds.", labels)
    false = gauge("score_false_alerts_per_day", "Number of alerts per day that no violation followed in time.", labels)
    healthy = gauge(
        "score_healthy_alert_minutes_per_day",
        "Minutes per day under an alert without a violation then or in time.",
        labels,
    )
    for one in scores.alerts:
        add(alerts, [pool, one.slo], one.alerts)
        add(breaches, [pool, one.slo], one.breaches)
        add(precision, [pool, one.slo], one.precision)
        add(recall, [pool, one.slo], one.recall)
        add(lead, [pool, one.slo], one.median_lead_seconds)
        add(false, [pool, one.slo], one.false_alerts_per_day)
        add(healthy, [pool, one.slo], one.healthy_alert_minutes_per_day)
    yield from (alerts, breaches, precision, recall, lead, false, healthy)
