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
        "Method that forecasts the arrival rate. Always 1.",
        labels=["pool"],
    )
    method.add_metric([pool], {"method": load.method})
    yield method
    errors = gauge(
        "load_forecast_error_ratio",
        "Mean absolute scaled error of each method over the last days. 1 is the error of repeating the last value.",
        ["pool", "method"],
    )
    for name, error in load.errors.items():
        if not math.isnan(error):  # not tried yet
            errors.add_metric([pool, name], error)
    yield errors
    rates = gauge(
        "load_forecast_requests_per_second",
        "Predicted mean arrival rate over the horizon, by method.",
        ["pool", "method", "horizon"],
    )
    ends = gauge(
        "load_forecast_end_requests_per_second",
        "Predicted percentiles of the arrival rate at the end of the horizon, by the method in use.",
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
        "Event time of the last fit, in Unix seconds for live sources.",
        pool,
        load.refitted_seconds,
    )
    yield pool_gauge(
        "load_forecast_dispersion_ratio",
        "Variance of the number of arrivals divided by its mean in the drawn scenarios. 1 is a Poisson "
        "process; bursty load has more.",
        pool,
        load.dispersion_ratio,
    )
