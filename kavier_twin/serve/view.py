"""What the twin shows of itself at one moment: plain immutable values that the metrics and the page are made from.

The daemon publishes a new one now and then; nobody downstream touches the mirror. A value not known is NaN or absent,
never zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kavier_twin.forecast.load import LoadOutlook
from kavier_twin.forecast.result import Gain
from kavier_twin.forecast.scores import Scores
from kavier_twin.twin.replicas import Replica

Quantiles = Mapping[float, float]
"""Quantile (0..1) over the simulated futures -> value."""


@dataclass(frozen=True)
class Beside:
    """One KPI, mirrored and observed over the same window of requests, or both at the same moment.

    `statistic` is "mean", "p50", ... for a latency and empty otherwise. `error` is (mirrored - observed) / observed
    for latencies and the plain difference for ratios and counts.
    """

    kpi: str
    statistic: str
    mirrored: float
    observed: float
    error: float = math.nan
    requests: int = 0  # in the window; 0 where the values are of a moment
    trusted: bool = False


@dataclass(frozen=True)
class WindowError:
    """The error of one statistic of a KPI over a window of event time ("5m", "1h").

    `error` is (predicted - observed) / observed, or the plain difference for ratios. `observations`: requests, or
    samples of the engines' gauges, which are means over the replicas.
    """

    kpi: str
    statistic: str
    window: str
    observations: int
    predicted: float
    observed: float
    error: float


@dataclass(frozen=True)
class CalibrationState:
    """How step times follow the fleet."""

    event_seconds: float = math.nan  # of the last fit
    changes: int = 0  # jumps of the fleet's speed that were met
    change_event_seconds: float = math.nan  # since about when the last of them
    change_ratio: float = math.nan  # duration of a step after it over that before
    failures: Mapping[str, int] = field(default_factory=dict)  # reason -> fits not made


@dataclass(frozen=True)
class KpiTrust:
    """Whether a KPI is to be trusted now; `reason` tells why not."""

    trusted: bool
    reason: str = ""


@dataclass(frozen=True)
class Predicted:
    """One KPI of one policy over one horizon, with its spread over the simulated futures."""

    kpi: str
    statistic: str
    quantiles: Quantiles
    trusted: bool = False


@dataclass(frozen=True)
class Horizon:
    """What a policy is foreseen to lead to between now and `seconds` later."""

    seconds: float
    predicted: tuple[Predicted, ...]
    breach: Mapping[str, float]  # SLO -> probability
    breach_trusted: Mapping[str, bool] = field(default_factory=dict)
    breach_interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # SLO -> 90 % interval of it

    def median(self, kpi: str, statistic: str = "") -> float:
        """The median over the futures; NaN where nothing is known."""
        return self.quantile(kpi, statistic, 0.5)

    def quantile(self, kpi: str, statistic: str, quantile: float) -> float:
        """A quantile over the futures; NaN where it is not known."""
        for entry in self.predicted:
            if (entry.kpi, entry.statistic) == (kpi, statistic):
                return entry.quantiles.get(quantile, math.nan)
        return math.nan


@dataclass(frozen=True)
class PolicyOutlook:
    """A policy and what is foreseen under it."""

    name: str
    flags: tuple[str, ...]  # `vllm serve` flags that deploy it
    deployable: bool
    horizons: tuple[Horizon, ...]
    problem: str = ""  # why it could not be simulated
    first_breach: Mapping[str, Quantiles] = field(default_factory=dict)  # SLO -> seconds from now; infinite: none
    first_breach_probability: Mapping[str, float] = field(default_factory=dict)  # SLO -> within the longest horizon
    in_force: bool = False  # today's: it overrides nothing

    def at(self, horizon_seconds: float) -> Horizon | None:
        """The outlook over one horizon."""
        return next((horizon for horizon in self.horizons if horizon.seconds == horizon_seconds), None)


@dataclass(frozen=True)
class Best:
    """The verdict: the policy that is best under the objectives, what it gains over today's, and how sure that is.

    `switch` tells of it where the restart that brings it is counted from now on.
    """

    policy: str
    flags: tuple[str, ...]
    deployable: bool
    reason: str
    gain: Gain | None = None
    switch: tuple[Horizon, ...] = ()
    switch_gain: Gain | None = None


@dataclass(frozen=True)
class SweepCounts:
    """What became of the forecast cycles since the start."""

    late: int = 0  # took longer than they come
    futures: int = 0  # simulated
    shed: Mapping[str, int] = field(default_factory=dict)  # policy -> cycles without time for it
    stopped: Mapping[str, int] = field(default_factory=dict)  # why no more futures were simulated -> cycles


@dataclass(frozen=True)
class Outlook:
    """One forecast."""

    event_seconds: float
    made_unix_seconds: float
    duration_seconds: float
    futures: int
    rate_per_second: float
    calibrated: bool
    policies: tuple[PolicyOutlook, ...]  # best first
    best: Best | None
    load: LoadOutlook | None = None  # the arrivals assumed
    stopped_because: str = ""  # no more futures were simulated
    shed: tuple[str, ...] = ()  # policies without time for them
    notes: tuple[str, ...] = ()  # what a reader of its figures must know


@dataclass(frozen=True)
class SloLine:
    """A service level objective on a KPI that is shown."""

    name: str
    kpi: str
    statistic: str
    threshold: float
    higher_is_better: bool  # breached below the threshold


@dataclass(frozen=True)
class SourceState:
    """Where the records come from."""

    name: str
    ended: bool
    rejected: Mapping[str, int]  # reason -> pieces of input
    trouble: str = ""  # what keeps it from reading now
    last_record_seconds: float = math.nan  # event time of its newest record
    lag_records: float = math.nan  # in the log and not read yet
    lost: Mapping[str, int] = field(default_factory=dict)  # reason -> records that left the log unread


@dataclass(frozen=True)
class CacheBeside:
    """An engine's KV cache as its events tell, beside the mirrored one: blocks, and those in both per block in either.

    `filled`: blocks that the mirror took over when the twin began, None where it took none over.
    """

    pod: str
    engine: str  # data-parallel rank
    agreement_ratio: float = math.nan
    both: int = 0
    only_mirrored: int = 0
    only_real: int = 0
    filled: int | None = None


@dataclass(frozen=True)
class PowerBeside:
    """Mean watts of one GPU over the last minutes, mirrored and observed, and the power model in use."""

    mirrored_watts: float
    observed_watts: float
    idle_watts: float
    compute_watts: float  # above idle
    memory_watts: float
    calibrations: int = 0  # fits to observed watts so far

    @property
    def error_ratio(self) -> float:
        """(mirrored - observed) / observed; NaN where nothing was observed."""
        return self.mirrored_watts / self.observed_watts - 1.0 if self.observed_watts > 0.0 else math.nan


@dataclass(frozen=True)
class History:
    """The last hour in stretches of event time: for each, what ended or was sampled in it, mirrored and observed.

    Running and waiting requests are means over the replicas. The last stretch is under way and ends now.
    """

    event_seconds: tuple[float, ...] = ()  # ends of the stretches
    series: Mapping[tuple[str, str], tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """(KPI, statistic) -> (mirrored, observed) of each stretch."""


@dataclass(frozen=True)
class Compiling:
    """How many libraries of kernels are ready of those that every twin needs: nothing is mirrored before all are."""

    compiled: int
    kernels: int


@dataclass(frozen=True)
class KernelCounts:
    """Libraries of kernels of this process."""

    compiling: int = 0  # now
    compiled: int = 0  # since the start


@dataclass(frozen=True)
class TwinView:
    """The twin of one pool at one moment."""

    pool: str
    version: str
    unix_seconds: float
    event_seconds: float = math.nan  # where the mirror stands, on the stream's clock
    lag_seconds: float = math.nan
    buffered_records: int = 0
    last_record_unix_seconds: float = math.nan
    records: Mapping[str, int] = field(default_factory=dict)  # result -> records
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> requests
    finished_requests: int = 0
    calibrated: bool = False
    calibrated_on_requests: int = 0
    pace_ratio: float = 1.0
    frontend_seconds: float = math.nan
    checkpoint_unix_seconds: float | None = None  # of the last one written; NaN before, None where none are kept
    checkpoint_failures: int = 0
    step_time: Mapping[str, float] = field(default_factory=dict)  # coefficient -> seconds
    step_time_deviation: Mapping[str, float] = field(default_factory=dict)  # of those fitted
    calibration: CalibrationState = CalibrationState()
    exact_cache_ratio: float = math.nan
    beside: tuple[Beside, ...] = ()
    errors: tuple[WindowError, ...] = ()
    trust: Mapping[str, KpiTrust] = field(default_factory=dict)  # every KPI that is predicted -> now
    trusted: bool = False  # of the KPIs observed, every one
    untrusted_reasons: tuple[str, ...] = ()
    source: str = "stream"  # what the mirror follows: a stream of requests, or "metrics" alone
    replicas: tuple[Replica, ...] = ()
    caches: tuple[CacheBeside, ...] = ()
    power: PowerBeside | None = None  # None where no power model is told
    sources: tuple[SourceState, ...] = ()
    forecasts: Mapping[str, int] = field(default_factory=dict)  # result -> cycles
    sweeps: SweepCounts = SweepCounts()
    every_seconds: float = math.nan  # between two forecasts
    slos: tuple[SloLine, ...] = ()
    history: History = History()
    outlook: Outlook | None = None
    scores: Scores = field(default_factory=Scores)  # of the forecasts whose time has come
    currency: str = ""  # of costs, ISO 4217; empty where no footprint is told
    notes: tuple[str, ...] = ()  # what a reader of these figures must know
    stale: tuple[str, ...] = ()  # why the figures are old: one line for each source that fails or is behind
    engine_contradictions: int = 0  # settings that engines tell otherwise than the settings file or each other
    warming_up: bool = False  # the past of the logs is being mirrored
    compiling: Compiling | None = None  # None: the kernels are ready
    kernels: KernelCounts = KernelCounts()

    def not_ready(self) -> list[str]:
        """Why the figures are not there yet; empty when they are."""
        if self.compiling is not None:
            return [f"compiling kernels, {self.compiling.compiled} of {self.compiling.kernels}"]
        reasons = []
        if self.warming_up:
            reasons.append("warming up: the past of the logs is being mirrored")
        if not math.isfinite(self.event_seconds):
            reasons.append("no telemetry record has been processed yet")
        if self.outlook is None:
            reasons.append("no forecast has been made yet")
        return reasons

    def value(self, kpi: str, statistic: str = "") -> Beside | None:
        """A KPI mirrored beside observed, or None where neither is known."""
        return next((entry for entry in self.beside if (entry.kpi, entry.statistic) == (kpi, statistic)), None)
