"""What a forecast says."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from kavier_twin.forecast.load import LoadOutlook
from kavier_twin.forecast.slo import Metric


@dataclass(frozen=True)
class Quantiles:
    """A KPI over the futures simulated. NaN: no future had anything to observe."""

    p10: float
    p50: float
    p90: float


@dataclass(frozen=True)
class Row:
    """One policy from now to one horizon."""

    policy: str
    horizon_seconds: float
    kpis: dict[Metric, Quantiles]
    breach_probability: dict[str, float]  # by SLO: the share of futures that break it


@dataclass(frozen=True)
class FailedPolicy:
    """A policy that cannot be applied to the live settings."""

    policy: str
    error: str


@dataclass(frozen=True)
class Verdict:
    """The best policy, beside today's. Expected breaches are the breach probabilities summed over SLOs and horizons.

    Latency and throughput are medians over the futures at the longest horizon. `deployable`: `vllm serve` has a flag
    for every setting that the policy changes.
    """

    policy: str
    deployable: bool
    vllm_flags: tuple[str, ...]
    expected_breaches: float
    today_expected_breaches: float
    e2e_p95_seconds: float
    today_e2e_p95_seconds: float
    output_tokens_per_second: float
    today_output_tokens_per_second: float


@dataclass(frozen=True)
class Forecast:
    """The near future of one pool under every policy."""

    pool: str
    time_seconds: float  # event time at which the future begins
    calibrated: bool
    rate_requests_per_second: float  # of the arrivals assumed, on average up to the longest horizon
    futures: int
    rows: tuple[Row, ...]  # by policy, then horizon
    failed: tuple[FailedPolicy, ...]
    verdict: Verdict | None  # None: today's policy was not among those simulated
    load: LoadOutlook | None = None  # the arrivals assumed, in full
    duration_seconds: float | None = None  # wall clock; set by who ran it

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN becomes None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
