"""Which policy is best."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kavier_twin.forecast.result import Row, Verdict
from kavier_twin.forecast.slo import Metric
from kavier_twin.simulation.policies import Policy, apply_overrides, hypothetical_reasons, vllm_flags
from kavier_twin.simulation.settings import FleetSettings

# What a change must gain in latency to be worth the trouble: below that today's policy stays the best.
_NOTICEABLE_RATIO = 0.01


def best_policy(settings: FleetSettings, policies: Sequence[Policy], rows: Sequence[Row]) -> Verdict | None:
    """The policy with the fewest expected SLO breaches, then the lowest p95 end-to-end latency; the first among equals.

    Requests refused are worse than any latency: a policy that rejects more of them than today's is never best.
    `policies` are those that `rows` are about. None without today's policy, the one that overrides nothing.
    """
    today = next((policy for policy in policies if not policy.overrides), None)
    if today is None:
        return None
    allowed = _at_longest(rows, today.name, "rejected_requests")
    best = min(
        (policy for policy in policies if _at_longest(rows, policy.name, "rejected_requests") <= allowed),
        key=lambda policy: (_expected_breaches(rows, policy.name), _latency(rows, policy.name)),
    )
    as_safe = _expected_breaches(rows, best.name) == _expected_breaches(rows, today.name)
    if as_safe and _latency(rows, best.name) >= (1.0 - _NOTICEABLE_RATIO) * _latency(rows, today.name):
        best = today
    changed = apply_overrides(settings, best.overrides)
    return Verdict(
        policy=best.name,
        deployable=not hypothetical_reasons(settings, changed),
        vllm_flags=tuple(vllm_flags(settings, changed)),
        expected_breaches=_expected_breaches(rows, best.name),
        today_expected_breaches=_expected_breaches(rows, today.name),
        e2e_p95_seconds=_at_longest(rows, best.name, "e2e_p95_seconds"),
        today_e2e_p95_seconds=_at_longest(rows, today.name, "e2e_p95_seconds"),
        output_tokens_per_second=_at_longest(rows, best.name, "output_tokens_per_second"),
        today_output_tokens_per_second=_at_longest(rows, today.name, "output_tokens_per_second"),
    )


def _expected_breaches(rows: Sequence[Row], policy: str) -> float:
    probabilities = (sum(row.breach_probability.values()) for row in rows if row.policy == policy)
    return round(sum(probabilities), 9)  # thirds summed in another order are as many


def _at_longest(rows: Sequence[Row], policy: str, metric: Metric) -> float:
    """The median over futures at the longest horizon."""
    row = max((row for row in rows if row.policy == policy), key=lambda row: row.horizon_seconds)
    return row.kpis[metric].p50


def _latency(rows: Sequence[Row], policy: str) -> float:
    latency = _at_longest(rows, policy, "e2e_p95_seconds")
    return math.inf if math.isnan(latency) else latency
