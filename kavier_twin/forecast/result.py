"""What a forecast says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from kavier_twin.forecast.load import LoadOutlook
from kavier_twin.simulation.kpi_table import Metric
from kavier_twin.simulation.plain import Figure, plain

StopReason = Literal["certain", "time", "all_scenarios"]
"""Why simulation stopped: the best policy is certain, the time budget was used up, or all scenarios were simulated."""


@dataclass(frozen=True)
class Quantiles:
    """A KPI over the scenarios simulated: quantile (0..1) -> value. NaN: no scenario had anything to observe."""

    values: Mapping[float, float]

    @property
    def p50(self) -> float:
        """The median."""
        return self.values[0.5]


@dataclass(frozen=True)
class Row:
    """One policy from now to one horizon."""

    policy: str
    horizon_seconds: float
    kpis: dict[Metric, Quantiles]
    breach_probability: dict[str, float]  # by SLO: the share of scenarios that break it
    breach_interval: dict[str, tuple[float, float]]  # by SLO: 90 % credible interval of that probability
    scenarios: int  # of which all this is told


@dataclass(frozen=True)
class FirstBreach:
    """When an SLO is first broken, seconds from now: in the median scenario, and in the worst tenth of them.

    Found in windows as long as the shortest horizon. Infinite: not within the longest horizon. `probability`: the share
    of the scenarios in which it is within that.
    """

    policy: str
    slo: str
    expected_seconds: float
    early_seconds: float
    probability: float


@dataclass(frozen=True)
class FailedPolicy:
    """A policy that cannot be applied to the live settings."""

    policy: str
    error: str


@dataclass(frozen=True)
class Gain:
    """What a policy gains over today's, on the same scenarios, at the longest horizon."""

    by_objective: Annotated[
        dict[str, float],
        Field(
            description="For slo, the expected number of violations avoided; otherwise the relative saving (0.1: 10 % "
            "less).",
            examples=[{"slo": 1.25, "latency": 0.2}],
        ),
    ]
    decided_by: Annotated[str, Field(description="Objective in which the policies differ.", examples=["slo"])]
    probability: Annotated[
        Figure,
        Field(
            description="Probability that the policy is better in that objective. Null for the current policy.",
            examples=[0.98],
        ),
    ]


@dataclass(frozen=True)
class Switch:
    """The best policy where it is first brought to the engines, from now on, by restarting them one after another."""

    rows: tuple[Row, ...]
    gain: Gain


@dataclass(frozen=True)
class Verdict:
    """The best policy, beside today's. Expected breaches are the breach probabilities summed over SLOs and horizons.

    Latency and throughput are medians over the scenarios at the longest horizon. `deployable`: `vllm serve` has a flag
    for every setting that the policy changes. `switch` is None where today's is best, or no time was left.
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
    gain: Gain
    switch: Switch | None = None


@dataclass(frozen=True)
class Forecast:
    """The near future of one pool under every policy."""

    pool: str
    time_seconds: float  # event time at which the scenario begins
    calibrated: bool
    rate_requests_per_second: float  # of the arrivals assumed, on average up to the longest horizon
    scenarios: int
    stopped_because: StopReason
    shed: tuple[str, ...]  # policies left out for want of time
    rows: tuple[Row, ...]  # by policy, then horizon
    first_breaches: tuple[FirstBreach, ...]  # by policy, then SLO
    failed: tuple[FailedPolicy, ...]
    verdict: Verdict
    notes: tuple[str, ...] = ()  # what a reader of these figures must know
    load: LoadOutlook | None = None  # the arrivals assumed, in full
    duration_seconds: float | None = None  # wall clock; set by who ran it

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN and infinity become None."""
        found: dict[str, Any] = plain(asdict(self))
        return found
