"""How the sweep of policies went and what its verdict is worth, as metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from kavier_twin.serve.metrics.families import add, breach_flag, counter, gauge, policy_labels
from kavier_twin.serve.models import Best, Outlook, TwinView


def sweep_metrics(view: TwinView) -> Iterator[Metric]:
    """Of all cycles since the start and of the last forecast."""
    pool, counts, outlook = view.pool, view.sweeps, view.outlook
    yield counter(
        "forecast_late",
        "Forecast cycles that took longer than they come, since the start.",
        ["pool"],
        [([pool], counts.late)],
    )
    yield counter(
        "forecast_simulated_scenarios",
        "Scenarios that all forecast cycles simulated, since the start.",
        ["pool"],
        [([pool], counts.scenarios)],
    )
    yield counter(
        "forecast_shed",
        "Forecast cycles that had no time left for this policy, since the start.",
        ["pool", "policy"],
        [([pool, policy], count) for policy, count in sorted(counts.shed.items())],
    )
    yield counter(
        "forecast_stops",
        "Forecast cycles by why they simulated no more scenarios: certain (which policy is best), time (the cycle's "
        "budget ended), all_scenarios (as many as are set), since the start.",
        ["pool", "reason"],
        [([pool, reason], count) for reason, count in sorted(counts.stopped.items())],
    )
    if outlook is not None:
        yield from _breaches(pool, view.source, outlook)
        if outlook.best is not None:
            yield from _gains(pool, outlook.best)


def _breaches(pool: str, source: str, outlook: Outlook) -> Iterator[Metric]:
    bounds = gauge(
        "slo_breach_probability_bound_ratio",
        "Ends (low, high) of the 90 % credible interval of the SLO's breach probability, 0 to 1: few scenarios, wide "
        "interval.",
        ["pool", "policy", "in_force", "horizon", "slo", "trusted", "source", "bound"],
    )
    first = gauge(
        "time_to_breach_seconds",
        "Seconds from the forecast's start to the SLO's first breach over a window of the shortest horizon: in the "
        'median scenario (scenarios="median") and in the worst tenth of them ("worst"). No sample: none within the '
        "longest horizon.",
        ["pool", "policy", "in_force", "slo", "trusted", "source", "scenarios"],
    )
    odds = gauge(
        "slo_first_breach_probability_ratio",
        "Probability, 0 to 1, that the SLO is broken over any window as long as the shortest horizon before the "
        "longest one ends: the share of scenarios. Alerts follow it.",
        ["pool", "policy", "in_force", "slo", "trusted", "source"],
    )
    for policy in outlook.policies:
        for horizon in policy.horizons:
            for slo, ends in sorted(horizon.breach_interval.items()):
                about = [*policy_labels(pool, policy), f"{horizon.seconds:g}", slo, breach_flag(horizon, slo), source]
                for bound, value in zip(("low", "high"), ends, strict=True):
                    bounds.add_metric([*about, bound], value)
        for slo, times in sorted(policy.first_breach.items()):
            about = [*policy_labels(pool, policy), slo, breach_flag(policy.horizons[-1], slo), source]
            for quantile, seconds in sorted(times.items()):
                add(first, [*about, "median" if quantile == 0.5 else "worst"], seconds)
            odds.add_metric(about, policy.first_breach_probability[slo])
    yield from (bounds, first, odds)


def _gains(pool: str, best: Best) -> Iterator[Metric]:
    probability = gauge(
        "best_policy_gain_probability_ratio",
        'Probability, 0 to 1, that the best policy is truly better than today\'s: once in place (switch="no") and with '
        'the restart that brings it counted ("yes"). No sample where today\'s is best.',
        ["pool", "policy", "switch"],
    )
    saved = gauge(
        "best_policy_gain_ratio",
        "Share that the best policy saves of today's latency (e2e p95), cost or energy at the longest horizon; below "
        "0: it costs more.",
        ["pool", "policy", "objective", "switch"],
    )
    avoided = gauge(
        "best_policy_avoided_breaches",
        "Expected SLO breaches, summed over SLOs and horizons, that the best policy avoids.",
        ["pool", "policy", "switch"],
    )
    for switch, gain in (("no", best.gain), ("yes", best.switch_gain)):
        if gain is None:
            continue
        add(probability, [pool, best.policy, switch], gain.probability)
        for objective, value in gain.by_objective.items():
            if objective == "slo":
                avoided.add_metric([pool, best.policy, switch], value)
            else:
                saved.add_metric([pool, best.policy, objective, switch], value)
    yield from (probability, saved, avoided)
