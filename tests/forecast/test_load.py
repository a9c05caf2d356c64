from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from forecast.streams import empty_snapshot, fleet_settings
from kavier_twin.forecast.load import (
    LoadForecast,
    LoadForecaster,
    _pauses,
    arrival_rate,
    dispersion_ratio,
    fill_gaps,
)
from kavier_twin.forecast.load_methods import MINUTE_STEPS, STEP_SECONDS, persistence_minutes, persistence_steps
from kavier_twin.mirror.arrival_counts import RateHistory
from kavier_twin.mirror.snapshot import ArrivalCounts, Snapshot
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.workload import make_workload

Floats = npt.NDArray[np.float64]


def snapshot(arrivals: list[float], now: float, window: float, counts: ArrivalCounts | None = None) -> Snapshot:
    fleet = Fleet(fleet_settings(), start_seconds=now)
    recent = make_workload(arrivals, 10, 10)
    return Snapshot("default", now, fleet, recent, window, 0.0, calibrated=True, arrivals=counts or ArrivalCounts())


def at(times: Floats, now: float) -> Snapshot:
    """The snapshot of a twin that saw these arrivals up to now."""
    history = RateHistory()
    past = times[times <= now]
    for time in past:
        history.add(float(time))
    return snapshot(past[past > now - 600.0].tolist(), now, 600.0, history.until(now))


def arrivals_at(rate: Callable[[Floats], Floats], seconds: float, seed: int = 1, start: float = 0.0) -> Floats:
    """A Poisson process whose rate changes with time."""
    rng = np.random.default_rng(seed)
    most = float(rate(np.linspace(0.0, seconds, 2_000)).max())
    times = np.sort(rng.uniform(0.0, seconds, rng.poisson(most * seconds)))
    return start + times[rng.random(times.size) * most < rate(times)]


def constant(rate: float) -> Callable[[Floats], Floats]:
    return lambda times: np.full(times.size, rate)


# --- the baseline ---------------------------------------------------------------------------------------------------


def test_persistence_looks_back_no_further_than_to_a_clear_shift() -> None:
    rng = np.random.default_rng(7)
    steady = rng.poisson(20.0, (200, 60)).astype(float)
    windows = [persistence_minutes(steps) * MINUTE_STEPS for steps in steady]
    assert np.mean([persistence_steps(steps) == window for steps, window in zip(steady, windows, strict=True)]) > 0.95
    shifted = steady.copy()
    shifted[:, -4:] += rng.poisson(40.0, (200, 4))
    assert np.mean([persistence_steps(steps) == 4 for steps in shifted]) > 0.9
    fallen = np.concatenate([steady, rng.poisson(4.0, (200, 9))], axis=1)
    assert np.mean([persistence_steps(steps) in (9, 10) for steps in fallen]) > 0.9


def test_persistence_looks_back_further_the_more_counts_vary() -> None:
    rng = np.random.default_rng(7)
    poisson, bursty = rng.poisson(100.0, 360).astype(float), 20.0 * rng.poisson(5.0, 360)
    assert persistence_minutes(poisson) == 2
    assert persistence_minutes(rng.poisson(20.0, 360).astype(float)) > 4
    assert persistence_minutes(bursty) == 10


def test_persistence_of_next_to_nothing() -> None:
    for steps in (np.zeros(0), np.zeros(5), np.zeros(100), np.array([3.0])):
        assert 1 <= persistence_steps(steps) <= max(steps.size, 1)


# --- the recent rate ----------------------------------------------------------------------------------------------


def test_the_rate_of_a_full_window() -> None:
    rng = np.random.default_rng(1)
    arrivals = np.sort(rng.uniform(400.0, 1000.0, 3000)).tolist()
    assert arrival_rate(snapshot(arrivals, 1000.0, 600.0)) == pytest.approx(5.0, rel=0.01)


def test_a_stream_that_just_began_is_not_diluted_by_the_silence_before_it() -> None:
    arrivals = np.arange(980.0, 1000.0, 0.5).tolist()
    assert arrival_rate(snapshot(arrivals, 1000.0, 600.0)) == pytest.approx(2.0, rel=0.05)


def test_silence_after_the_last_request_counts() -> None:
    arrivals = np.arange(400.0, 500.0, 0.5).tolist()
    assert arrival_rate(snapshot(arrivals, 1000.0, 600.0)) == pytest.approx(200 / 600, rel=0.05)


def test_too_little_seen_is_no_rate() -> None:
    assert arrival_rate(empty_snapshot()) == 0.0
    assert arrival_rate(snapshot([99.9999], 100.0, 1e-9)) == 0.0


def test_two_requests_at_once_are_no_rate_of_thousands() -> None:
    assert arrival_rate(snapshot([100.0, 100.0], 100.0, 60.0)) <= 1.0


# --- the rate to come ---------------------------------------------------------------------------------------------


def test_a_steady_rate_goes_on() -> None:
    told = LoadForecaster().forecast(at(arrivals_at(constant(5.0), 7_200.0, start=1.8e9), 1.8e9 + 7_200.0), 900.0)
    assert told.rate(900.0) == pytest.approx(5.0, rel=0.05)
    lower, upper = told.interval(900.0)
    assert lower < 5.0 < upper < 7.0


def test_a_level_shift_is_followed_within_minutes() -> None:
    arrivals = arrivals_at(lambda times: np.where(times < 6_600.0, 4.0, 9.0), 7_200.0)
    told = LoadForecaster().forecast(at(arrivals, 7_200.0), 900.0)
    assert told.rate(60.0) == pytest.approx(9.0, rel=0.1)
    assert 7.0 < told.rate(900.0) < 9.5  # it may come back


def test_where_traffic_stopped_none_is_expected() -> None:
    arrivals = arrivals_at(lambda times: np.where(times < 6_000.0, 5.0, 0.0), 7_200.0)
    told = LoadForecaster().forecast(at(arrivals, 7_200.0), 900.0)
    assert told.rate(900.0) < 0.01
    assert told.draw_arrivals(900.0, np.random.default_rng(1)).size < 10


def test_a_pool_with_a_request_every_few_minutes() -> None:
    arrivals = arrivals_at(constant(0.003), 90_000.0)
    paths = [LoadForecaster().forecast(at(arrivals, now), 900.0).rate(900.0) for now in np.arange(3e4, 9e4, 3e3)]
    assert np.mean(paths) == pytest.approx(0.003, rel=0.5)


def test_a_day_is_learnt_from_days() -> None:
    """The rate turns within the horizon, which persistence cannot foresee."""

    def day(times: Floats) -> Floats:
        return 3.0 * (1.0 + 0.95 * np.sin(2.0 * np.pi * times / 86_400.0))

    now = 4.0 * 86_400.0  # it climbs most steeply
    arrivals = arrivals_at(day, now + 3_600.0)
    told = LoadForecaster().forecast(at(arrivals, now), 3_600.0)
    then = float(day(now + np.linspace(0.0, 3_600.0, 100)).mean())
    assert told.method == "lag_regression"
    assert abs(told.rate(3_600.0) - then) < 0.5 * abs(told.rate(3_600.0, "persistence") - then)
    assert told.errors["lag_regression"] < 0.9 * told.errors["persistence"]


@pytest.mark.parametrize("level", [1.0, 10.0])
def test_intervals_cover_as_often_as_the_errors_of_days_say(level: float) -> None:
    """A rate that wanders: its logarithm goes to and fro with half an hour's memory."""
    rng = np.random.default_rng(5)
    walk = np.zeros(4 * 1_440)
    for minute in range(1, walk.size):
        walk[minute] = 0.97 * walk[minute - 1] + 0.05 * rng.standard_normal()
    per_second = level * np.exp(walk)
    counts = rng.poisson(np.repeat(per_second, 6) * 10.0)
    sums = np.concatenate([[0], np.cumsum(counts)])
    covered: dict[int, list[bool]] = {60: [], 300: [], 900: [], 3_600: []}
    for step in range(2 * 8_640, 4 * 8_640 - 360, 180):
        known = ArrivalCounts(counts[step - 2_000 : step], counts[:step].reshape(-1, 6).sum(axis=1))
        told = LoadForecaster().forecast(snapshot([], 10.0 * step, 600.0, known), 3_600.0)
        paths = [told.draw_rate(np.random.default_rng(number)) for number in range(200)]
        chance = np.random.default_rng(step)
        for horizon, held in covered.items():
            ahead = horizon // 10
            drawn = [chance.poisson(10.0 * path[:ahead].sum()) for path in paths]
            came = sums[step + ahead] - sums[step]
            held.append(bool(np.quantile(drawn, 0.05) <= came <= np.quantile(drawn, 0.95)))
    assert all(0.75 <= np.mean(held) <= 0.97 for held in covered.values()), {k: np.mean(v) for k, v in covered.items()}


def test_short_history_is_what_the_recent_requests_say() -> None:
    arrivals = arrivals_at(constant(5.0), 25.0)
    told = LoadForecaster().forecast(at(arrivals, 25.0), 900.0)
    assert told.rate(900.0) == pytest.approx(arrival_rate(at(arrivals, 25.0)))


def test_a_climb_goes_on_in_scenarios_that_are_trending_and_comes_back_in_others() -> None:
    """From 3 to 9 requests a second in 15 minutes, half of it over."""
    arrivals = arrivals_at(lambda times: 3.0 + np.clip((times - 6_750.0) / 150.0, 0.0, 6.0), 7_200.0)
    told = LoadForecaster().forecast(at(arrivals, 7_200.0), 900.0)
    ends = [
        np.median([told.draw_rate(np.random.default_rng(number), trending)[-1] for number in range(300)])
        for trending in (False, True)
    ]
    assert ends[0] < 7.0  # it is 6 now
    assert ends[1] > 8.0


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("a jump", lambda times: np.where(times < 6_900.0, 3.0, 9.0)),
        ("chance", lambda times: np.full(times.size, 5.0)),
        ("nothing any more", lambda times: np.where(times < 6_900.0, 5.0, 0.0)),
    ],
)
def test_what_is_no_climb_does_not_go_on(name: str, rate: Callable[[Floats], Floats]) -> None:
    told = LoadForecaster().forecast(at(arrivals_at(rate, 7_200.0), 7_200.0), 900.0)
    assert np.abs(np.diff(told.trend)).max() < 0.05 * (told.trend.max() + 0.01), name


def test_nothing_seen_nothing_foreseen() -> None:
    told = LoadForecaster().forecast(empty_snapshot(), 900.0)
    assert told.rate(900.0) == 0.0
    assert told.interval(900.0) == (0.0, 0.0)
    assert told.draw_arrivals(900.0, np.random.default_rng(1)).size == 0


def test_the_same_history_gives_the_same_forecast() -> None:
    arrivals = arrivals_at(constant(5.0), 3_600.0)
    one, other = (LoadForecaster().forecast(at(arrivals, 3_600.0), 900.0) for _ in range(2))
    assert one.mean.tobytes() == other.mean.tobytes()
    assert one.deviation.tobytes() == other.deviation.tobytes()


def test_between_refits_the_newest_counts_are_used() -> None:
    arrivals = arrivals_at(constant(4.0), 4_200.0)
    forecaster = LoadForecaster(refit_seconds=600.0)
    first = forecaster.forecast(at(arrivals, 3_600.0), 900.0)
    later = forecaster.forecast(at(arrivals, 3_700.0), 900.0)
    assert later.refitted_seconds == first.refitted_seconds == 3_600.0
    assert later.rate(900.0) != first.rate(900.0)
    assert forecaster.forecast(at(arrivals, 4_200.0), 900.0).refitted_seconds == 4_200.0


def test_a_level_shift_does_not_wait_for_the_next_refit() -> None:
    arrivals = arrivals_at(lambda times: np.where(times < 3_600.0, 9.0, 4.0), 3_700.0)
    forecaster = LoadForecaster(refit_seconds=600.0)
    before = forecaster.forecast(at(arrivals, 3_600.0), 900.0)
    assert before.rate(900.0) == pytest.approx(9.0, rel=0.05)
    told = forecaster.forecast(at(arrivals, 3_700.0), 900.0)
    assert told.refitted_seconds == 3_600.0
    assert told.rate(900.0) < 6.0


def test_a_gap_in_the_telemetry_is_no_silence() -> None:
    steady = arrivals_at(constant(5.0), 7_200.0)
    gap = steady[(steady < 5_000.0) | (steady > 5_600.0)]
    with_gap = LoadForecaster().forecast(at(gap, 7_200.0), 900.0)
    assert with_gap.rate(900.0) == pytest.approx(5.0, rel=0.05)
    assert 0.5 < with_gap.dispersion_ratio < 1.3


def test_gaps_are_filled_silence_is_not() -> None:
    counts = np.array([50.0, 40.0, 0.0, 0.0, 60.0, 50.0])
    assert (fill_gaps(counts)[2:4] > 40.0).all()
    rare = np.array([1.0, 0.0, 0.0, 2.0, 1.0, 0.0, 1.0])
    assert np.array_equal(fill_gaps(rare), rare)
    ended = np.array([50.0, 40.0, 0.0, 0.0])
    assert np.array_equal(fill_gaps(ended), ended)


# --- arrivals drawn -----------------------------------------------------------------------------------------------


def forecast(rate: float, deviation: float = 0.0, dispersion: float = 1.0, steps: int = 500) -> LoadForecast:
    level = np.full(steps, rate)
    return LoadForecast(1e9, level, np.full(steps, deviation), dispersion, "persistence", 0.0, {}, {})


@pytest.mark.parametrize("dispersion", [0.3, 1.0, 3.0])
def test_arrivals_are_as_bursty_as_told(dispersion: float) -> None:
    told = forecast(4.0, dispersion=dispersion)
    arrivals = told.draw_arrivals(5_000.0, np.random.default_rng(3))
    assert arrivals[0] > 1e9
    assert arrivals[-1] < 1e9 + 5_000.0
    assert (np.diff(arrivals) >= 0).all()
    assert arrivals.size == pytest.approx(20_000, abs=5 * (dispersion * 20_000) ** 0.5)
    counts = np.histogram(arrivals, 500)[0].astype(np.float64)
    assert counts.var() / counts.mean() == pytest.approx(dispersion, rel=0.2)
    assert dispersion_ratio(counts) == pytest.approx(dispersion, rel=0.25)


def test_arrivals_are_bunched_as_those_before() -> None:
    """Batches of five every two seconds, then twice as many: a count of ten seconds shows neither."""
    batches = np.concatenate([np.arange(0.0, 300.0, 2.0), np.arange(300.0, 600.0, 1.0)])
    told = LoadForecaster().forecast(at(np.repeat(batches, 5), 600.0), 600.0)
    told = dataclasses.replace(told, mean=np.full(60, 5.0), deviation=np.zeros(60))
    pauses = np.diff(told.draw_arrivals(600.0, np.random.default_rng(3)))
    assert (pauses < 1e-6).mean() == pytest.approx(0.8, abs=0.02)
    assert np.median(pauses[pauses > 1e-6]) == pytest.approx(1.0, rel=0.05)


def test_the_rate_path_is_as_uncertain_as_told() -> None:
    told = forecast(10.0, deviation=3.0, steps=60)
    paths = np.array([told.draw_rate(np.random.default_rng(seed)) for seed in range(2_000)])
    assert (paths > 0.0).all()
    assert np.allclose(paths.mean(axis=0), 10.0, rtol=0.05)
    assert np.allclose(paths.std(axis=0), 3.0, rtol=0.1)
    lower, upper = told.interval(600.0)
    assert np.mean((paths[:, -1] > lower) & (paths[:, -1] < upper)) == pytest.approx(0.8, abs=0.03)


def test_arrivals_follow_the_rate() -> None:
    mean = np.where(np.arange(100) < 50, 2.0, 20.0)
    told = LoadForecast(0.0, mean, np.zeros(100), 1.0, "persistence", 0.0, {}, {})
    arrivals = told.draw_arrivals(1_000.0, np.random.default_rng(3))
    early = (arrivals < 50 * STEP_SECONDS).sum()
    assert early == pytest.approx(1_000, abs=150)
    assert arrivals.size - early == pytest.approx(10_000, abs=400)


def test_a_shorter_horizon_is_the_beginning_of_a_longer_one() -> None:
    told = forecast(50.0, deviation=10.0)
    longer = told.draw_arrivals(100.0, np.random.default_rng(3))
    shorter = told.draw_arrivals(33.0, np.random.default_rng(3))
    assert shorter.tolist() == longer[longer < 1e9 + 33.0].tolist()


def test_another_load_is_as_uncertain() -> None:
    told = forecast(4.0, deviation=1.0).scaled(1.5)
    assert told.rate(60.0) == pytest.approx(6.0)
    assert told.interval(60.0) == pytest.approx(tuple(1.5 * end for end in forecast(4.0, deviation=1.0).interval(60.0)))


@pytest.mark.parametrize("arrivals", [2, 60, 101, 102, 700])
def test_pauses_of_few_arrivals(arrivals: int) -> None:
    """Fewer than what their mean is taken over, too."""
    pauses = _pauses(np.cumsum(np.random.default_rng(1).exponential(1.0, arrivals)))
    assert pauses.size in (0, min(arrivals - 1, 1_000))
    assert pauses.size == 0 or pauses.mean() == pytest.approx(1.0)
