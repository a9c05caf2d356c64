"""How the sweep of policies went and what its verdict is worth, as metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from kavier_twin.serve.fidelity_metrics import flag
from kavier_twin.serve.view import Best, Horizon, Outlook, TwinView

_PREFIX: Final = "kavier_twin"


def sweep_metrics(view: TwinView) -> Iterator[Metric]:
    """Of all cycles since the start and of the last forecast."""
    pool, counts, outlook = view.pool, view.sweeps, view.outlook
    yield _counter("forecast_late", "Forecast cycles that took longer than they come.", pool, {"": counts.late})
    yield _counter(
        "forecast_simulated_futures", "Futures that all forecast cycles simulated.", pool, {"": counts.futures}
    )
    yield _counter(
        "forecast_shed", "Forecast cycles that had no time left for this policy.", pool, counts.shed, "policy"
    )
    yield _counter(
        "forecast_stops",
        "Forecast cycles by why they simulated no more futures: certain (which policy is best), time (the cycle's "
        "budget ended), all_futures (as many as are set).",
        pool,
        counts.stopped,
        "reason",
    )
    if outlook is not None:
        yield from _breaches(pool, view.source, outlook)
        if outlook.best is not None:
            yield from _gains(pool, outlook.best)


def _breaches(pool: str, source: str, outlook: Outlook) -> Iterator[Metric]:
    bounds = GaugeMetricFamily(
        f"{_PREFIX}_slo_breach_probability_bound_ratio",
        "Ends (low, high) of the 90 % credible interval of the SLO's breach probability, 0 to 1: few futures, wide "
        "interval.",
        labels=["pool", "policy", "horizon", "slo", "trusted", "source", "bound"],
    )
    first = GaugeMetricFamily(
        f"{_PREFIX}_time_to_breach_seconds",
        "Seconds from the forecast's start to the SLO's first breach over a window of the shortest horizon: in the "
        'median future (futures="median") and in the worst tenth of them ("worst"). No sample: none within the longest '
        "horizon.",
        labels=["pool", "policy", "slo", "trusted", "source", "futures"],
    )
    for policy in outlook.policies:
        for horizon in policy.horizons:
            for slo, ends in sorted(horizon.breach_interval.items()):
                about = [pool, policy.name, f"{horizon.seconds:g}", slo, _trusted(horizon, slo), source]
                for bound, value in zip(("low", "high"), ends, strict=True):
                    bounds.add_metric([*about, bound], value)
        for slo, times in sorted(policy.first_breach.items()):
            about = [pool, policy.name, slo, _trusted(policy.horizons[-1], slo), source]
            for quantile, seconds in sorted(times.items()):
                if math.isfinite(seconds):
                    first.add_metric([*about, "median" if quantile == 0.5 else "worst"], seconds)
    yield from (bounds, first)


def _trusted(horizon: Horizon, slo: str) -> str:
    return flag(horizon.breach_trusted.get(slo, False))


def _gains(pool: str, best: Best) -> Iterator[Metric]:
    probability = GaugeMetricFamily(
        f"{_PREFIX}_best_policy_gain_probability_ratio",
        'Probability, 0 to 1, that the best policy is truly better than today\'s: once in place (switch="no") and with '
        'the restart that brings it counted ("yes"). No sample where today\'s is best.',
        labels=["pool", "policy", "switch"],
    )
    saved = GaugeMetricFamily(
        f"{_PREFIX}_best_policy_gain_ratio",
        "Share that the best policy saves of today's latency (e2e p95), cost or energy at the longest horizon; below "
        "0: it costs more.",
        labels=["pool", "policy", "objective", "switch"],
    )
    avoided = GaugeMetricFamily(
        f"{_PREFIX}_best_policy_avoided_breaches",
        "Expected SLO breaches, summed over SLOs and horizons, that the best policy avoids.",
        labels=["pool", "policy", "switch"],
    )
    for switch, gain in (("no", best.gain), ("yes", best.switch_gain)):
        if gain is None:
            continue
        if math.isfinite(gain.probability):
            probability.add_metric([pool, best.policy, switch], gain.probability)
        for objective, value in gain.by_objective.items():
            if objective == "slo":
                avoided.add_metric([pool, best.policy, switch], value)
            else:
                saved.add_metric([pool, best.policy, objective, switch], value)
    yield from (probability, saved, avoided)


def _counter(name: str, says: str, pool: str, values: Mapping[str, int], label: str = "") -> Metric:
    family = CounterMetricFamily(
        f"{_PREFIX}_{name}", f"{says[:-1]}, since the start.", labels=["pool", *([label] if label else [])]
    )
    for key, value in sorted(values.items()):
        family.add_metric([pool, *([key] if label else [])], value)
    return family
