"""Forecasts made by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kavier_twin.forecast.result import FirstBreach, Forecast, Gain, Quantiles, Row, Verdict

VERDICT = Verdict("today", True, (), 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, Gain({}, "slo", math.nan))


def row(policy: str, horizon_seconds: float, e2e_p95: Mapping[float, float], slow: float) -> Row:
    """One KPI by quantile, and the probability of violating the objective `slow`."""
    kpis = {"e2e_p95_seconds": Quantiles(e2e_p95)}
    return Row(policy, horizon_seconds, kpis, {"slow": slow}, {"slow": (0.0, 1.0)}, 6)  # type: ignore[arg-type]


def forecast_of(time_seconds: float, *rows: Row, first_breach: float = 0.0) -> Forecast:
    """A forecast that says this, with the probability of a first breach of `slow` under the first row's policy."""
    first = FirstBreach(rows[0].policy, "slow", math.inf, math.inf, first_breach)
    return Forecast("chat", time_seconds, True, 1.0, 4, "all_scenarios", (), rows, (first,), (), VERDICT)
