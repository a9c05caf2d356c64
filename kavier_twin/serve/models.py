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
    Figure, Field(description="Event time: Unix seconds for live sources.", examples=[1767225600.5])
]
Flags = Annotated[tuple[str, ...], Field(description="Flags of `vllm serve`.", examples=[["--max-num-seqs 128"]])]
Deployable = Annotated[bool, Field(description="Whether the flags deploy the whole policy.", examples=[True])]
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
    statistic: str = Field(description="Statistic of a latency (p50, p99, ...); otherwise empty.", examples=["p99"])


class KpiTable(BaseModel):
    """Every KPI, in the order in which tables show them."""

    model_config = ConfigDict(from_attributes=True, json_schema_serialization_defaults_required=True)

    kpis: tuple[Kpi, ...]
    metrics: dict[str, Statistic] = Field(description="Metric name, as SLOs, scores and what-ifs use it.")


# --- the mirror ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gauge:
    """A quantity as it is now: of the mirrored fleet, and the engines' own figure."""

    kpi: Annotated[str, Field(examples=["requests_running"])]
    mirrored: Annotated[Figure, Field(examples=[12])]
    observed: Annotated[Figure, Field(description="Null if no engine reported it recently.", examples=[11])]


@dataclass(frozen=True)
class SourceState:
    """Where records come from."""

    name: Annotated[str, Field(examples=["kafka:requests"])]
    ended: Annotated[bool, Field(examples=[False])]
    rejected: Annotated[
        Counts,
        Field(
            description="Number of messages that could not be turned into records, by reason.",
            examples=[{"not-json": 2}],
        ),
    ]
    trouble: Annotated[str, Field(description="Why the source cannot be read. Empty if it can.", examples=[""])] = ""
    checks_only: Annotated[
        bool, Field(description="Whether the mirror can do without this source.", examples=[False])
    ] = False
    last_record_seconds: EventSeconds = math.nan
    lag_records: Annotated[
        Figure, Field(description="Records in the source that have not been read yet.", examples=[0])
    ] = math.nan
    lost: Annotated[
        Counts,
        Field(
            description="Records deleted from the source before they were read, by reason.", examples=[{"expired": 0}]
        ),
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
        Figure, Field(description="Event time between the newest record and the mirror's state.", examples=[0.5])
    ] = math.nan
    last_record_unix_seconds: Annotated[Figure, Field(examples=[1767225600.5])] = math.nan
    buffered_records: Annotated[int, Field(examples=[4])] = 0
    records: Annotated[Counts, Field(description="Number of records by result.", examples=[{"accepted": 5321}])] = (
        field(default_factory=dict)
    )
    dropped: Annotated[
        Counts,
        Field(description="Requests that the mirror could not follow, by reason.", examples=[{"never_finished": 0}]),
    ] = field(default_factory=dict)
    finished_requests: Annotated[int, Field(examples=[2601])] = 0
    gauges: tuple[Gauge, ...] = ()
    replicas: tuple[Replica, ...] = ()
    sources: tuple[SourceState, ...] = ()
    notes: Annotated[tuple[str, ...], Field(description="Notes for the reader.", examples=[[]])] = ()
    stale: Annotated[
        tuple[str, ...],
        Field(
            description="Why the figures are stale, one line for each failing or lagging source. Empty if fresh.",
            examples=[[]],
        ),
    ] = ()
    compiling: Annotated[Compiling | None, Field(description="Null if the kernels are ready.", examples=[None])] = None

    @computed_field(  # type: ignore[prop-decorator]
        description="Why there are no figures yet. Empty if there are.", examples=[[]]
    )
    @property
    @abstractmethod
    def not_ready(self) -> tuple[str, ...]:
        """Why there are no figures yet. Empty if there are."""


class State(Pools[PoolState]):
    """The mirror of every pool asked for."""

    version: str = Field(examples=["0.1.0"])
    unix_seconds: float = Field(description="Unix time of the answer.", examples=[1767225600.5])


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
            description="End times of the intervals that the values belong to, mostly minutes. A value covers the "
            "requests that finished, or the samples taken, since the previous end time. The last interval is "
            "incomplete and ends now.",
            examples=[[1767225600, 1767225624]],
        ),
    ] = ()
    series: tuple[Series, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PoolHistory(History, OfPool):
    """The last hour of one pool."""


# --- the prefix cache ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CapacityPoint:
    """The hit ratio that a KV cache size would have had on the requests of the last hour."""

    factor: Annotated[float, Field(description="Multiple of the current size.", examples=[2.0])]
    blocks: Annotated[int, Field(description="Usable blocks of each replica.", examples=[53998])]
    hit_ratio: Annotated[Figure, Field(description="Share of the prompt tokens.", examples=[0.61])]


@dataclass(frozen=True)
class ApplicationTokens:
    """Prompt tokens of the requests whose prompts begin with the same block, since the start."""

    application: Annotated[
        str, Field(description="Key of the first block; unknown, or others together.", examples=["a706ddc0e1f2a000"])
    ]
    requests: Annotated[int, Field(examples=[120])] = 0
    prompt_tokens: Annotated[int, Field(examples=[90000])] = 0
    hit_tokens: Annotated[int, Field(examples=[61000])] = 0
    missed_tokens: Annotated[Counts, Field(description="By reason.", examples=[{"first_seen": 29000}])] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class PrefixCache:
    """What the prefix cache is worth, and why it missed. Tokens count since the start of the process."""

    curve: Annotated[tuple[CapacityPoint, ...], Field(description="Smallest size first. Empty before a request.")] = ()
    requests: Annotated[int, Field(examples=[500])] = 0
    prompt_tokens: Annotated[int, Field(examples=[400000])] = 0
    hit_tokens: Annotated[int, Field(examples=[250000])] = 0
    missed_tokens: Annotated[
        Counts,
        Field(description="By reason. Sums to all prompt tokens not hit.", examples=[{"first_seen": 150000}]),
    ] = field(default_factory=dict)
    applications: Annotated[
        tuple[ApplicationTokens, ...], Field(description="Applications with most prompt tokens first.")
    ] = ()


@dataclass(frozen=True, kw_only=True)
class PoolPrefixCache(PrefixCache, OfPool):
    """The prefix cache of one pool."""


# --- trust --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheAgreement:
    """A mirrored KV cache compared with what an engine's events tell of its own, in blocks."""

    pod: Annotated[str, Field(examples=["vllm-0"])]
    engine: Annotated[str, Field(description="Data-parallel rank.", examples=["0"])]
    agreement_ratio: Annotated[
        Figure, Field(description="Blocks in both caches divided by blocks in either.", examples=[0.97])
    ] = math.nan
    both: Annotated[int, Field(description="Blocks.", examples=[380])] = 0
    only_mirrored: Annotated[int, Field(examples=[12])] = 0
    only_real: Annotated[int, Field(examples=[8])] = 0
    filled: Annotated[
        int | None,
        Field(description="Blocks taken over from the engine at the start. Null if there were none.", examples=[350]),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PoolFidelity(OfPool):
    """How far to trust one pool's figures."""

    trusted: Annotated[bool, Field(description="Whether all observed KPIs are trusted.", examples=[True])] = False
    untrusted_reasons: Annotated[
        tuple[str, ...], Field(description="Why the figures are not trusted. Empty if they are.", examples=[[]])
    ] = ()
    source: Annotated[str, Field(description="Source of the mirror: stream or metrics.", examples=["stream"])] = (
        "stream"
    )
    trust: Annotated[Mapping[str, Trust], Field(description="By KPI.")] = field(default_factory=dict)
    errors: tuple[WindowScore, ...] = ()
    caches: Annotated[tuple[CacheAgreement, ...], Field(description="Engines that publish KV events.")] = ()
    calibrated: Annotated[
        bool, Field(description="Whether step times were fitted to the stream or configured.", examples=[True])
    ] = False
    calibrated_on_requests: Annotated[int, Field(examples=[800])] = 0
    step_time_scale_ratio: Annotated[
        float,
        Field(description="Observed duration of an engine step divided by its modelled duration.", examples=[1.02]),
    ] = 1.0
    stream_coverage_ratio: Annotated[
        Figure,
        Field(
            description="Share of the requests received by the engines that records told of. Null without metrics.",
            examples=[1.0],
        ),
    ] = math.nan
    exact_cache_ratio: Annotated[
        Figure,
        Field(description="Share of requests whose prefix-cache hit was predicted to the token.", examples=[0.993]),
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
    quantiles: Annotated[Quantiles, Field(description="Value by quantile over the scenarios.", examples=[{"0.5": 0.8}])]
    trusted: Annotated[bool, Field(description="Whether the KPI is trusted now.", examples=[True])]


@dataclass(frozen=True)
class Horizon:
    """What a policy is forecast to lead to between now and `seconds` later."""

    seconds: Annotated[float, Field(examples=[300])]
    predicted: tuple[Predicted, ...]
    breach: Annotated[
        Mapping[str, float],
        Field(
            description="Probability that the SLO is violated within the horizon, by SLO.",
            examples=[{"ttft_p99": 0.25}],
        ),
    ]
    breach_trusted: Annotated[
        Mapping[str, bool],
        Field(description="Whether the SLO's KPI is trusted, by SLO.", examples=[{"ttft_p99": True}]),
    ]
    breach_interval: Annotated[
        Mapping[str, tuple[float, float]],
        Field(description="90 % credible interval of that probability, by SLO.", examples=[{"ttft_p99": (0.05, 0.6)}]),
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
    problem: Annotated[
        str, Field(description="Why the policy could not be simulated. Empty if it was.", examples=[""])
    ] = ""
    first_breach: Annotated[
        Mapping[str, Quantiles],
        Field(
            description="Seconds to the first violation, by SLO, in the worst 10 % of scenarios and in the median "
            "scenario. Null if there is none within the longest horizon.",
            examples=[{"ttft_p99": {"0.1": 300.0, "0.5": 840.0}}],
        ),
    ] = field(default_factory=dict)
    first_breach_probability: Annotated[
        Mapping[str, float],
        Field(
            description="Share of scenarios with a violation within the longest horizon, by SLO. Alerts use it.",
            examples=[{"ttft_p99": 0.55}],
        ),
    ] = field(default_factory=dict)
    in_force: Annotated[
        bool, Field(description="Whether it is the current policy, which overrides nothing.", examples=[False])
    ] = False


@dataclass(frozen=True)
class Best:
    """The policy recommended: the best under the objectives, what it gains over today's, and how sure that is."""

    policy: Annotated[str, Field(examples=["half_max_num_seqs"])]
    flags: Flags
    deployable: Deployable
    reason: Annotated[str, Field(examples=["expected SLO breaches 0.25 (current policy: 1.50)"])]
    gain: Gain | None = None
    switch: Annotated[
        tuple[Horizon, ...],
        Field(description="Verdict including the restart that the policy needs. Empty if it needs none."),
    ] = ()
    switch_gain: Annotated[Gain | None, Field(description="Gain including the cost of that restart.")] = None


@dataclass(frozen=True)
class Outlook:
    """One forecast."""

    event_seconds: Annotated[
        float, Field(description="Event time at which the forecast starts.", examples=[1767225600.5])
    ]
    made_unix_seconds: Annotated[float, Field(examples=[1767225601.0])]
    duration_seconds: Annotated[Figure, Field(description="Wall-clock seconds that the forecast took.", examples=[2.5])]
    scenarios: Annotated[int, Field(examples=[8])]
    rate_per_second: Annotated[Figure, Field(description="Arrivals assumed.", examples=[4.2])]
    calibrated: Annotated[bool, Field(description="False if the figures must not be trusted.", examples=[True])]
    policies: Annotated[tuple[PolicyOutlook, ...], Field(description="Best first.")]
    best: Best | None
    load: LoadOutlook | None = None
    stopped_because: Annotated[
        str,
        Field(description="Why simulation stopped: certain, time or all_scenarios.", examples=["certain"]),
    ] = ""
    shed: Annotated[
        tuple[str, ...], Field(description="Policies that were not simulated for lack of time.", examples=[()])
    ] = ()
    notes: Annotated[tuple[str, ...], Field(description="Notes for readers of the figures.", examples=[()])] = ()


@dataclass(frozen=True)
class Objective:
    """A service level objective on a KPI that is shown."""

    name: Annotated[str, Field(examples=["ttft_p99"])]
    kpi: Annotated[str, Field(examples=["ttft_seconds"])]
    statistic: Annotated[str, Field(examples=["p99"])]
    threshold: Annotated[float, Field(examples=[1.0])]
    higher_is_better: Annotated[
        bool,
        Field(
            description="Whether values below the threshold violate the SLO, instead of values above.", examples=[False]
        ),
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

    currency: Annotated[
        str, Field(description="Currency of costs (ISO 4217). Empty if not configured.", examples=["EUR"])
    ] = ""
    every_seconds: Annotated[Figure, Field(description="Interval between forecasts.", examples=[30])] = math.nan
    forecasts: Annotated[
        Counts, Field(description="Number of forecasts since the start, by result.", examples=[{"succeeded": 12}])
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
    prefix_cache: PrefixCache = PrefixCache()
    engines: tuple[Engine, ...] = ()  # that metrics tell of
    unmodelled: tuple[Unmodelled, ...] = ()  # features of the engines
    engine_contradictions: int = 0  # settings that engines tell otherwise than the settings file or each other
    warming_up: bool = False  # the past of the logs is being mirrored
    kernels: KernelCounts = KernelCounts()

    @property
    def starting(self) -> tuple[str, ...]:
        """What the process has still to do before it works; empty: nothing. No traffic is no reason."""
        if self.compiling is not None:
            return (f"compiling kernels, {self.compiling.compiled} of {self.compiling.kernels}",)
        return ("warming up: mirroring the past of the logs",) if self.warming_up else ()

    @property
    def not_ready(self) -> tuple[str, ...]:
        """Why the figures are not there yet; empty when they are."""
        if self.compiling is not None:
            return self.starting
        reasons = (
            (not math.isfinite(self.event_seconds), "no telemetry record has been processed yet"),
            (self.outlook is None, "no forecast has been made yet"),
        )
        return self.starting + tuple(why for holds, why in reasons if holds)

    def score(self, kpi: str, statistic: str = "") -> WindowScore | None:
        """A KPI as mirrored and as observed over the shortest window that has it, or None where neither is known."""
        return find_score(self.errors, kpi, statistic)
