from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from kavier_twin.forecast.slo import Slo


def test_latency_breaches_above() -> None:
    slo = Slo(name="ttft", metric="ttft_p99_seconds", threshold=2.0)
    assert slo.breached(2.1)
    assert not slo.breached(2.0)


@pytest.mark.parametrize("metric", ["prefix_cache_hit_ratio", "output_tokens_per_second", "requests_per_second"])
def test_where_more_is_better_it_breaches_below(metric: str) -> None:
    slo = Slo(name="hits", metric=metric, threshold=0.5)  # type: ignore[arg-type]
    assert slo.breached(0.4)
    assert not slo.breached(0.5)


def test_nothing_observed_breaches_nothing() -> None:
    assert not Slo(name="a", metric="ttft_p99_seconds", threshold=2.0).breached(math.nan)
    assert not Slo(name="a", metric="prefix_cache_hit_ratio", threshold=0.5).breached(math.nan)


@pytest.mark.parametrize(
    "wrong", [{"metric": "ttft_p75_seconds"}, {"threshold": math.inf}, {"name": ""}, {"unit": "s"}]
)
def test_what_is_no_objective_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Slo.model_validate({"name": "a", "metric": "ttft_p99_seconds", "threshold": 2.0} | wrong)
