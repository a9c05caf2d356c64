"""Service level objectives of a pool: a bound on one KPI of a stretch of time."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from kavier_twin.simulation.kpi_table import Metric, kpi_of


class Slo(BaseModel):
    """One objective: `metric` shall not be above `threshold` (not below, where higher is better), in its own unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, Field(min_length=1)] = Field(examples=["fast"])
    """Name in metrics and alerts."""

    metric: Metric = Field(examples=["ttft_p99_seconds"])
    """KPI with the bound."""

    threshold: Annotated[float, Field(allow_inf_nan=False)] = Field(examples=[2.0])
    """Bound in the KPI's unit."""

    @property
    def higher_is_better(self) -> bool:
        """Whether the objective is breached below its threshold."""
        return kpi_of(self.metric).higher_is_better

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
