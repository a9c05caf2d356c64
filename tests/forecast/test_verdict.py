from __future__ import annotations

import math

from forecast.streams import fleet_settings
from kavier_twin.forecast.result import Quantiles, Row, Verdict
from kavier_twin.forecast.slo import METRICS
from kavier_twin.forecast.verdict import best_policy
from kavier_twin.simulation.policies import Policy

TODAY = Policy(name="today")
SMALLER = Policy(name="smaller", overrides={"max_num_seqs": 8, "prefix_caching": False})
ROUTED = Policy(name="routed", overrides={"router": "round_robin"})


def rows(policy: Policy, breaches: list[float], latency: float, rejected: float = 0.0) -> list[Row]:
    """One row a horizon; latency and refusals are those of the longest."""
    found = []
    for number, breach in enumerate(breaches):
        values = dict.fromkeys(METRICS, Quantiles(1.0, 1.0, 1.0))
        if number == len(breaches) - 1:
            values |= {"e2e_p95_seconds": Quantiles(0.0, latency, 0.0)}
            values |= {"rejected_requests": Quantiles(0.0, rejected, 0.0)}
        found.append(Row(policy.name, 60.0 * (number + 1), values, {"a": breach, "b": 0.0}))
    return found


def verdict(*entries: tuple[Policy, list[Row]]) -> Verdict:
    policies = [policy for policy, _ in entries]
    found = best_policy(fleet_settings(), policies, [row for _, of_policy in entries for row in of_policy])
    assert found is not None
    return found


def test_fewest_breaches_over_all_horizons_come_first() -> None:
    found = verdict(
        (TODAY, rows(TODAY, [0.5, 0.25], 3.0)),
        (SMALLER, rows(SMALLER, [0.0, 0.5], 9.0)),
        (ROUTED, rows(ROUTED, [0.5, 0.5], 1.0)),
    )
    assert found.policy == "smaller"
    assert found.deployable
    assert found.vllm_flags == ("--max-num-seqs 8", "--no-enable-prefix-caching")
    assert (found.expected_breaches, found.today_expected_breaches) == (0.5, 0.75)
    assert (found.e2e_p95_seconds, found.today_e2e_p95_seconds) == (9.0, 3.0)


def test_then_the_lowest_latency() -> None:
    found = verdict((TODAY, rows(TODAY, [0.5], 3.0)), (ROUTED, rows(ROUTED, [0.5], 2.0)))
    assert found.policy == "routed"
    assert not found.deployable  # no flag of `vllm serve` changes the router
    assert found.vllm_flags == ()


def test_a_change_must_be_worth_it() -> None:
    found = verdict((SMALLER, rows(SMALLER, [0.5], 2.99)), (TODAY, rows(TODAY, [0.5], 3.0)))
    assert found.policy == "today"
    assert found.vllm_flags == ()


def test_as_many_breaches_summed_otherwise_are_as_many() -> None:
    found = verdict((SMALLER, rows(SMALLER, [0.3, 0.0], 2.99)), (TODAY, rows(TODAY, [0.1, 0.2], 3.0)))
    assert found.policy == "today"


def test_refusing_requests_is_no_way_to_be_fast() -> None:
    found = verdict((TODAY, rows(TODAY, [1.0], 30.0)), (SMALLER, rows(SMALLER, [0.0], 1.0, rejected=3.0)))
    assert found.policy == "today"


def test_nothing_observed_is_no_gain() -> None:
    found = verdict((TODAY, rows(TODAY, [0.0], math.nan)), (SMALLER, rows(SMALLER, [0.0], math.nan)))
    assert found.policy == "today"


def test_without_today_there_is_nothing_to_compare_with() -> None:
    assert best_policy(fleet_settings(), [SMALLER], rows(SMALLER, [0.0], 1.0)) is None
