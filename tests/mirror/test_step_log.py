"""Step times from logged steps and from counters, without any request's timing."""

from __future__ import annotations

import numpy as np
import pytest

from kavier_twin.mirror.calibration.requests import CalibrationError
from kavier_twin.mirror.calibration.steps import Counted, StepLog, calibrate_counters, calibrate_steps
from kavier_twin.simulation.settings import StepTime

TRUE = StepTime(fixed=0.009, per_prefill_token=6e-5, per_decode_sequence=3e-4, per_context_token=2e-7)


def step_log(steps: int, noise: float, seed: int) -> StepLog:
    rng = np.random.default_rng(seed)
    prefills = rng.choice([0, 0, 0, 1, 2], steps).astype(float)
    tokens = prefills * rng.integers(1, 1000, steps)
    decodes = rng.integers(1, 64, steps).astype(float)
    context = decodes * rng.integers(50, 2000, steps)
    work = np.column_stack([np.ones(steps), tokens, decodes, context * decodes / (decodes + prefills)])
    seconds = work @ TRUE.coefficients()[:4] * (1.0 + noise * rng.standard_normal(steps))
    return StepLog(prefills, tokens, decodes, context, seconds)


def test_steps_give_the_coefficients() -> None:
    found = calibrate_steps(step_log(2000, 0.05, 1))
    for name in ("fixed", "per_prefill_token", "per_decode_sequence", "per_context_token"):
        assert getattr(found.step_time, name) == pytest.approx(getattr(TRUE, name), rel=0.1), name
        assert name not in found.undetermined
    assert "per_prefill_attention" in found.undetermined


def test_idle_and_unmeasured_steps_are_passed_over() -> None:
    log = step_log(300, 0.0, 2)
    log.seconds[:50] = np.nan
    log.decode_sequences[50:60] = 0.0
    log.prefill_tokens[50:60] = 0.0
    assert calibrate_steps(log).requests == 240
    with pytest.raises(CalibrationError, match="at least 100"):
        calibrate_steps(step_log(99, 0.0, 2))


def test_counters_give_what_they_can() -> None:
    """Windows of 500 steps each: the batch differs from window to window, so fixed and per-sequence cost show."""
    windows = []
    for number in range(40):
        log = step_log(500, 0.05, 100 + number)
        rng = np.random.default_rng(number)
        decodes = np.full(500, float(rng.integers(1, 64)))
        context = np.full(500, float(rng.integers(100, 60_000)))
        tokens = log.prefill_tokens * rng.uniform(0, 2)
        work = np.column_stack([np.ones(500), tokens, decodes, context])
        seconds = work @ TRUE.coefficients()[:4]
        windows.append((500.0, tokens.sum(), decodes.sum(), context.mean(), (seconds * decodes).sum()))
    found = calibrate_counters(Counted(*np.array(windows).T))
    for name in ("fixed", "per_prefill_token", "per_decode_sequence", "per_context_token"):
        assert getattr(found.step_time, name) == pytest.approx(getattr(TRUE, name), rel=0.05), name
    with pytest.raises(CalibrationError, match="at least 10"):
        calibrate_counters(Counted(*np.array(windows[:9]).T))


def test_the_prior_holds_where_counters_do_not_vary() -> None:
    """A steady load shows one number, the step's time: the prior's proportions stay."""
    prior = StepTime(fixed=0.012, per_decode_sequence=3e-4, per_context_token=2e-7)
    window = np.array([500.0, 0.0, 5000.0, 8000.0, 10 * 500 * 0.0136])
    found = calibrate_counters(Counted(*np.tile(window, (30, 1)).T), prior=prior)
    step = found.step_time
    assert step.fixed + 10 * step.per_decode_sequence + 8000 * step.per_context_token == pytest.approx(0.0136, rel=0.01)
    assert step.fixed < prior.fixed
    assert 0 < step.per_decode_sequence < prior.per_decode_sequence
