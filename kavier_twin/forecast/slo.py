"""Service level objectives of a pool: a bound on one KPI of a stretch of time."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

Metric = Literal[
    "ttft_p50_seconds",
    "ttft_p99_seconds",
    "itl_p99_seconds",
    "tpot_p99_seconds",
    "e2e_p95_seconds",
    "queue_p95_seconds",
    "prefix_cache_hit_ratio",
    "kv_usage_mean_ratio",
    "running_mean",
    "waiting_mean",
    "output_tokens_per_second",
    "requests_per_second",
    "preemptions",
    "rejected_requests",
    "power_mean_watts",
    "energy_joules_per_million_tokens",
    "carbon_grams_per_million_tokens",
    "cost_per_million_tokens",
]
METRICS: Final[tuple[Metric, ...]] = get_args(Metric)
_HIGHER_IS_BETTER: Final = frozenset({"prefix_cache_hit_ratio", "output_tokens_per_second", "requests_per_second"})


class Slo(BaseModel):
    """One objective: `metric` shall not be above `threshold` (not below, where higher is better), in its own unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, Field(min_length=1)] = Field(examples=["fast"])
    """How metrics and alerts call it."""

    metric: Metric = Field(examples=["ttft_p99_seconds"])
    """The KPI that is bounded."""

    threshold: Annotated[float, Field(allow_inf_nan=False)] = Field(examples=[2.0])
    """The bound, in the KPI's unit."""

    @property
    def higher_is_better(self) -> bool:
        """Whether the objective is breached below its threshold."""
        return self.metric in _HIGHER_IS_BETTER

    def breaches(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Which values of the metric break the objective. NaN, nothing observed, does not."""
        return values < self.threshold if self.higher_is_better else values > self.threshold

    def breached(self, value: float) -> bool:
        """Whether this one does."""
        return bool(self.breaches(np.array(value)))


DEFAULT_SLOS = (
    Slo(name="ttft_p99", metric="ttft_p99_seconds", threshold=2.0),
    Slo(name="e2e_p95", metric="e2e_p95_seconds", threshold=30.0),
)
