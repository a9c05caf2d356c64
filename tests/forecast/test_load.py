from __future__ import annotations

import numpy as np
import pytest

from forecast.streams import empty_snapshot, fleet_settings
from kavier_twin.forecast.load import arrival_rate, poisson_arrivals
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.workload import make_workload
from kavier_twin.twin.snapshot import Snapshot


def snapshot(arrivals: list[float], now: float, window: float) -> Snapshot:
    fleet = Fleet(fleet_settings(), start_seconds=now)
    return Snapshot("default", now, fleet, make_workload(arrivals, 10, 10), window, 0.0, calibrated=True)


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


def test_poisson_arrivals() -> None:
    arrivals = poisson_arrivals(4.0, 1e9, 5_000.0, np.random.default_rng(3))
    assert arrivals[0] > 1e9
    assert arrivals[-1] < 1e9 + 5_000.0
    assert (np.diff(arrivals) >= 0).all()
    assert arrivals.size == pytest.approx(20_000, abs=5 * 20_000**0.5)
    counts = np.histogram(arrivals, 1_000)[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.2)


def test_a_shorter_horizon_is_the_beginning_of_a_longer_one() -> None:
    longer = poisson_arrivals(50.0, 7.0, 100.0, np.random.default_rng(3))
    shorter = poisson_arrivals(50.0, 7.0, 33.0, np.random.default_rng(3))
    assert shorter.tolist() == longer[longer < 40.0].tolist()


def test_no_rate_no_arrivals() -> None:
    assert poisson_arrivals(0.0, 0.0, 100.0, np.random.default_rng(3)).size == 0
