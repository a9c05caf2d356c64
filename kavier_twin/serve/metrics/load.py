"""The load to come as Prometheus metrics, `kavier_twin_load_forecast_*`: every method beside the one in use."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client.core import InfoMetricFamily
from prometheus_client.metrics_core import Metric

from kavier_twin.forecast.load import LoadOutlook
from kavier_twin.serve.metrics.families import PREFIX, gauge, pool_gauge


def load_metrics(pool: str, load: LoadOutlook) -> Iterator[Metric]:
    """The forecast of one pool's arrivals."""
    method = InfoMetricFamily(
        f"{PREFIX}_load_forecast_method",
        "The method in use to forecast the arrival rate. Always 1.",
        labels=["pool"],
    )
    method.add_metric([pool], {"method": load.method})
    yield method
    errors = gauge(
        "load_forecast_error_ratio",
        "Mean absolute scaled error of each method over the last days; 1 is as bad as the last value taken for the "
        "next.",
        ["pool", "method"],
    )
    for name, error in load.errors.items():
        if not math.isnan(error):  # not tried yet
            errors.add_metric([pool, name], error)
    yield errors
    rates = gauge(
        "load_forecast_requests_per_second",
        "Mean arrival rate over the horizon as each method foresees it.",
        ["pool", "method", "horizon"],
    )
    ends = gauge(
        "load_forecast_end_requests_per_second",
        "Percentiles of the arrival rate at the horizon's end as the method in use foresees it.",
        ["pool", "percentile", "horizon"],
    )
    for ahead in load.ahead:
        horizon = f"{ahead.horizon_seconds:g}"
        for name, rate in ahead.by_method.items():
            rates.add_metric([pool, name, horizon], rate)
        ends.add_metric([pool, "10", horizon], ahead.p10)
        ends.add_metric([pool, "90", horizon], ahead.p90)
    yield rates
    yield ends
    yield pool_gauge(
        "load_forecast_refitted_event_seconds",
        "Event time of the last fit.",
        pool,
        load.refitted_seconds,
    )
    yield pool_gauge(
        "load_forecast_dispersion_ratio",
        "Variance of the number of arrivals over its mean, as scenarios are drawn: 1 is Poisson, more is bursty.",
        pool,
        load.dispersion_ratio,
    )
