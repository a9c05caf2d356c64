"""The regression under calibration: right where the data tells, at the prior where it does not, and it knows which."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effort import examples
from kavier_twin.mirror.calibration.fit import fit

TRUE = np.array([0.01, 4e-5, 2e-4])


def data(rows: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    work = np.column_stack([rng.integers(1, 50, rows), rng.integers(0, 4000, rows), rng.integers(1, 3000, rows)])
    seconds = work @ TRUE * (1.0 + noise * rng.standard_normal(rows))
    return work.astype(float), seconds


def test_exact_data_gives_the_coefficients() -> None:
    found = fit(*data(50, 0.0, 1))
    np.testing.assert_allclose(found.values, TRUE, rtol=1e-6)
    assert found.determined.all()


def test_the_truth_lies_within_the_deviations_it_states() -> None:
    inside = [np.abs(f.values - TRUE) < 2 * f.deviations for f in (fit(*data(200, 0.1, seed)) for seed in range(100))]
    assert 0.85 < np.mean(inside) <= 1.0


def test_a_few_wild_rows_do_not_move_it() -> None:
    work, seconds = data(200, 0.02, 2)
    seconds[:4] *= 1000.0  # a client that slept
    np.testing.assert_allclose(fit(work, seconds).values, TRUE, rtol=0.6)
    work, seconds = data(200, 0.02, 2)
    seconds[:4] *= 3.0  # stalls are real time: the mean keeps them
    assert (work @ fit(work, seconds).values).sum() == pytest.approx(seconds.sum(), rel=0.01)


def test_what_the_data_cannot_tell_stays_at_the_prior() -> None:
    work, seconds = data(100, 0.05, 3)
    prior = TRUE * [1.3, 1.0, 0.8]
    # The first two always go together: only their sum shows.
    work[:, 1] = work[:, 0] * 100.0
    seconds = work @ TRUE
    found = fit(work, seconds, prior=prior)
    np.testing.assert_allclose((work @ found.values), seconds, rtol=0.02)
    assert found.values[0] / found.values[1] == pytest.approx(prior[0] / prior[1], rel=0.3)
    # Nothing in the data: exactly the prior, and it says so.
    work[:, 2] = 0.0
    found = fit(work, work @ TRUE, prior=prior)
    assert found.values[2] == pytest.approx(prior[2], rel=0.05)
    assert not found.determined[2]


def test_without_a_prior_it_says_what_it_does_not_know() -> None:
    work, _ = data(100, 0.05, 4)
    work[:, 1] = work[:, 0] * 100.0
    found = fit(work, work @ TRUE)
    assert not found.determined[0]
    assert not found.determined[1]
    assert found.determined[2]


@examples(30)
@given(st.integers(0, 10_000), st.floats(0.0, 0.5), st.floats(0.5, 2.0))
def test_never_below_its_floor(seed: int, noise: float, share: float) -> None:
    work, seconds = data(40, noise, seed)
    floor = TRUE * [share, 0.0, share]
    found = fit(work, np.abs(seconds), floor=floor)
    assert (found.values >= floor * (1 - 1e-12)).all()
