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
    judged = gauge("score_forecasts", "Forecasts judged that the scores of this KPI and horizon are of.", kpi)
    error = gauge(
        "score_absolute_error",
        "Mean absolute error of what was simulated (method=forecast), of that corrected by what was observed "
        "(method=served), and of saying that the KPI stays as it was over as "
        "long a time before (method=persistence), in the KPI's unit.",
        [*kpi, "method"],
    )
    ratio = gauge(
        "score_error_to_persistence_ratio",
        "Error over that of persistence; below 1 is better. Of what was simulated (method=forecast) and of what was "
        "served.",
        [*kpi, "method"],
    )
    coverage = gauge(
        "score_coverage_ratio",
        "Share of intervals that held what came: as simulated, and widened by what was observed (0.9 is aimed at).",
        [*kpi, "interval"],
    )
    bound = gauge(
        "prediction_bound",
        "Ends and median of the interval of the last forecast under today's policy, in the KPI's unit: as simulated, "
        "and as served (widened, the median corrected).",
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
    yield pool_gauge("pending_forecasts", "Forecasts, by horizon, whose time has not come.", pool, scores.pending)
    yield counter(
        "unscored_forecasts",
        "Forecasts that could not be judged since the start: interrupted (the twin was not there all of their time).",
        ["pool", "reason"],
        [([pool, reason], count) for reason, count in sorted(scores.unscored.items())],
    )
    yield counter(
        "score_unobserved_forecasts",
        "Forecasts, by KPI, of whose time no telemetry told the KPI since the start, so that it was not judged.",
        ["pool", "kpi", "statistic"],
        [([pool, *STATISTICS[metric]], count) for metric, count in sorted(scores.unobserved.items())],
    )


def _breaches(pool: str, scores: Scores) -> Iterator[Metric]:
    slo = ["pool", "slo", "horizon"]
    brier = gauge(
        "score_brier",
        "Mean squared error of breach probabilities (method=forecast), of the share of scenarios that break the "
        "objective (method=simulated), and of saying that it stays as it is (method=persistence); 0 is perfect.",
        [*slo, "method"],
    )
    said = gauge(
        "score_reliability_predicted_ratio",
        "Mean breach probability of the forecasts in a bin of probabilities (its lower end).",
        [*slo, "bin"],
    )
    came = gauge(
        "score_reliability_observed_ratio", "Share of the forecasts in the bin whose breach came.", [*slo, "bin"]
    )
    count = gauge("score_reliability_forecasts", "Forecasts in the bin.", [*slo, "bin"])
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
        "score_alerts", "Alerts judged, as KavierTwinSloBreachPredicted of severity warning defines them.", labels
    )
    breaches = gauge("score_breaches", "Breaches that the alerts are judged by.", labels)
    precision = gauge("score_alert_precision_ratio", "Share of alerts that a breach followed in time.", labels)
    recall = gauge("score_alert_recall_ratio", "Share of breaches that an alert came before.", labels)
    lead = gauge("score_alert_lead_seconds", "Median time from an alert to its breach.", labels)
    false = gauge("score_false_alerts_per_day", "Alerts that no breach followed in time.", labels)
    healthy = gauge(
        "score_healthy_alert_minutes_per_day", "Minutes under an alert without a breach then or in time.", labels
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
