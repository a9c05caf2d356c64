"""When an alert stands: the one definition that the Prometheus rules, the scores, the backtest and its plots use.

An alert starts when the probability of a first breach is at least `ALERT_PROBABILITY` in `START_FORECASTS` forecasts in
a row. It stays for `HOLD_SECONDS` after the last time that this was so, which is what ends it. Starting twice keeps out
what a single forecast of few scenarios says by chance; holding keeps a probability that moves around the threshold from
becoming many alerts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# Chosen for nine of ten breaches to be foreseen and four of five alerts to be right, in the backtests that
# `benchmarks.forecast_scores` calls design and climbs: two of three trending scenarios.
ALERT_PROBABILITY: Final = 0.2
START_FORECASTS: Final = 2
HOLD_SECONDS: Final = 600.0


def standing(times_seconds: Sequence[float], probabilities: Sequence[float]) -> list[bool]:
    """Whether an alert stands at each forecast, in order of time."""
    found: list[bool] = []
    in_a_row, last_seconds = 0, float("-inf")
    for time, probability in zip(times_seconds, probabilities, strict=True):
        in_a_row = in_a_row + 1 if probability >= ALERT_PROBABILITY else 0
        if in_a_row >= START_FORECASTS:
            last_seconds = time
        found.append(time - last_seconds < HOLD_SECONDS)
    return found
