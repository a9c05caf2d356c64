"""The twin as Prometheus metrics, `kavier_twin_*`.

A collector renders the views that are current when Prometheus asks. What is not known has no sample. Latencies carry
their `statistic` (mean, p50, p90, p95, p99) over requests; predictions also a `quantile`: of the distribution over the
simulated scenarios, so the 0.1 and 0.9 of a p99 are the ends of its interval. They are summaries without count and sum.
`trusted` is "1" where the mirror has been right on that KPI lately (fidelity_metrics.py), `source` what it follows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import InfoMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kavier_twin import __version__
from kavier_twin.serve.metrics.cache import cache_metrics, prefix_cache_metrics
from kavier_twin.serve.metrics.calibration import calibration_metrics
from kavier_twin.serve.metrics.engines import engine_metrics
from kavier_twin.serve.metrics.families import PREFIX, add, breach_flag, counter, flag, gauge, policy_labels, pool_gauge
from kavier_twin.serve.metrics.fidelity import fidelity_metrics
from kavier_twin.serve.metrics.kernels import kernel_metrics
from kavier_twin.serve.metrics.load import load_metrics
from kavier_twin.serve.metrics.power import power_metrics
from kavier_twin.serve.metrics.score import score_metrics
from kavier_twin.serve.metrics.sweep import sweep_metrics
from kavier_twin.serve.metrics.unmodelled import unmodelled_metric
from kavier_twin.serve.models import Outlook, TwinView
from kavier_twin.simulation.kpi_table import GAUGES, KPIS, Kpi
from kavier_twin.simulation.replica_state import ReplicaState

_WINDOW: Final = "5m"  # over which KPIs are shown as mirrored and as observed


class TwinCollector(Collector):
    """Renders the current views of all pools at each scrape."""

    def __init__(self, current: Callable[[], Mapping[str, TwinView]]) -> None:
        self._current = current

    def describe(self) -> Iterator[Metric]:
        """Nothing: the names follow from the views."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All metrics of the current views, each once with the samples of all pools."""
        found: dict[str, Metric] = {}
        views = self._current()
        for view in views.values():
            for metric in _metrics(view):
                found.setdefault(metric.name, metric)
                if found[metric.name] is not metric:
                    found[metric.name].samples += metric.samples
        yield _build()
        yield from kernel_metrics(next(iter(views.values())).kernels)
        yield from (metric for metric in found.values() if metric.samples)


def registry_of(current: Callable[[], Mapping[str, TwinView]]) -> CollectorRegistry:
    """A registry of its own that serves the twin's metrics and those of its process."""
    registry = CollectorRegistry()
    registry.register(TwinCollector(current))
    ProcessCollector(registry=registry)
    return registry


def _build() -> Metric:
    build = InfoMetricFamily(f"{PREFIX}_build", "Version of the running twin. Always 1.")
    build.add_metric([], {"version": __version__})
    return build


def _metrics(view: TwinView) -> Iterator[Metric]:
    if view.currency:
        currency = InfoMetricFamily(f"{PREFIX}_cost", "Currency of costs (ISO 4217). Always 1.", labels=["pool"])
        currency.add_metric([view.pool], {"currency": view.currency})
        yield currency
    yield from engine_metrics(view.pool, view.engines)
    yield unmodelled_metric(view.pool, view.unmodelled)
    yield from _stream(view)
    yield from _mirror(view)
    yield from _fidelity(view)
    yield from calibration_metrics(view)
    yield from fidelity_metrics(view)
    yield from cache_metrics(view.pool, view.caches)
    yield from prefix_cache_metrics(view.pool, view.prefix_cache)
    yield from power_metrics(view.pool, view.power)
    yield from sweep_metrics(view)
    yield from _forecasts(view)
    yield from score_metrics(view.pool, view.scores)
    if view.outlook is not None:
        yield from _predictions(view.pool, view.source, view.outlook)
        if view.outlook.load is not None:
            yield from load_metrics(view.pool, view.outlook.load)


def _stream(view: TwinView) -> Iterator[Metric]:
    yield counter(
        "records",
        "Number of telemetry records by result: accepted, completed (replaced a less complete record of "
        "the same request), duplicate, late (older than mirror.late_seconds), future_time (far ahead of "
        "all other records), rejected (not a valid record).",
        ["pool", "result"],
        [([view.pool, result], count) for result, count in sorted(view.records.items())],
    )
    yield counter(
        "source_rejected",
        "Number of messages that could not be turned into records, by reason.",
        ["pool", "source", "reason"],
        [
            ([view.pool, source.name, reason], count)
            for source in view.sources
            for reason, count in sorted(source.rejected.items())
        ],
    )
    up = gauge(
        "source_up",
        "Whether the source is readable (1) or not (0). The status and the log give the reason.",
        labels=["pool", "source"],
    )
    yield pool_gauge(
        "stale",
        "Whether the pool's figures are stale (1) because a source has failed or lagged for longer than "
        "stale_after_seconds, or fresh (0). The status gives the reason.",
        view.pool,
        float(bool(view.stale)),
    )
    yield pool_gauge(
        "engine_contradictions",
        "Number of settings for which an engine reports another value than the settings file or another "
        "engine. The settings file takes precedence. The status lists the settings.",
        view.pool,
        view.engine_contradictions,
    )
    yield pool_gauge(
        "notes",
        "Number of notes in the pool's status, such as series that engines do not expose and features "
        "that are not modelled.",
        view.pool,
        len(view.notes),
    )
    newest = gauge(
        "source_last_record_timestamp_seconds",
        "Event time of the source's newest record, in Unix seconds for live sources.",
        labels=["pool", "source"],
    )
    for source in view.sources:
        add(up, [view.pool, source.name], 0.0 if source.trouble else 1.0)
        add(newest, [view.pool, source.name], source.last_record_seconds)
    yield from (up, newest)
    yield counter(
        "source_lost_records",
        "Number of records that were deleted from the source before the twin read them: expired "
        "(retention), truncated (log truncation).",
        ["pool", "source", "reason"],
        [
            ([view.pool, source.name, reason], count)
            for source in view.sources
            for reason, count in sorted(source.lost.items())
        ],
    )
    lag = gauge(
        "source_lag_records",
        "Number of records in the source that the twin has not read yet.",
        labels=["pool", "source"],
    )
    for source in view.sources:
        add(lag, [view.pool, source.name], source.lag_records)
    yield lag
    yield counter(
        "requests_dropped",
        "Number of requests that the mirror could not follow: unknown_request (finish record without an "
        "arrival record), never_finished (no finish record in time), ended_after_all (finish record "
        "arrived after never_finished), replica_restarted (the pod restarted before the request "
        "finished), not_simulated (lost in a restart or rejected in the simulation), too_many_pods "
        "(routed by the simulated router because no replica was free for the pod), refused (an error without a "
        "token within 5 s, so no engine held the request).",
        ["pool", "reason"],
        [([view.pool, reason], count) for reason, count in sorted(view.dropped.items())],
    )
    yield counter(
        "requests_finished",
        "Number of requests that the mirror has followed to their end.",
        ["pool"],
        [([view.pool], view.finished_requests)],
    )
    yield pool_gauge(
        "stream_lag_seconds",
        "Event time between the newest record and the mirror's state, in seconds.",
        view.pool,
        view.lag_seconds,
    )
    yield pool_gauge(
        "buffered_records", "Number of records received and not yet applied.", view.pool, view.buffered_records
    )
    if view.checkpoint_unix_seconds is not None:
        yield pool_gauge(
            "checkpoint_timestamp_seconds",
            "Unix time of the last successful checkpoint.",
            view.pool,
            view.checkpoint_unix_seconds,
        )
        yield counter(
            "checkpoint_failures",
            "Number of checkpoints that could not be written.",
            ["pool"],
            [([view.pool], view.checkpoint_failures)],
        )
    yield pool_gauge(
        "last_record_timestamp_seconds",
        "Unix time at which the newest record was received.",
        view.pool,
        view.last_record_unix_seconds,
    )


def _mirror(view: TwinView) -> Iterator[Metric]:
    yield pool_gauge(
        "mirror_event_seconds",
        "Event time of the mirror's state: Unix seconds for live sources, seconds since the start for a trace.",
        view.pool,
        view.event_seconds,
    )
    states = Counter(replica.state for replica in view.replicas)
    replicas = gauge("mirrored_replicas", "Number of mirrored replicas by state: ready, draining.", ["pool", "state"])
    for state in (ReplicaState.READY, ReplicaState.DRAINING):
        add(replicas, [view.pool, state], states[state])
    yield replicas
    for name, kpi in KPIS.items():
        if kpi.max_error is None:  # nothing observes it
            continue
        found = [("", entry.mirrored, entry.observed) for entry in view.gauges if entry.kpi == name]
        if name not in GAUGES:
            scores = (score for score in view.errors if (score.kpi, score.window) == (name, _WINDOW))
            found = [(score.statistic, score.predicted, score.observed) for score in scores]
        labels = ["pool", "statistic"] if kpi.statistics else ["pool"]
        when = "now" if name in GAUGES else "over the last five minutes of event time"
        families = [
            gauge(f"{side}_{name}", f"{kpi.help} {whose}, {when}.", labels=labels)
            for side, whose in (("mirrored", "As mirrored"), ("observed", "As observed"))
        ]
        for statistic, *values in found:
            for family, value in zip(families, values, strict=True):
                add(family, _labels(kpi, [view.pool], statistic), value)
        yield from families


def _fidelity(view: TwinView) -> Iterator[Metric]:
    yield pool_gauge(
        "calibrated",
        "Whether step times are fitted to this pool or configured (1), or taken from a default that must "
        "not be trusted (0).",
        view.pool,
        float(view.calibrated),
    )
    yield pool_gauge(
        "calibration_requests",
        "Number of finished requests that the current step times were fitted to.",
        view.pool,
        view.calibrated_on_requests if view.calibrated_on_requests else math.nan,
    )
    coefficients = gauge(
        "step_time_coefficient_seconds",
        "Step-time coefficients in use, in seconds per step, token or sequence.",
        labels=["pool", "coefficient"],
    )
    for name, value in view.step_time.items():
        add(coefficients, [view.pool, name], value)
    yield coefficients
    yield pool_gauge(
        "frontend_seconds",
        "Fitted constant share of the time to first token that is spent outside the engine, in seconds.",
        view.pool,
        view.frontend_seconds,
    )
    yield pool_gauge(
        "step_time_scale_ratio",
        "Observed duration of an engine step divided by its modelled duration, over the last seconds of event time.",
        view.pool,
        view.step_time_scale_ratio,
    )
    yield pool_gauge(
        "stream_coverage_ratio",
        "Share of the requests received by the engines, according to their counters, that request records told of: "
        "over a minute of event time that ended a minute ago.",
        view.pool,
        view.stream_coverage_ratio,
    )
    yield pool_gauge(
        "fidelity_exact_cache_ratio",
        "Share of requests whose prefix-cache hit the mirror predicted to the token, over the last hour of event time.",
        view.pool,
        view.exact_cache_ratio,
    )


def _forecasts(view: TwinView) -> Iterator[Metric]:
    yield counter(
        "forecasts",
        "Number of forecast cycles by result.",
        ["pool", "result"],
        [([view.pool, result], count) for result, count in sorted(view.forecasts.items())],
    )
    if view.outlook is None:
        return
    outlook = view.outlook
    yield pool_gauge(
        "forecast_duration_seconds",
        "Duration of the last forecast over all policies, in seconds.",
        view.pool,
        outlook.duration_seconds,
    )
    yield pool_gauge(
        "forecast_timestamp_seconds",
        "Unix time of the last forecast.",
        view.pool,
        outlook.made_unix_seconds,
    )
    yield pool_gauge(
        "forecast_event_seconds",
        "Event time at which the last forecast starts. Horizons count from this time.",
        view.pool,
        outlook.event_seconds,
    )
    yield pool_gauge(
        "forecast_scenarios",
        "Number of scenarios that the last forecast simulated for each policy.",
        view.pool,
        outlook.scenarios,
    )
    yield pool_gauge(
        "forecast_arrivals_per_second",
        "Mean arrival rate of the last forecast over its longest horizon, in requests per second.",
        view.pool,
        outlook.rate_per_second,
    )


def _predictions(pool: str, source: str, outlook: Outlook) -> Iterator[Metric]:
    for name, kpi in KPIS.items():
        labels = ["pool", "policy", "in_force", "horizon", "trusted", "source"]
        labels += ["statistic"] if kpi.statistics else []
        family = SummaryMetricFamily(
            f"{PREFIX}_predicted_{name}",
            f"{kpi.help} Predicted from the start of the forecast to the horizon (seconds); quantiles are over the "
            "simulated scenarios.",
            labels=labels,
        )
        for policy in outlook.policies:
            for horizon in policy.horizons:
                for entry in horizon.predicted:
                    if entry.kpi != name:
                        continue
                    about = [*policy_labels(pool, policy), f"{horizon.seconds:g}", flag(entry.trusted), source]
                    values = _labels(kpi, about, entry.statistic)
                    for quantile, value in sorted(entry.quantiles.items()):
                        if math.isfinite(value):
                            named = {**dict(zip(labels, values, strict=True)), "quantile": f"{quantile:g}"}
                            family.add_sample(family.name, named, value)
        yield family
    breach = gauge(
        "slo_breach_probability_ratio",
        "Probability, 0 to 1, that the SLO is violated within the horizon (seconds), from the simulated "
        "scenarios and corrected by the errors of earlier forecasts.",
        labels=["pool", "policy", "in_force", "horizon", "slo", "trusted", "source"],
    )
    best = gauge(
        "best_policy",
        "Whether this policy is the best of the last forecast over all horizons (1) or not (0).",
        labels=["pool", "policy"],
    )
    info = InfoMetricFamily(
        f"{PREFIX}_policy",
        "Policy of the last forecast, with the `vllm serve` flags that deploy it. Always 1.",
        labels=["pool", "policy", "in_force"],
    )
    for policy in outlook.policies:
        info.add_metric(
            policy_labels(pool, policy),
            {"flags": " ".join(policy.flags), "deployable": "true" if policy.deployable else "false"},
        )
        for horizon in policy.horizons:
            for slo, probability in sorted(horizon.breach.items()):
                about = [*policy_labels(pool, policy), f"{horizon.seconds:g}", slo, breach_flag(horizon, slo), source]
                add(breach, about, probability)
        if outlook.best is not None:
            add(best, [pool, policy.name], float(outlook.best.policy == policy.name))
    yield breach
    yield best
    yield info


def _labels(kpi: Kpi, values: list[str], statistic: str) -> list[str]:
    return [*values, statistic] if kpi.statistics else values
