"""What is forecast, and how."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator

from kavier_twin.forecast.policy_set import refuse_doubles, with_today
from kavier_twin.forecast.slo import DEFAULT_SLOS, Slo
from kavier_twin.simulation.policies import DEFAULT_POLICIES, Policy

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Objective = Literal["slo", "latency", "cost", "energy"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RollingRestart(_Settings):
    """How a new policy is brought to the engines: some at a time are drained, stopped and started with empty caches.

    `max_unavailable_ratio` of the replicas are out at once, as a Kubernetes Deployment's `maxUnavailable` (25 % by
    default, rounded down). Where that is none, a new replica is started before an old one is stopped. What an engine
    still serves after `drain_seconds` begins again on another.
    """

    startup_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 120.0
    """Time until a restarted engine is ready."""

    drain_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 30.0
    """Time that an engine has to finish its requests. Unfinished requests start again on another replica."""

    max_unavailable_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25
    """Share of replicas that are unavailable at the same time. If that is none, a new replica starts first."""


class ForecastSettings(_Settings):
    """What is forecast, and how often.

    Earlier policies are more important: where a cycle's `budget_seconds` (default: 80 % of `every_seconds`) does not
    suffice for all, the last ones are left out. `scenarios` are simulated at most; fewer, but `least_scenarios`, where
    the best policy is known with probability `certainty` before.
    """

    every_seconds: Seconds = 30.0
    """Interval between forecasts."""

    budget_seconds: Seconds | None = Field(default=None, examples=[24.0])
    """Time budget of a forecast. The default is 80 % of `every_seconds`."""

    horizons_seconds: Annotated[tuple[Seconds, ...], Field(min_length=1)] = (60.0, 300.0, 900.0)
    """Horizons of the forecast."""

    scenarios: Count = Field(default=9, validation_alias=AliasChoices("scenarios", "futures"))
    """Maximum number of scenarios for each policy. Every third one follows the trend of the load, for alerts."""

    least_scenarios: Count = Field(default=4, validation_alias=AliasChoices("least_scenarios", "least_futures"))
    """Number of scenarios simulated before a forecast may stop early."""

    certainty: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Probability of the ranking at which a forecast may stop early."""

    quantiles: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = (0.05, 0.1, 0.5, 0.9, 0.95)
    """Quantiles over scenarios that are reported for each KPI."""

    workers: Count = Field(default_factory=lambda: os.cpu_count() or 1, examples=[2])
    """Number of concurrent simulations. The default is the number of CPU cores."""

    executor: Literal["threads", "ray"] = "threads"
    """Where simulations run: in threads of the daemon or on a Ray cluster."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the scenarios."""

    policies: tuple[Policy, ...] = Field(
        default=DEFAULT_POLICIES,
        examples=[[{"name": "today"}, {"name": "fp8", "overrides": {"kv_cache_dtype": "fp8"}}]],
    )
    """Policies to compare, the most important first. The one without overrides is the current policy."""

    slos: tuple[Slo, ...] = Field(
        default=DEFAULT_SLOS, examples=[[{"name": "fast", "metric": "ttft_p99_seconds", "threshold": 2.0}]]
    )
    """Service level objectives (SLOs) whose violation is predicted."""

    objective: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("slo", "latency")
    """What makes a policy the best. A later entry decides if the earlier ones are equal."""

    switch: RollingRestart = Field(default=RollingRestart(), examples=[{"startup_seconds": 300}])
    """How a new policy would be rolled out to the engines."""

    @property
    def cycle_seconds(self) -> float:
        """What a cycle may take, wall clock."""
        return self.budget_seconds or 0.8 * self.every_seconds

    @field_validator("horizons_seconds")
    @classmethod
    def _ascending(cls, horizons: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(horizons)))

    @field_validator("quantiles")
    @classmethod
    def _with_median(cls, quantiles: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({*quantiles, 0.5}))

    @field_validator("executor")
    @classmethod
    def _installed(cls, executor: str) -> str:
        if executor == "ray" and find_spec("ray") is None:
            raise ValueError("ray is not installed; install it (pip install 'kavier-twin[ray]') or set threads")
        return executor

    @field_validator("policies")
    @classmethod
    def _one_is_today(cls, policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
        return with_today(policies)

    @field_validator("slos")
    @classmethod
    def _by_name(cls, slos: tuple[Slo, ...]) -> tuple[Slo, ...]:
        refuse_doubles([slo.name for slo in slos])
        return slos

    @field_validator("objective")
    @classmethod
    def _each_once(cls, objective: tuple[Objective, ...]) -> tuple[Objective, ...]:
        refuse_doubles(list(objective))
        return objective
