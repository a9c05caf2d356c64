"""Calibration gets back the coefficients that made the data, and says when it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from kavier_twin.mirror.calibration.requests import (
    CalibrationError,
    Observed,
    calibrate,
    calibrate_means,
    single_engine,
    with_frontend,
)
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.workload import make_workload

TRUE = StepTime(
    fixed=0.011, per_prefill_token=6e-5, per_decode_sequence=3e-4, per_context_token=2e-7, per_prefill_attention=2e-9
)
ENGINE = EngineSettings(num_gpu_blocks=2000, max_num_seqs=64, max_num_batched_tokens=2048)


def observed(requests: int, noise: float, seed: int) -> Observed:
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(0.25, requests))
    workload = make_workload(arrival, rng.integers(20, 1500, requests), rng.integers(2, 300, requests))
    fleet = FleetSettings(engine=ENGINE, step_time=TRUE)
    outcomes = simulate(fleet, with_frontend(workload, 0.02)).collect()
    outcomes = outcomes[np.argsort(outcomes["index"])]
    slower = 1.0 + noise * rng.standard_normal(requests)
    ttft = (outcomes["first_token"] - outcomes["arrival"]) * slower
    decode = (outcomes["finish"] - outcomes["first_token"]) * (1.0 + noise * rng.standard_normal(requests))
    return Observed(workload, ttft, ttft + decode)


def test_recovers_what_made_the_data() -> None:
    found = calibrate(single_engine(ENGINE), observed(400, 0.0, 1))
    assert found.frontend_seconds == pytest.approx(0.02, rel=0.1)
    assert found.mean_e2e_ratio == pytest.approx(1.0, abs=0.01)
    # per_prefill_attention is 1 % of these prefills' time: this data cannot tell it.
    for name in ("fixed", "per_prefill_token", "per_decode_sequence", "per_context_token"):
        assert getattr(found.step_time, name) == pytest.approx(getattr(TRUE, name), rel=0.1), name


def test_means_agree_under_noise() -> None:
    found = calibrate(single_engine(ENGINE), observed(400, 0.2, 2))
    assert found.mean_e2e_ratio == pytest.approx(1.0, abs=0.03)
    assert found.mean_ttft_ratio == pytest.approx(1.0, abs=0.06)


def test_too_little_is_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 30"):
        calibrate(single_engine(ENGINE), observed(10, 0.0, 3))


def test_an_overloaded_start_predicts_the_rest() -> None:
    """Requests outlive the first third: all are load, only the first third is measured; queues tell the pace too."""
    truth = observed(400, 0.05, 4)
    crowded = truth.workload._replace(arrival=truth.workload.arrival / 8, delivered=truth.workload.arrival / 8)
    fleet = FleetSettings(engine=ENGINE.model_copy(update={"max_num_seqs": 16}), step_time=TRUE)
    outcomes = simulate(fleet, crowded).collect()
    outcomes = outcomes[np.argsort(outcomes["index"])]
    ttft, e2e = outcomes["first_token"] - outcomes["arrival"], outcomes["finish"] - outcomes["arrival"]
    late = np.arange(400) >= 133
    found = calibrate(fleet, Observed(crowded, np.where(late, np.nan, ttft), np.where(late, np.nan, e2e)))
    again = simulate(
        fleet.model_copy(update={"step_time": found.step_time}), with_frontend(crowded, found.frontend_seconds)
    )
    rest = again.collect()
    rest = rest[np.argsort(rest["index"])][late]
    assert (rest["finish"] - rest["arrival"]).mean() == pytest.approx(e2e[late].mean(), rel=0.02)


def test_a_runs_means_scale_the_prior() -> None:
    slower = TRUE.with_coefficients(TRUE.coefficients() * 1.3)
    truth = observed(400, 0.0, 5)
    found = calibrate_means(
        single_engine(ENGINE), truth.workload, truth.ttft_seconds.mean(), truth.e2e_seconds.mean(), prior=slower
    )
    assert found.mean_e2e_ratio == pytest.approx(1.0, abs=0.01)
    assert found.mean_ttft_ratio == pytest.approx(1.0, abs=0.1)
