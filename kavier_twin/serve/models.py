"""What is shown of the twin: immutable values that the API answers, and that metrics, page and terminal are made from.

The daemon publishes a new `TwinView` now and then; nobody downstream touches the mirror. Times are seconds. A value not
known is NaN or absent, never zero, and null in JSON. What a pool's view inherits from `PoolState`, `PoolFidelity`,
`PoolForecast` and `PoolScores` is what the API answers; FastAPI leaves out the rest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, computed_field

from kavier_twin.forecast.load import LoadOutlook
from kavier_twin.forecast.policy_set import Policies
from kavier_twin.forecast.result import Gain
from kavier_twin.mirror.fidelity.trust import Trust
from kavier_twin.mirror.fidelity.windows import WindowScore, find_score
from kavier_twin.mirror.replicas import Replica
from kavier_twin.scores.scorer import Scores
from kavier_twin.simulation.kpi_table import Kpi
from kavier_twin.simulation.plain import Figure

PoolName = Annotated[str, Field(description="The pool.", examples=["chat"])]
EventSeconds = Annotated[
    Figure, Field(description="On the stream's clock: unix time for live sources.", examples=[1767225600.5])
]
Flags = Annotated[tuple[str, ...], Field(description="Of `vllm serve`.", examples=[["--max-num-seqs 128"]])]
Deployable = Annotated[bool, Field(description="Whether the flags deploy all of it.", examples=[True])]
Quantiles = Mapping[float, Figure]
"""Quantile (0..1) over the simulated scenarios -> value."""
Counts = Mapping[str, int]

Pool = TypeVar("Pool")


class Pools(BaseModel, Generic[Pool]):
    """An answer: one entry for every pool asked for."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    pools: tuple[Pool, ...]


class Statistic(BaseModel):
    """A KPI, or one statistic of it over requests."""

    model_config = ConfigDict(from_attributes=True)

    kpi: str = Field(examples=["ttft_seconds"])
    statistic: str = Field(description="p50, p99, ... of a latency; else empty.", examples=["p99"])


class KpiTable(BaseModel):
    """Every KPI, in the order in which tables show them."""

    model_config = ConfigDict(from_attributes=True, json_schema_serialization_defaults_required=True)

    kpis: tuple[Kpi, ...]
    metrics: dict[str, Statistic] = Field(description="What SLOs bound, and scores and what-ifs name.")


# --- the mirror ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gauge:
    """A quantity as it is now: of the mirrored fleet, and the engines' own figure."""

    kpi: Annotated[str, Field(examples=["requests_running"])]
    mirrored: Annotated[Figure, Field(examples=[12])]
    observed: Annotated[Figure, Field(description="Null: no engine reported it lately.", examples=[11])]


@dataclass(frozen=True)
class SourceState:
    """Where records come from."""

    name: Annotated[str, Field(examples=["kafka:requests"])]
    ended: Annotated[bool, Field(examples=[False])]
    rejected: Annotated[
        Counts, Field(description="Pieces of input that made no record, by reason.", examples=[{"not-json": 2}])
    ]
    trouble: Annotated[str, Field(description="What keeps it from reading now; empty: nothing.", examples=[""])] = ""
    last_record_seconds: EventSeconds = math.nan
    lag_records: Annotated[Figure, Field(description="In the log and not read yet.", examples=[0])] = math.nan
    lost: Annotated[
        Counts, Field(description="Records that left the log unread, by reason.", examples=[{"expired": 0}])
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiling:
    """How many of the libraries of kernels that every twin needs are ready: nothing is mirrored before all are."""

    compiled: Annotated[int, Field(examples=[1])]
    kernels: Annotated[int, Field(examples=[3])]


@dataclass(frozen=True)
class KernelCounts:
    """Libraries of kernels of this process."""

    compiling: int = 0  # now
    compiled: int = 0  # since the start


@dataclass(frozen=True, kw_only=True)
class OfPool:
    """Something of one pool."""

    pool: PoolName


@dataclass(frozen=True, kw_only=True)
class PoolState(OfPool, ABC):
    """The mirror of one pool."""

    event_seconds: EventSeconds = math.nan
    lag_seconds: Annotated[
        Figure, Field(description="By which the mirror trails the newest record.", examples=[0.5])
    ] = math.nan
    last_record_unix_seconds: Annotated[Figure, Field(examples=[1767225600.5])] = math.nan
    buffered_records: Annotated[int, Field(examples=[4])] = 0
    records: Annotated[Counts, Field(description="By what became of them.", examples=[{"accepted": 5321}])] = field(
        default_factory=dict
    )
    dropped: Annotated[Counts, Field(description="Requests given up, by reason.", examples=[{"never_finished": 0}])] = (
        field(default_factory=dict)
    )
    finished_requests: Annotated[int, Field(examples=[2601])] = 0
    gauges: tuple[Gauge, ...] = ()
    replicas: tuple[Replica, ...] = ()
    sources: tuple[SourceState, ...] = ()
    notes: Annotated[tuple[str, ...], Field(description="What a reader must know.", examples=[[]])] = ()
    stale: Annotated[
        tuple[str, ...],
        Field(
            description="Why the figures are old, a line for each source that fails or is behind; empty: they are not.",
            examples=[[]],
        ),
    ] = ()
    compiling: Annotated[Compiling | None, Field(description="Null: the kernels are ready.", examples=[None])] = None

    @computed_field(  # type: ignore[prop-decorator]
        description="Why there are no figures yet; empty: there are.", examples=[[]]
    )
    @property
    @abstractmethod
    def not_ready(self) -> tuple[str, ...]:
        """Why there are no figures yet; empty: there are."""


class State(Pools[PoolState]):
    """The mirror of every pool asked for."""

    version: str = Field(examples=["0.1.0"])
    unix_seconds: float = Field(description="When this was answered.", examples=[1767225600.5])


@dataclass(frozen=True)
class Series:
    """One KPI over the times of its pool's history. Running and waiting requests are means over the replicas."""

    kpi: Annotated[str, Field(examples=["ttft_seconds"])]
    statistic: Annotated[str, Field(examples=["p99"])]
    mirrored: Annotated[tuple[Figure, ...], Field(examples=[[0.12, 0.13]])]
    observed: Annotated[tuple[Figure, ...], Field(examples=[[0.11, 0.14]])]


@dataclass(frozen=True)
class History:
    """The last hour, mirrored and observed."""

    event_seconds: Annotated[
        tuple[float, ...],
        Field(
            description="Ends of the stretches of time, mostly minutes, that the values are of: requests that ended "
            "or samples taken since the end before. The last stretch is under way and ends now.",
            examples=[[1767225600, 1767225624]],
        ),
    ] = ()
    series: tuple[Series, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PoolHistory(History, OfPool):
    """The last hour of one pool."""


# --- trust --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheAgreement:
    """A mirrored KV cache compared with what an engine's events tell of its own, in blocks."""

    pod: Annotated[str, Field(examples=["vllm-0"])]
    engine: Annotated[str, Field(description="Data-parallel rank.", examples=["0"])]
    agreement_ratio: Annotated[
        Figure, Field(description="Blocks both have, of those that either has.", examples=[0.97])
    ] = math.nan
    both: Annotated[int, Field(description="Blocks.", examples=[380])] = 0
    only_mirrored: Annotated[int, Field(examples=[12])] = 0
    only_real: Annotated[int, Field(examples=[8])] = 0
    filled: Annotated[
        int | None,
        Field(description="Blocks taken over from the engine at the start; null: none were.", examples=[350]),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PoolFidelity(OfPool):
    """How far to trust one pool's figures."""

    trusted: Annotated[bool, Field(description="Every KPI that is observed is.", examples=[True])] = False
    untrusted_reasons: Annotated[tuple[str, ...], Field(description="Why not; empty where it is.", examples=[[]])] = ()
    source: Annotated[str, Field(description="What the mirror follows: stream or metrics.", examples=["stream"])] = (
        "stream"
    )
    trust: Annotated[Mapping[str, Trust], Field(description="By KPI.")] = field(default_factory=dict)
    errors: tuple[WindowScore, ...] = ()
    caches: Annotated[tuple[CacheAgreement, ...], Field(description="Of engines that tell of their cache.")] = ()
    calibrated: Annotated[
        bool, Field(description="Whether step times were fitted to the stream or given.", examples=[True])
    ] = False
    calibrated_on_requests: Annotated[int, Field(examples=[800])] = 0
    step_time_scale_ratio: Annotated[
        float, Field(description="How much longer real steps last than the coefficients say.", examples=[1.02])
    ] = 1.0
    exact_cache_ratio: Annotated[
        Figure, Field(description="Requests whose prefix hits were exact.", examples=[0.993])
    ] = math.nan
    step_time: Annotated[
        Mapping[str, Figure], Field(description="Coefficients, seconds.", examples=[{"fixed": 0.008}])
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class CalibrationState:
    """How step times follow the fleet."""

    event_seconds: float = math.nan  # of the last fit
    changes: int = 0  # jumps of the fleet's speed that were met
    change_ratio: float = math.nan  # duration of a step after it over that before
    failures: Counts = field(default_factory=dict)  # reason -> fits not made


@dataclass(frozen=True)
class GpuPower:
    """Mean watts of one GPU over the last minutes, mirrored and observed."""

    mirrored_watts: float
    observed_watts: float
    calibrations: int = 0  # fits to observed watts so far

    @property
    def error_ratio(self) -> float:
        """(mirrored - observed) / observed; NaN where nothing was observed."""
        return self.mirrored_watts / self.observed_watts - 1.0 if self.observed_watts > 0.0 else math.nan


# --- forecasts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """One KPI of one policy over one horizon, with its spread over the simulated scenarios."""

    kpi: Annotated[str, Field(examples=["ttft_seconds"])]
    statistic: Annotated[str, Field(examples=["p99"])]
    quantiles: Annotated[Quantiles, Field(description="Quantile over the scenarios: value.", examples=[{"0.5": 0.8}])]
    trusted: Annotated[bool, Field(description="Whether the KPI is to be trusted now.", examples=[True])]


@dataclass(frozen=True)
class Horizon:
    """What a policy is forecast to lead to between now and `seconds` later."""

    seconds: Annotated[float, Field(examples=[300])]
    predicted: tuple[Predicted, ...]
    breach: Annotated[Mapping[str, float], Field(description="Probability by SLO.", examples=[{"ttft_p99": 0.25}])]
    breach_trusted: Annotated[
        Mapping[str, bool], Field(description="By SLO: whether its KPI is.", examples=[{"ttft_p99": True}])
    ]
    breach_interval: Annotated[
        Mapping[str, tuple[float, float]],
        Field(description="90 % credible interval of that probability by SLO.", examples=[{"ttft_p99": (0.05, 0.6)}]),
    ]

    def median(self, kpi: str, statistic: str = "") -> float:
        """The median over the scenarios; NaN where nothing is known."""
        return self.quantile(kpi, statistic, 0.5)

    def quantile(self, kpi: str, statistic: str, quantile: float) -> float:
        """A quantile over the scenarios; NaN where it is not known."""
        for entry in self.predicted:
            if (entry.kpi, entry.statistic) == (kpi, statistic):
                return entry.quantiles.get(quantile, math.nan)
        return math.nan


@dataclass(frozen=True)
class PolicyOutlook:
    """A policy and what is forecast under it."""

    name: Annotated[str, Field(examples=["half_max_num_seqs"])]
    flags: Flags
    deployable: Deployable
    horizons: tuple[Horizon, ...]
    problem: Annotated[str, Field(description="Why it could not be simulated; empty: it was.", examples=[""])] = ""
    first_breach: Annotated[
        Mapping[str, Quantiles],
        Field(
            description="By SLO: seconds to its first breach, in the worst tenth of scenarios and the median one; "
            "null: none within the longest horizon.",
            examples=[{"ttft_p99": {"0.1": 300.0, "0.5": 840.0}}],
        ),
    ] = field(default_factory=dict)
    first_breach_probability: Annotated[
        Mapping[str, float],
        Field(
            description="By SLO: share of scenarios in which it comes within the longest horizon. Alerts follow it.",
            examples=[{"ttft_p99": 0.55}],
        ),
    ] = field(default_factory=dict)
    in_force: Annotated[bool, Field(description="Whether it is today's: it overrides nothing.", examples=[False])] = (
        False
    )


@dataclass(frozen=True)
class Best:
    """The policy recommended: the best under the objectives, what it gains over today's, and how sure that is."""

    policy: Annotated[str, Field(examples=["half_max_num_seqs"])]
    flags: Flags
    deployable: Deployable
    reason: Annotated[str, Field(examples=["expected SLO breaches 0.25 (today's: 1.50)"])]
    gain: Gain | None = None
    switch: Annotated[
        tuple[Horizon, ...],
        Field(description="With the restart that brings it, from now on; empty: none needed."),
    ] = ()
    switch_gain: Annotated[Gain | None, Field(description="What is gained in spite of that restart.")] = None


@dataclass(frozen=True)
class Outlook:
    """One forecast."""

    event_seconds: Annotated[float, Field(description="Where the scenario begins.", examples=[1767225600.5])]
    made_unix_seconds: Annotated[float, Field(examples=[1767225601.0])]
    duration_seconds: Annotated[Figure, Field(description="That it took.", examples=[2.5])]
    scenarios: Annotated[int, Field(examples=[8])]
    rate_per_second: Annotated[Figure, Field(description="Arrivals assumed.", examples=[4.2])]
    calibrated: Annotated[bool, Field(description="False: not to be trusted.", examples=[True])]
    policies: Annotated[tuple[PolicyOutlook, ...], Field(description="Best first.")]
    best: Best | None
    load: LoadOutlook | None = None
    stopped_because: Annotated[
        str,
        Field(description="Why no more scenarios were simulated: certain, time, all_scenarios.", examples=["certain"]),
    ] = ""
    shed: Annotated[tuple[str, ...], Field(description="Policies for which no time was left.", examples=[()])] = ()
    notes: Annotated[tuple[str, ...], Field(description="What a reader of the figures must know.", examples=[()])] = ()


@dataclass(frozen=True)
class Objective:
    """A service level objective on a KPI that is shown."""

    name: Annotated[str, Field(examples=["ttft_p99"])]
    kpi: Annotated[str, Field(examples=["ttft_seconds"])]
    statistic: Annotated[str, Field(examples=["p99"])]
    threshold: Annotated[float, Field(examples=[1.0])]
    higher_is_better: Annotated[
        bool, Field(description="Breached below the threshold instead of above.", examples=[False])
    ]


@dataclass(frozen=True)
class SweepCounts:
    """What became of the forecast cycles since the start."""

    late: int = 0  # took longer than they come
    scenarios: int = 0  # simulated
    shed: Counts = field(default_factory=dict)  # policy -> cycles without time for it
    stopped: Counts = field(default_factory=dict)  # why no more scenarios were simulated -> cycles


@dataclass(frozen=True, kw_only=True)
class PoolForecast(OfPool):
    """What is forecast for one pool."""

    currency: Annotated[str, Field(description="Of costs (ISO 4217); empty: none told.", examples=["EUR"])] = ""
    every_seconds: Annotated[Figure, Field(description="Between two forecasts.", examples=[30])] = math.nan
    forecasts: Annotated[
        Counts, Field(description="Made since the start, by result.", examples=[{"succeeded": 12}])
    ] = field(default_factory=dict)
    slos: tuple[Objective, ...] = ()
    outlook: Outlook | None = None


@dataclass(frozen=True, kw_only=True)
class PoolScores(OfPool):
    """How good the forecasts of one pool have been."""

    scores: Scores = field(default_factory=Scores)


@dataclass(frozen=True, kw_only=True)
class PoolPolicies(Policies, OfPool):
    """The policies that one pool is forecast under."""

    settings: Annotated[tuple[str, ...], Field(description="What a policy may override.", examples=[["max_num_seqs"]])]


@dataclass(frozen=True)
class Engine:
    """An engine as its metrics tell it. `kv_block_seconds`: means since its process began, by what is measured."""

    pod: str
    engine: str
    model: str = ""
    vllm_version: str = ""
    kv_block_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unmodelled:
    """A feature that engines use and the twin does not model, and the KPIs that are not trusted for it."""

    name: str
    what: str
    seen_by: str
    spoils: tuple[str, ...]


# --- all of it ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TwinView(PoolState, PoolFidelity, PoolForecast, PoolScores):
    """The twin of one pool at one moment."""

    version: str
    unix_seconds: float
    frontend_seconds: float = math.nan
    checkpoint_unix_seconds: float | None = None  # of the last one written; NaN before, None where none are kept
    checkpoint_failures: int = 0
    step_time_deviation: Mapping[str, float] = field(default_factory=dict)  # of the coefficients that were fitted
    calibration: CalibrationState = CalibrationState()
    power: GpuPower | None = None  # None where no power model is given
    sweeps: SweepCounts = SweepCounts()
    history: History = History()
    engines: tuple[Engine, ...] = ()  # that metrics tell of
    unmodelled: tuple[Unmodelled, ...] = ()  # features of the engines
    engine_contradictions: int = 0  # settings that engines tell otherwise than the settings file or each other
    warming_up: bool = False  # the past of the logs is being mirrored
    kernels: KernelCounts = KernelCounts()

    @property
    def not_ready(self) -> tuple[str, ...]:
        """Why the figures are not there yet; empty when they are."""
        if self.compiling is not None:
            return (f"compiling kernels, {self.compiling.compiled} of {self.compiling.kernels}",)
        reasons = (
            (self.warming_up, "warming up: the past of the logs is being mirrored"),
            (not math.isfinite(self.event_seconds), "no telemetry record has been processed yet"),
            (self.outlook is None, "no forecast has been made yet"),
        )
        return tuple(why for holds, why in reasons if holds)

    def score(self, kpi: str, statistic: str = "") -> WindowScore | None:
        """A KPI as mirrored and as observed over the shortest window that has it, or None where neither is known."""
        return find_score(self.errors, kpi, statistic)
