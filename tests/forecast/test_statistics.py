from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kavier_twin.forecast.statistics import mean_is_above, quantiles, share_interval


def test_a_new_value_falls_below_a_quantile_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    draws = rng.lognormal(size=(20_000, 10))
    for at in (0.1, 0.5, 0.9):
        below = [float(draw[9]) < quantiles(draw[:9], (at,))[at] for draw in draws]
        assert np.mean(below) == pytest.approx(at, abs=0.01)


def test_what_so_few_cannot_tell_is_the_extreme() -> None:
    assert quantiles(np.array([3.0, math.nan, 1.0]), (0.05, 0.5, 0.95)) == {0.05: 1.0, 0.5: 2.0, 0.95: 3.0}
    assert math.isnan(quantiles(np.array([math.nan]), (0.5,))[0.5])


def test_jeffreys_interval() -> None:
    """R's binom.bayes(4, 20, conf.level = 0.9, type = "central") and its ends where nothing or all succeeded."""
    assert share_interval(4, 20) == pytest.approx(stats.beta(4.5, 16.5).interval(0.9))
    assert share_interval(0, 4)[0] == 0.0
    assert share_interval(4, 4)[1] == 1.0
    assert share_interval(0, 4)[1] > share_interval(0, 40)[1]


def test_paired_differences() -> None:
    differences = np.array([1.0, 2.0, 0.5, 1.5])
    tested = stats.ttest_1samp(differences, 0.0, alternative="greater")
    assert mean_is_above(differences) == pytest.approx(1.0 - tested.pvalue)
    assert mean_is_above(differences, 1.25) == pytest.approx(0.5)
    assert mean_is_above(-differences) == pytest.approx(tested.pvalue)


def test_equal_differences_make_likely_not_certain() -> None:
    assert mean_is_above(np.zeros(5)) == pytest.approx(0.5)
    assert 0.5 < mean_is_above(np.ones(1)) < mean_is_above(np.ones(4)) < 1.0
