"""How long requests without a finish record are held."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kavier_twin.mirror.lengths import Lengths, Simulated

NOTHING = Simulated(0.0, 0.0, math.nan, math.nan, 10, 0, None)


def lengths(outputs: list[int], lost_of_all: float) -> Lengths:
    """Of a stream in which requests ended with these lengths, and this share of all was let go."""
    found, owed = Lengths(), 0.0
    for number, tokens in enumerate(outputs):
        owed += lost_of_all / (1.0 - lost_of_all)
        while owed >= 1.0:
            found.let_go(f"lost {number} {owed}", NOTHING)
            owed -= 1.0
        found.ended(tokens, late=False)
    return found


@pytest.mark.parametrize("share", [0.005, 0.05, 0.5])
def test_as_many_requests_of_every_length_are_held_as_really_run(share: float) -> None:
    """Some records are lost, and among the requests without a record nobody knows which ones."""
    rng = np.random.default_rng(1)
    outputs = rng.lognormal(5.0, 1.0, 1_900).astype(int) + 1
    known = lengths(outputs.tolist(), share)
    real = rng.choice(outputs, 20_000)
    lost = rng.random(real.size) < share
    held = np.array([known.limit_tokens(str(number)) for number in range(real.size)])
    held = np.where(lost, held, np.minimum(held, real))
    for quantile in (0.1, 0.5, 0.9, 0.95):
        tokens = np.quantile(outputs, quantile)
        assert (held > tokens).sum() == pytest.approx((real > tokens).sum(), rel=0.08)


def test_a_request_let_go_is_taken_to_have_been_as_long_as_any() -> None:
    """And not longer than it was held."""
    rng = np.random.default_rng(2)
    outputs = rng.lognormal(5.0, 1.0, 1_900).astype(int) + 1
    known = lengths(outputs.tolist(), 0.05)
    drawn = np.array([known.drawn_tokens(str(number)) for number in range(5_000)])
    held = np.array([known.limit_tokens(str(number)) for number in range(5_000)])
    assert (drawn <= held).all()
    for quantile in (0.1, 0.5, 0.9):
        assert np.quantile(drawn, quantile) == pytest.approx(np.quantile(outputs, quantile), rel=0.1)


def test_without_losses_nothing_is_let_go_that_is_no_longer_than_any_before() -> None:
    known = lengths(list(range(1, 201)), 0.0)
    limits = [known.limit_tokens(str(number)) for number in range(1_000)]
    assert min(limit for limit in limits if limit is not None) > 200
    assert None not in limits
