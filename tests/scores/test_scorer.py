"""Forecasts judged: reality's KPIs, errors, coverage, breach probability, alerts, and intervals that learn to cover."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecast.forecasts import forecast_of, row
from kavier_twin.forecast.result import Forecast, Quantiles, Row
from kavier_twin.forecast.slo import Slo
from kavier_twin.forecast.statistics import share_interval
from kavier_twin.scores.alerts import ALERT_PROBABILITY, HOLD_SECONDS, standing
from kavier_twin.scores.conformal import Widening
from kavier_twin.scores.correction import Correction
from kavier_twin.scores.observed import Outcome, Reality
from kavier_twin.scores.scorer import (
    SETTLE_SECONDS,
    Moment,
    ScoredBreach,
    ScoredKpi,
    Scorer,
    Settled,
    alert_score,
    breach_score,
)
from kavier_twin.simulation.kpi_table import Metric

SLOW = Slo(name="slow", metric="e2e_p95_seconds", threshold=2.0)


def reality(e2e: dict[float, float]) -> Reality:
    """Requests by their arrivals, each of 100 prompt and 11 output tokens, 50 cached, TTFT a tenth of the e2e time."""
    found = Reality()
    for number, (arrival, seconds) in enumerate(e2e.items()):
        found.arrive(str(number), arrival)
        found.end(str(number), Outcome(arrival, math.nan, arrival + 0.1 * seconds, arrival + seconds, 100, 11, 50))
        found.until_seconds = arrival + seconds
    return found


def forecast(time: float, median: float, probability: float = 0.0) -> Forecast:
    today = row("today", 60.0, {0.05: median - 0.5, 0.5: median, 0.95: median + 0.5}, probability)
    return forecast_of(time, today, row("other", 60.0, {0.5: 9.0}, 1.0))


def test_reality_is_measured_where_intervals_end() -> None:
    found = reality({0.0: 1.0, 5.0: 10.0, 12.0: 2.0, 19.0: 4.0})
    kpis = found.measure(10.0, 20.0)
    assert kpis["requests_per_second"] == pytest.approx(0.2)  # those that ended at 14 and 15
    assert kpis["ttft_p50_seconds"] == pytest.approx(np.median([0.2, 0.4]))  # first tokens at 12.2 and 19.4
    assert kpis["prefix_cache_hit_ratio"] == 0.5
    assert kpis["e2e_p95_seconds"] == pytest.approx(np.quantile([10.0, 2.0], 0.95))  # the one under way is 1 s old
    # 11 tokens each from first to last: 5 of 9 seconds (6 to 15), all (12.2 to 14), 0.6 of 3.6 s (19.4 to 23).
    assert kpis["output_tokens_per_second"] == pytest.approx(1.1 * (5 / 9 + 1.0 + 0.6 / 3.6))
    assert "queue_p95_seconds" not in kpis  # nothing tells it


def test_what_is_under_way_counts_with_its_age() -> None:
    found = reality({0.0: 1.0})
    found.arrive("waits", 0.5)
    assert not found.complete(1.0)
    assert found.measure(0.0, 100.0)["e2e_p95_seconds"] > 90.0
    found.end("waits", Outcome(0.5, math.nan, math.nan, 101.0, 10, 1, math.nan))
    assert found.complete(1.0)
    assert not found.complete(1.5)  # what happened then is not known yet


def test_a_request_given_up_counts_in_rates_and_in_no_latency() -> None:
    """Until its end is told after all."""
    found = reality({float(t): 1.0 for t in range(20)})
    found.arrive("lost", 5.0)
    found.give_up("lost", Outcome(5.0, 5.0, 6.0, 15.0, 100, 90, math.nan))
    assert found.complete(20.0)
    assert not found.complete(20.0, patience_seconds=120.0)  # a record may still come
    kpis, without = found.measure(0.0, 20.0), reality({float(t): 1.0 for t in range(20)}).measure(0.0, 20.0)
    assert kpis["requests_per_second"] == pytest.approx(without["requests_per_second"] + 1 / 20)
    assert kpis["output_tokens_per_second"] == pytest.approx(without["output_tokens_per_second"] + 90 / 20)
    assert kpis["e2e_p95_seconds"] == without["e2e_p95_seconds"]
    assert kpis["ttft_p99_seconds"] == without["ttft_p99_seconds"]
    found.end("lost", Outcome(5.0, math.nan, 5.1, 6.0, 100, 11, 50))
    assert found.complete(20.0, patience_seconds=120.0)
    after = found.measure(0.0, 20.0)
    assert after["output_tokens_per_second"] == pytest.approx(without["output_tokens_per_second"] + 11 / 20)
    assert after["requests_per_second"] == kpis["requests_per_second"]


def test_reality_forgets() -> None:
    found = reality({float(time): 1.0 for time in range(100)})
    found.arrive("lost", 5.0)
    found.give_up("lost", Outcome(5.0, 5.0, 6.0, 15.0, 100, 90, math.nan))
    found.forget(90.0)
    assert found.requests == 11
    assert found.since_seconds == 90.0
    assert found.measure(0.0, 20.0)["requests_per_second"] == 0.0


def test_reality_with_queue_times() -> None:
    found = Reality()
    found.end("a", Outcome(0.0, 2.0, 3.0, 8.0, 10.0, 5.0, 0.0))
    found.end("b", Outcome(1.0, 4.0, 5.0, 6.0, 10.0, 5.0, 0.0))
    kpis = found.measure(0.0, 10.0)
    assert kpis["requests_running"] == pytest.approx((6.0 + 2.0) / 10.0)
    assert kpis["requests_waiting"] == pytest.approx((2.0 + 3.0) / 10.0)


def test_a_forecast_is_judged_when_its_time_has_come() -> None:
    scorer = Scorer([SLOW])
    scorer.reality = reality({float(t): 1.0 if t < 200 else 3.0 for t in range(0, 400)})
    scorer.foresee(forecast(200.0, 3.2, 0.8), "today")
    assert scorer.settle(259.0).kpis == []
    assert scorer.scores().pending == 1
    (kpi,) = scorer.settle(260.0).kpis
    assert (kpi.median, kpi.observed, kpi.persisted) == (3.2, 3.0, 1.0)
    scores = scorer.scores()
    (score,) = scores.kpis
    assert score.error == pytest.approx(0.2)
    assert score.error_to_persistence_ratio == pytest.approx(0.1)
    assert score.coverage_ratio == 1.0
    (breach,) = scores.breaches
    assert breach.simulated_brier == pytest.approx(0.04)  # of the share of scenarios
    assert breach.brier < 0.04  # the interval says more: 2.7 to 3.7, where 2 is the threshold
    assert breach.persistence_brier == 1.0  # it was not broken then
    assert scores.pending == 0


def test_a_forecast_waits_for_requests_under_way_but_not_for_ever() -> None:
    scorer = Scorer([SLOW])
    scorer.reality = reality({float(t): 1.0 for t in range(0, 400)})
    scorer.reality.arrive("late", 210.0)
    scorer.foresee(forecast(200.0, 1.0), "today")
    assert scorer.settle(261.0).kpis == []
    assert len(scorer.settle(260.0 + SETTLE_SECONDS).kpis) == 1


def test_a_forecast_from_before_the_twin_was_there_is_not_judged() -> None:
    scorer = Scorer([SLOW])
    scorer.reality = reality({300.0: 1.0})
    scorer.foresee(forecast(200.0, 1.0), "today")
    assert scorer.settle(1e3).kpis == []
    assert scorer.scores().unscored == {"interrupted": 1}


def test_one_forecast_a_moment() -> None:
    scorer = Scorer([SLOW])
    for _ in range(3):
        scorer.foresee(forecast(200.0, 1.0), "today")
    assert scorer.scores().pending == 1


def test_alerts_are_judged_by_the_probability_of_a_first_breach() -> None:
    """A breach at the end of a horizon may leave the KPI over all of it within its bound."""
    scorer = Scorer([SLOW])
    scorer.reality = reality({float(t): 1.0 if t < 600 else 3.0 for t in range(0, 700)})
    for minute in range(5, 11):
        early = minute >= 6
        held = row("today", 60.0, {0.05: 0.5, 0.5: 1.0, 0.95: 1.5}, 0.0)
        scorer.foresee(forecast_of(60.0 * minute, held, first_breach=0.4 if early else 0.1), "today")
    scorer.foresee(forecast_of(660.0, held, first_breach=1.0), "today")
    scorer.settle(700.0 + SETTLE_SECONDS)
    (alerts,) = scorer.scores().alerts
    assert (alerts.breaches, alerts.recall, alerts.lead_seconds) == (1, 1.0, (240.0,))


def moments(breached: str, alert: str) -> list[Moment]:
    """One a minute: x marks a broken objective, and an alert."""
    return [
        Moment(60.0 * place, "slow", 0.9 if alert[place] == "x" else 0.1, state == "x")
        for place, state in enumerate(breached)
    ]


@pytest.mark.parametrize(
    ("breached", "alert", "precision", "recall", "leads"),
    [
        # one forecast says nothing, the second in a row starts the alert; it is held
        ("......xxxx......", "..xx............", 1.0, 1.0, (180.0,)),
        ("......xxxx......", "...x.x..........", np.nan, 0.0, ()),
        # a gap of one forecast ends neither
        ("......xx.xx.....", ".xx.xxxxxxx.....", 1.0, 1.0, (240.0,)),
        # a breach that nothing told of, and an alert that came with it
        ("......xxxx......", "......xxxx......", np.nan, 0.0, ()),
        # a false alert, over ten minutes later, before the next breach comes
        (".................xxx", ".xx...........xx....", 0.5, 1.0, (120.0,)),
        # an alert that stands on after a breach tells of the next from there
        ("..xx.....xx.........", "...xxxxxxx..........", 1.0, 0.5, (300.0,)),
        # an alert whose breach may still come is not judged
        (".........", ".......xx", np.nan, np.nan, ()),
        # what was broken from the start has no before
        ("xx...........", ".............", np.nan, np.nan, ()),
    ],
)
def test_alerts(breached: str, alert: str, precision: float, recall: float, leads: tuple[float, ...]) -> None:
    score = alert_score(moments(breached, alert), horizon_seconds=300.0)
    assert score.precision == pytest.approx(precision, nan_ok=True)
    assert score.recall == pytest.approx(recall, nan_ok=True)
    assert len(score.most_lead_seconds) == len(leads)
    assert all(most >= lead for most, lead in zip(score.most_lead_seconds, leads, strict=True))
    assert score.lead_seconds == leads


def test_what_alerts_cost_a_day() -> None:
    """Half a day: a breach at noon with an alert before it, and a false alert of ten minutes."""
    breached, alert = ["."] * 720, ["."] * 720
    breached[600:630] = "x" * 30
    alert[595:600] = "x" * 5
    alert[100:102] = "xx"
    score = alert_score(moments("".join(breached), "".join(alert)), horizon_seconds=300.0)
    days = 719 / 1_440
    assert score.alerts_per_day == pytest.approx(2 / days)
    assert score.false_alerts_per_day == pytest.approx(1 / days)
    assert score.healthy_alert_minutes_per_day == pytest.approx(HOLD_SECONDS / 60.0 / days)


@given(st.lists(st.floats(0.0, 1.0), max_size=60))
def test_an_alert_needs_two_forecasts_and_lasts_as_long_as_it_is_held(probabilities: list[float]) -> None:
    times = [60.0 * place for place in range(len(probabilities))]
    stands = standing(times, probabilities)
    high = [probability >= ALERT_PROBABILITY for probability in probabilities]
    starts = [place for place in range(1, len(high)) if high[place] and high[place - 1]]
    assert stands == [any(0.0 <= time - times[start] < HOLD_SECONDS for start in starts) for time in times]


@given(
    metric=st.sampled_from(["prefix_cache_hit_ratio", "kv_cache_usage_ratio"]),
    median=st.floats(0.0, 1.0),
    observed=st.floats(0.0, 1.0),
)
@settings(deadline=None)
def test_no_ratio_is_served_above_one(metric: Metric, median: float, observed: float) -> None:
    """However far intervals are widened and medians moved."""
    scorer = Scorer([])
    quantiles = Quantiles({0.05: 0.8 * median, 0.5: median, 0.95: min(1.0, 1.2 * median)})
    for number in range(30):
        ends = [median] * 5
        scored = ScoredKpi(60.0 * number, 60.0, metric, *ends, 0.5, observed, median, 0.5)
        scorer.remember(Settled([scored], [], []))
    told = dataclasses.replace(forecast(2_000.0, 1.0), rows=(Row("today", 60.0, {metric: quantiles}, {}, {}, 8),))
    shown = scorer.foresee(told, "today")
    (last,) = scorer.scores().intervals
    for value in (last.wide_low, last.served, last.wide_high, *shown.rows[0].kpis[metric].values.values()):
        assert 0.0 <= value <= 1.0


@pytest.mark.parametrize(("judged", "scored"), [(5, 5), (None, 3_000)])
def test_scores_are_of_as_many_forecasts_as_asked(judged: int | None, scored: int) -> None:
    scorer = Scorer([SLOW], judged)
    rows = [ScoredBreach(float(number), 60.0, "slow", 0.1, False, 0.1) for number in range(3_000)]
    scorer.remember(Settled([], rows, []))
    assert scorer.scores().breaches[0].forecasts == scored


def test_reliability_of_calibrated_probabilities() -> None:
    rng = np.random.default_rng(1)
    said = rng.random(20_000)
    rows = [ScoredBreach(float(n), 60.0, "slow", p, bool(rng.random() < p), p) for n, p in enumerate(said.tolist())]
    score = breach_score(rows, {})
    assert len(score.reliability) == 10
    for found in score.reliability:
        assert found.breached_ratio == pytest.approx(found.probability, abs=0.05)
    assert score.brier == pytest.approx(1 / 6, abs=0.01)  # the mean of p (1 - p)


@pytest.mark.parametrize("spread", [0.2, 1.0, 5.0])  # of what comes, beside an interval made for 1
def test_widened_intervals_cover(spread: float) -> None:
    """Also where load drifts to ten times as much, and however wrong the interval itself is."""
    rng = np.random.default_rng(2)
    widening = Widening(60.0)
    covered = []
    for number in range(1_000):
        level = 10.0 + 90.0 * number / 1_000
        low, high = level - 1.645, level + 1.645
        wide_low, wide_high = widening.widen(low, level, high)
        observed = level + spread * float(rng.standard_normal())
        covered.append(wide_low <= observed <= wide_high)
        widening.observe(low, level, high, wide_low, wide_high, observed)
    assert 0.85 <= np.mean(covered[100:]) <= 0.95


def test_intervals_that_cover_too_much_become_narrower() -> None:
    rng = np.random.default_rng(3)
    widening = Widening(60.0)
    for _ in range(200):
        widening.observe(0.0, 10.0, 20.0, *widening.widen(0.0, 10.0, 20.0), 10.0 + float(rng.standard_normal()))
    low, high = widening.widen(0.0, 10.0, 20.0)
    assert 2.5 < high - low < 6.0  # 3.3 would do


def test_what_narrow_intervals_missed_does_not_blow_up_a_wide_one() -> None:
    """Twenty times a half of 0.1 was 2: that is not twenty halves of 10."""
    widening = Widening(60.0)
    for number in range(60):
        low, high = widening.widen(0.9, 1.0, 1.1)
        widening.observe(0.9, 1.0, 1.1, low, high, 3.0 if number % 10 == 0 else 1.1)
    assert widening.widen(0.9, 1.0, 1.1)[1] > 2.0
    assert 110.0 < widening.widen(90.0, 100.0, 110.0)[1] < 150.0


def test_a_longer_horizon_learns_from_shorter_ones_until_its_time_comes() -> None:
    """A side that always misses is widened, the other is not."""
    short = Widening(60.0)
    for _ in range(20):
        short.observe(9.0, 10.0, 11.0, *short.widen(9.0, 10.0, 11.0), 15.0)
    low, high = Widening(60.0, [short]).widen(9.0, 10.0, 11.0)
    assert high > 14.0
    assert low > 8.0
    assert Widening(60.0).widen(9.0, 10.0, 11.0)[1] < 12.0


def test_the_further_ahead_the_less_is_known_before_anything_was_scored() -> None:
    """As a random walk's deviation grows, within what was tried."""
    short = Widening(60.0)
    for _ in range(20):
        short.observe(9.0, 10.0, 11.0, *short.widen(9.0, 10.0, 11.0), 12.0)
    for lenders in ([], [short]):
        highs = [Widening(seconds, lenders).widen(9.0, 10.0, 11.0)[1] for seconds in (60.0, 240.0, 900.0, 3600.0)]
        ahead = np.array(highs) - 10.0
        assert ahead[1:] == pytest.approx(ahead[0] * np.sqrt([4.0, 15.0, 15.0]))


@pytest.mark.parametrize(("simulated", "persisted", "least", "most"), [(1.0, 9.0, 0.8, 1.0), (9.0, 1.0, 0.0, 0.2)])
def test_the_better_expert_is_served(simulated: float, persisted: float, least: float, most: float) -> None:
    """Where errors of simulation and persistence are of these sizes."""
    rng = np.random.default_rng(4)
    correction = Correction(60.0)
    assert correction.serve(2.0, math.nan) == 2.0
    for number in range(50):
        noise = rng.standard_normal(2)
        correction.observe(60.0 * number, 100.0 + simulated * noise[0], 100.0 + persisted * noise[1], 100.0)
    assert least <= correction.share <= most


def test_before_anything_was_seen_the_simulation_counts_for_less_the_further_ahead() -> None:
    shares = [Correction(seconds).share for seconds in (60.0, 300.0, 900.0)]
    assert shares == pytest.approx([5 / 6, 1 / 2, 1 / 4])
    correction = Correction(300.0)
    assert 5.0 < correction.serve(100.0, 1.0) < 20.0  # in proportion: the mean would be 50
    assert correction.serve(7.0, 7.0) == pytest.approx(7.0)
    assert correction.serve(0.0, 0.0) == 0.0


def test_forecasts_that_overlap_count_once() -> None:
    apart, overlapping = Correction(600.0), Correction(600.0)
    for number in range(5):
        apart.observe(600.0 * number, 2.0, 1.0, 1.0)
        overlapping.observe(60.0 * number, 2.0, 1.0, 1.0)
    assert apart.share < overlapping.share < 0.8


def test_what_is_served() -> None:
    """Simulated far too low: the policy in force is raised, and others too; probabilities follow."""
    scorer = Scorer([SLOW])
    scorer.reality = reality({float(t): 1.9 for t in range(0, 4000)})
    for minute in range(5, 60):
        scorer.settle(60.0 * minute)
        told = scorer.foresee(forecast(60.0 * minute, 1.0), "today")
    today, other = told.rows
    assert today.kpis["e2e_p95_seconds"].p50 == pytest.approx(1.9, abs=0.1)
    assert other.kpis["e2e_p95_seconds"].p50 == pytest.approx(9.0 * today.kpis["e2e_p95_seconds"].p50)
    values = list(today.kpis["e2e_p95_seconds"].values.values())
    assert values == sorted(values)
    probability = today.breach_probability["slow"]
    assert 0.0 < probability < 0.5 < other.breach_probability["slow"]
    assert today.breach_interval["slow"] == share_interval(probability * today.scenarios, today.scenarios)
    (last,) = scorer.scores().intervals
    assert (last.low, last.median, last.high) == (0.5, 1.0, 1.5)
    assert last.served == today.kpis["e2e_p95_seconds"].p50
    (score,) = scorer.scores().kpis
    assert score.served_error < 0.3 * score.error
