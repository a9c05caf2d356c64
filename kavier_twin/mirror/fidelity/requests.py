"""How wrong the twin was lately: predicted against observed, per KPI, over a rolling window of requests."""

from __future__ import annotations

import math
from collections import deque
from copy import copy
from dataclasses import dataclass
from typing import Any, Final

from kavier_twin.simulation.kpi_table import LATENCIES

KPIS: Final = (*LATENCIES, "cached_tokens")
WINDOW_REQUESTS: Final = 500


@dataclass(frozen=True)
class Score:
    """Predicted beside observed over the window. `error_ratio` is the relative error of the mean."""

    count: int
    predicted_mean: float
    observed_mean: float
    error_ratio: float
    absolute_error_mean: float


class Fidelity:
    """Collects pairs (predicted before the end was known, observed) and scores them.

    Memory is bounded by the window. The cache is scored by tokens: `cached_tokens` and, through
    `prompt_tokens`, `hit_ratio`.
    """

    def __init__(self, window_requests: int = WINDOW_REQUESTS) -> None:
        self._pairs: dict[str, deque[tuple[float, float]]] = {name: deque(maxlen=window_requests) for name in KPIS}
        self._prompts: deque[float] = deque(maxlen=window_requests)

    def fork(self) -> Fidelity:
        """An independent copy."""
        twin = copy(self)
        twin._pairs = {name: pairs.copy() for name, pairs in self._pairs.items()}
        twin._prompts = self._prompts.copy()
        return twin

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {"pairs": {name: list(pairs) for name, pairs in self._pairs.items()}, "prompts": list(self._prompts)}

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        for name, pairs in saved["pairs"].items():
            self._pairs[name].extend((predicted, observed) for predicted, observed in pairs)
        self._prompts.extend(saved["prompts"])

    def add(self, kpi: str, predicted: float, observed: float) -> None:
        """One request's pair; pairs with anything not finite are ignored."""
        if math.isfinite(predicted) and math.isfinite(observed):
            self._pairs[kpi].append((predicted, observed))

    def add_cache(self, predicted_tokens: float, observed_tokens: float, prompt_tokens: float) -> None:
        """Prefix hits of one request."""
        self._pairs["cached_tokens"].append((predicted_tokens, observed_tokens))
        self._prompts.append(prompt_tokens)

    def pairs(self, kpi: str) -> list[tuple[float, float]]:
        """(predicted, observed) of the requests in the window, oldest first."""
        return list(self._pairs[kpi])

    def scores(self) -> dict[str, Score]:
        """Score per KPI that has observations; `hit_ratio` is absolute (points of 1)."""
        scores = {name: _score(list(pairs)) for name, pairs in self._pairs.items() if pairs}
        prompts = sum(self._prompts)
        if prompts > 0:
            pairs = self._pairs["cached_tokens"]
            predicted, observed = (sum(pair[side] for pair in pairs) / prompts for side in (0, 1))
            scores["hit_ratio"] = Score(
                len(pairs), predicted, observed, predicted - observed, abs(predicted - observed)
            )
        return scores

    def exact_cache_ratio(self) -> float:
        """Share of requests whose prefix hit was predicted to the token; NaN without observations."""
        pairs = self._pairs["cached_tokens"]
        return sum(predicted == observed for predicted, observed in pairs) / len(pairs) if pairs else math.nan


def _score(pairs: list[tuple[float, float]]) -> Score:
    count = len(pairs)
    predicted = sum(pair[0] for pair in pairs) / count
    observed = sum(pair[1] for pair in pairs) / count
    error = (predicted - observed) / observed if observed > 0 else (0.0 if predicted == 0 else math.inf)
    absolute = sum(abs(a - b) for a, b in pairs) / count
    return Score(count, predicted, observed, error, absolute)
