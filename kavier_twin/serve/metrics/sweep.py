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
        "Number of forecast cycles that took longer than forecast.every_seconds.",
        ["pool"],
        [([pool], counts.late)],
    )
    yield counter(
        "forecast_simulated_scenarios",
        "Number of scenarios simulated.",
        ["pool"],
        [([pool], counts.scenarios)],
    )
    yield counter(
        "forecast_shed",
        "Number of forecast cycles that had no time left for this policy.",
        ["pool", "policy"],
        [([pool, policy], count) for policy, count in sorted(counts.shed.items())],
    )
    yield counter(
        "forecast_stops",
        "Number of forecast cycles by the reason for which they stopped simulating: certain (the best "
        "policy is certain), time (the time budget was used up), all_scenarios (all configured scenarios "
        "were simulated).",
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
        "Bounds (low, high) of the 90 % credible interval of the probability that the SLO is violated "
        "within the horizon. The interval narrows with the number of scenarios.",
        ["pool", "policy", "in_force", "horizon", "slo", "trusted", "source", "bound"],
    )
    first = gauge(
        "time_to_breach_seconds",
        "Time from the start of the forecast to the first violation of the SLO, measured over windows as "
        'long as the shortest horizon, in seconds: in the median scenario (scenarios="median") and in '
        'the worst 10 % of scenarios ("worst"). No sample if there is no violation within the longest '
        "horizon.",
        ["pool", "policy", "in_force", "slo", "trusted", "source", "scenarios"],
    )
    probability = gauge(
        "slo_first_breach_probability_ratio",
        "Share of scenarios in which the SLO is violated over any window as long as the shortest "
        "horizon, before the longest horizon ends. Alerts use this probability.",
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
            probability.add_metric(about, policy.first_breach_probability[slo])
    yield from (bounds, first, probability)


def _gains(pool: str, best: Best) -> Iterator[Metric]:
    probability = gauge(
        "best_policy_gain_probability_ratio",
        "Probability, 0 to 1, that the best policy is better than the current one: after the switch "
        '(switch="no") and including the cost of the restart (switch="yes"). No sample if the current '
        "policy is the best.",
        ["pool", "policy", "switch"],
    )
    saved = gauge(
        "best_policy_gain_ratio",
        "Relative saving of the best policy in latency (e2e p95), cost or energy at the longest horizon, "
        "against the current policy. Negative if it is worse.",
        ["pool", "policy", "objective", "switch"],
    )
    avoided = gauge(
        "best_policy_avoided_breaches",
        "Expected number of SLO violations that the best policy avoids, summed over SLOs and horizons.",
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
