"""Watts as DCGM would report them, made by a known power model, give that model back."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from kavier_twin.mirror.calibration.power import ObservedPower, calibrate_power, observe_power
from kavier_twin.mirror.calibration.requests import CalibrationError
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.footprint import PowerModel
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.workload import make_workload

PRIOR = PowerModel(idle_watts=70.0, max_watts=700.0)
TRUTH = PowerModel(idle_watts=118.0, max_watts=700.0, compute_load=0.78, memory_load=0.47)
STEP_TIME = StepTime(fixed=0.008, per_prefill_token=2.7e-5, per_decode_sequence=2.7e-5, per_context_token=6.5e-8)


@cache
def served() -> Fleet:
    """Ten minutes of bursts, some of long prompts, some of long outputs, with idleness between."""
    fleet = Fleet(FleetSettings(engine=EngineSettings(num_gpu_blocks=28_000), step_time=STEP_TIME))
    rng = np.random.default_rng(1)
    arrivals, prompts, outputs = [], [], []
    for start in range(0, 600, 20):
        long_prompts = rng.random() < 0.5
        for _ in range(int(rng.integers(2, 30))):
            arrivals.append(start + 5.0 * rng.random())
            prompts.append(int(rng.integers(2_000, 8_000) if long_prompts else rng.integers(50, 200)))
            outputs.append(int(rng.integers(1, 30) if long_prompts else rng.integers(200, 900)))
    order = np.argsort(arrivals)
    fleet.feed(make_workload(*(np.array(column)[order].tolist() for column in (arrivals, prompts, outputs))))
    fleet.sample_every(5.0)
    fleet.run(600.0)
    return fleet


def measured(truth: PowerModel, noise_watts: float = 4.0) -> ObservedPower:
    """One reading of watts a second."""
    readings = served().samples.readings
    times = np.arange(0.5, 600.0, 1.0)
    shares = observe_power(readings, STEP_TIME, times, np.zeros(times.size))
    exact = truth.idle_watts + truth.compute_watts * shares.computing + truth.memory_watts * shares.reading
    watts = np.repeat(exact, 5) + np.random.default_rng(2).normal(0.0, noise_watts, times.size)
    return observe_power(readings, STEP_TIME, times, watts)


def test_coefficients_are_recovered() -> None:
    observed = measured(TRUTH)
    assert observed.watts.size == 120
    found = calibrate_power(PRIOR, observed)
    assert found.undetermined == ()
    assert found.power.idle_watts == pytest.approx(TRUTH.idle_watts, abs=5.0)
    assert found.power.compute_load == pytest.approx(TRUTH.compute_load, abs=0.03)
    assert found.power.memory_load == pytest.approx(TRUTH.memory_load, abs=0.03)
    assert found.power.max_watts == 700.0
    assert found.mean_ratio == pytest.approx(1.0, abs=0.01)


def test_what_never_happened_is_not_determined_and_keeps_the_prior() -> None:
    """Decode alone tells nothing of the draw of computing."""
    reading = np.tile(np.linspace(0.0, 1.0, 10), 5)
    watts = TRUTH.idle_watts + TRUTH.memory_watts * reading
    found = calibrate_power(PRIOR, ObservedPower(watts, np.zeros(50), reading))
    assert found.undetermined == ("compute_load",)
    assert found.power.compute_load == PRIOR.compute_load
    assert found.power.idle_watts == pytest.approx(TRUTH.idle_watts, abs=2.0)
    assert found.power.memory_watts == pytest.approx(TRUTH.memory_watts, abs=5.0)


def test_a_steady_load_determines_nothing() -> None:
    """Three coefficients cannot be told from one level; that the prior's level is another, the ratio says."""
    watts = 420.0 + np.random.default_rng(3).normal(0.0, 3.0, 60)
    found = calibrate_power(PRIOR, ObservedPower(watts, np.full(60, 0.3), np.full(60, 0.6)))
    assert set(found.undetermined) == {"idle_watts", "compute_load", "memory_load"}
    assert found.power == PRIOR
    assert found.mean_ratio == pytest.approx((70.0 + 0.3 * 567.0 + 0.6 * 226.8) / 420.0, rel=0.01)


def test_outliers_do_not_carry_it_away() -> None:
    clean = measured(TRUTH)
    watts = clean.watts.copy()
    watts[::20] = 2_000.0
    found = calibrate_power(PRIOR, clean._replace(watts=watts))
    assert found.power.idle_watts == pytest.approx(TRUTH.idle_watts, abs=15.0)
    assert found.power.memory_load == pytest.approx(TRUTH.memory_load, abs=0.06)


def test_no_draw_above_the_limit() -> None:
    observed = measured(TRUTH)
    found = calibrate_power(PRIOR, observed._replace(watts=3.0 * observed.watts))
    assert found.power.memory_load == 1.0
    assert found.power.idle_watts <= 700.0
    assert found.power.idle_watts + found.power.memory_watts <= 700.0 + 1e-9


def test_too_little_is_too_little() -> None:
    with pytest.raises(CalibrationError, match="9 stretches"):
        calibrate_power(PRIOR, ObservedPower(np.ones(9), np.ones(9), np.ones(9)))
    with pytest.raises(CalibrationError, match="0 stretches"):
        calibrate_power(PRIOR, observe_power(served().samples.readings, STEP_TIME, np.array([1e9]), np.array([1.0])))
