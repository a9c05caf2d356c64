from __future__ import annotations

import math

import numpy as np
import pytest

from forecast.streams import fleet_settings
from kavier_twin.forecast.settings import Objective
from kavier_twin.forecast.slo import Slo
from kavier_twin.forecast.sweep import row_of
from kavier_twin.forecast.verdict import Floats, Ranking, verdict
from kavier_twin.simulation.kpi_table import METRICS
from kavier_twin.simulation.policies import Policy

SMALLER = Policy(name="smaller", overrides={"max_num_seqs": 8, "prefix_caching": False})

HORIZONS = 2
SLOS = (Slo(name="e2e", metric="e2e_p95_seconds", threshold=10.0),)


def seen(latency: list[float], cost: float = 1.0, rejected: float = 0.0) -> Floats:
    """One scenario for each latency; it is the same at both horizons."""
    values = np.ones((len(latency), HORIZONS, len(METRICS)))
    values[..., METRICS.index("e2e_p95_seconds")] = np.array(latency)[:, None]
    values[..., METRICS.index("cost_per_million_tokens")] = cost
    values[..., METRICS.index("requests_rejected")] = rejected
    return values


def ranking(*objectives: Objective, **table: Floats) -> Ranking:
    return Ranking(table, "today", SLOS, objectives or ("slo", "latency"))


def test_fewest_breaches_over_all_horizons_come_first() -> None:
    found = ranking(today=seen([11.0, 2.0]), safe=seen([9.0, 9.0]), fast=seen([11.0, 1.0]))
    assert found.best == "safe"
    gain = found.gain("safe")
    assert gain.by_objective["slo"] == 1.0  # in one of two scenarios, at two horizons
    assert gain.decided_by == "slo"


def test_then_the_next_objective() -> None:
    table = {"today": seen([3.0, 3.0]), "fast": seen([2.0, 2.0], cost=2.0), "cheap": seen([4.0, 4.0], cost=0.5)}
    assert ranking("slo", "latency", **table).best == "fast"
    assert ranking("slo", "cost", **table).best == "cheap"
    assert ranking("slo", "cost", **table).gain("cheap").by_objective == {"slo": 0.0, "cost": pytest.approx(0.5)}
    assert ranking("cost", "latency", **table).gain("fast").by_objective["cost"] == pytest.approx(-1.0)


def test_a_change_must_be_worth_it() -> None:
    assert ranking(today=seen([3.0, 3.0]), slightly=seen([2.99, 2.99])).best == "today"
    assert math.isnan(ranking(today=seen([3.0]), slightly=seen([2.99])).gain("today").probability)


def test_refusing_requests_is_no_way_to_be_fast() -> None:
    assert ranking(today=seen([30.0]), refusing=seen([1.0], rejected=3.0)).best == "today"


def test_nothing_observed_is_no_gain() -> None:
    assert ranking(today=seen([math.nan]), other=seen([math.nan])).best == "today"


def test_more_scenarios_and_clearer_differences_make_it_surer() -> None:
    """What scenarios have in common does not blur a paired difference."""
    load = [1.0, 2.0, 4.0, 8.0]
    clear = ranking(today=seen(load), other=seen([0.9 * time for time in load])).gain("other")
    noisy = ranking(today=seen(load), other=seen([0.5, 2.2, 2.0, 8.8])).gain("other")
    few = ranking(today=seen(load[:2]), other=seen([0.9, 1.8])).gain("other")
    assert clear.probability > few.probability > 0.5
    assert clear.probability > noisy.probability > 0.5


def test_certain_only_where_no_other_may_be_noticeably_better() -> None:
    load = np.array([1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
    jitter = 1.0 + 0.001 * np.array([1.0, -1.0, 2.0, -2.0, 1.0, -1.0])
    assert ranking(today=seen([*load]), other=seen([*(0.8 * load * jitter)])).certain(0.95)
    assert ranking(today=seen([*load]), same=seen([*load])).certain(0.95)
    assert not ranking(today=seen([*load]), other=seen([*load[::-1]])).certain(0.95)
    assert not ranking(today=seen([1.0, 2.0]), other=seen([0.6, 1.9])).certain(0.95)


def test_the_flags_of_the_best() -> None:
    table = {"today": seen([3.0]), "smaller": seen([1.0])}
    rows = [row_of(name, 60.0, kpis[:, -1], SLOS, (0.5,)) for name, kpis in table.items()]
    found = verdict(fleet_settings(), SMALLER, "today", ranking(**table), rows)
    assert (found.policy, found.deployable) == ("smaller", True)
    assert found.vllm_flags == ("--max-num-seqs 8", "--no-enable-prefix-caching")
    assert (found.e2e_p95_seconds, found.today_e2e_p95_seconds) == (1.0, 3.0)
