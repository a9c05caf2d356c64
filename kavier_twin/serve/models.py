"""What the HTTP API answers. A value not known is null, never zero; times are seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kavier_twin.simulation.kpi_table import Kpi


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _by_text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{key:g}" if isinstance(key, float) else key: entry for key, entry in value.items()}
    return value


def _reasons(value: Any) -> Any:
    return value() if callable(value) else value


Figure = Annotated[float | None, BeforeValidator(_known)]
Quantiles = Annotated[dict[str, Figure], BeforeValidator(_by_text)]
PoolName = Annotated[str, Field(description="The pool.", examples=["chat"])]
EventSeconds = Annotated[
    Figure, Field(description="On the stream's clock: unix time for live sources.", examples=[1767225600.5])
]


class _Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True, frozen=True)


class Statistic(_Answer):
    """A KPI, or one statistic of it over requests."""

    kpi: str = Field(examples=["ttft_seconds"])
    statistic: str = Field(description="p50, p99, ... of a latency; else empty.", examples=["p99"])


class KpiTable(_Answer):
    """Every KPI, in the order in which tables show them."""

    kpis: tuple[Kpi, ...]
    metrics: dict[str, Statistic] = Field(description="What SLOs bound, and scores and what-ifs name.")


class Beside(_Answer):
    """One KPI, mirrored beside observed."""

    kpi: str = Field(examples=["ttft_seconds"])
    statistic: str = Field(description="mean, p50, ... of a latency; else empty.", examples=["mean"])
    mirrored: Figure = Field(examples=[0.12])
    observed: Figure = Field(examples=[0.11])
    error: Figure = Field(description="Relative for latencies, a difference for the rest.", examples=[0.09])
    requests: int = Field(description="In the window; 0 where the values are of this moment.", examples=[500])
    trusted: bool = Field(description="Whether the KPI is to be trusted now.", examples=[True])


class Replica(_Answer):
    """A mirrored replica; counters since it joined."""

    replica: int = Field(examples=[0])
    pod: str = Field(description="That it stands for; empty: none has claimed it.", examples=["vllm-0"])
    state: str = Field(description="serving or draining.", examples=["serving"])
    requests_running: int = Field(examples=[12])
    requests_waiting: int = Field(examples=[3])
    kv_cache_usage_ratio: Figure = Field(examples=[0.71])
    prefix_cache_hit_ratio: Figure = Field(examples=[0.44])
    requests_finished: int = Field(examples=[1830])
    output_tokens: int = Field(examples=[240113])
    preemptions: int = Field(examples=[0])


class LiveRequest(_Answer):
    """A request in a replica."""

    state: str = Field(description="prefill, decode, waiting, preempted or loading.", examples=["decode"])
    age_seconds: float = Field(examples=[1.25])
    prompt_tokens: int = Field(examples=[812])
    output_tokens: int = Field(description="So far.", examples=[57])
    cached_tokens: int = Field(description="Prefix hits at its admission.", examples=[512])
    blocks: int = Field(examples=[28])
    preemptions: int = Field(examples=[0])


class ReplicaDetail(_Answer):
    """A mirrored replica with its cache and its batch."""

    summary: Replica
    block_tokens: int = Field(description="Tokens of a block.", examples=[16])
    blocks: int = Field(description="Without vLLM's null block.", examples=[2999])
    blocks_in_use: int = Field(description="Held by requests.", examples=[2130])
    blocks_cached: int = Field(description="Not held; their content can still be found.", examples=[869])
    blocks_empty: int = Field(examples=[0])
    evictions: int = Field(description="Blocks that lost their content since it joined.", examples=[14031])
    max_num_seqs: int = Field(examples=[256])
    max_num_batched_tokens: int = Field(examples=[8192])
    requests: tuple[LiveRequest, ...] = Field(description="Running first, then waiting; the first 256.")


class Source(_Answer):
    """Where records come from."""

    name: str = Field(examples=["kafka:requests"])
    ended: bool = Field(examples=[False])
    trouble: str = Field(description="What keeps it from reading now; empty: nothing.", examples=[""])
    rejected: dict[str, int] = Field(
        description="Pieces of input that made no record, by reason.", examples=[{"not-json": 2}]
    )
    lost: dict[str, int] = Field(description="Records that left the log unread, by reason.", examples=[{"expired": 0}])
    last_record_seconds: EventSeconds
    lag_records: Figure = Field(description="In the log and not read yet.", examples=[0])


class Compiling(_Answer):
    """How far the kernels are, on the first start of a version."""

    compiled: int = Field(examples=[120])
    kernels: int = Field(examples=[258])


class PoolState(_Answer):
    """The mirror of one pool."""

    pool: PoolName
    not_ready: Annotated[tuple[str, ...], BeforeValidator(_reasons)] = Field(
        description="Why there are no figures yet; empty: there are.", examples=[[]]
    )
    compiling: Compiling | None = Field(description="Null: the kernels are ready.", examples=[None])
    stale: tuple[str, ...] = Field(
        description="Why the figures are old, a line for each source that fails or is behind; empty: they are not.",
        examples=[[]],
    )
    event_seconds: EventSeconds
    lag_seconds: Figure = Field(description="By which the mirror trails the newest record.", examples=[0.5])
    last_record_unix_seconds: Figure = Field(examples=[1767225600.5])
    buffered_records: int = Field(examples=[4])
    records: dict[str, int] = Field(description="By what became of them.", examples=[{"accepted": 5321}])
    dropped: dict[str, int] = Field(description="Requests given up, by reason.", examples=[{"never_finished": 0}])
    finished_requests: int = Field(examples=[2601])
    beside: tuple[Beside, ...]
    replicas: tuple[Replica, ...]
    sources: tuple[Source, ...]
    notes: tuple[str, ...] = Field(description="What a reader must know.", examples=[[]])


class State(_Answer):
    """The mirror of every pool asked for."""

    version: str = Field(examples=["0.1.0"])
    unix_seconds: float = Field(description="When this was answered.", examples=[1767225600.5])
    pools: tuple[PoolState, ...]


class WindowError(_Answer):
    """The error of one statistic of a KPI over a window of event time, predictions made before the end was known."""

    kpi: str = Field(examples=["ttft_seconds"])
    statistic: str = Field(examples=["mean"])
    window: str = Field(examples=["5m"])
    observations: int = Field(description="Requests, or samples of gauges.", examples=[412])
    predicted: Figure = Field(examples=[0.12])
    observed: Figure = Field(examples=[0.11])
    error: Figure = Field(description="Relative; a plain difference for ratios.", examples=[0.09])


class KpiTrust(_Answer):
    """Whether a KPI is to be trusted now."""

    trusted: bool = Field(examples=[False])
    reason: str = Field(description="Why not; empty where it is.", examples=["fewer than 30 observations"])


class CacheBeside(_Answer):
    """A mirrored cache beside what an engine says of its own."""

    pod: str = Field(examples=["vllm-0"])
    engine: str = Field(examples=["0"])
    agreement_ratio: Figure = Field(description="Blocks both have, of those that either has.", examples=[0.97])
    both: int = Field(description="Blocks.", examples=[380])
    only_mirrored: int = Field(examples=[12])
    only_real: int = Field(examples=[8])


class PoolFidelity(_Answer):
    """How far to trust one pool's figures."""

    pool: PoolName
    trusted: bool = Field(description="Every KPI that is observed is.", examples=[True])
    untrusted_reasons: tuple[str, ...] = Field(description="Why not; empty where it is.", examples=[[]])
    source: str = Field(description="What the mirror follows: stream or metrics.", examples=["stream"])
    trust: dict[str, KpiTrust] = Field(description="By KPI.")
    errors: tuple[WindowError, ...]
    caches: tuple[CacheBeside, ...] = Field(description="Of engines that tell of their cache.")
    calibrated: bool = Field(description="Whether step times were fitted to the stream or given.", examples=[True])
    calibrated_on_requests: int = Field(examples=[800])
    step_time_scale_ratio: float = Field(
        description="How much longer real steps last than the coefficients say.", examples=[1.02]
    )
    exact_cache_ratio: Figure = Field(description="Requests whose prefix hits were exact.", examples=[0.993])
    step_time: dict[str, Figure] = Field(description="Coefficients.", examples=[{"fixed": 0.008}])
    beside: tuple[Beside, ...]


class Fidelity(_Answer):
    """How far to trust the figures of every pool asked for."""

    pools: tuple[PoolFidelity, ...]


class Predicted(_Answer):
    """One KPI over one horizon."""

    kpi: str = Field(examples=["ttft_seconds"])
    statistic: str = Field(examples=["p99"])
    quantiles: Quantiles = Field(description="Quantile over the scenarios: value.", examples=[{"0.5": 0.8}])
    trusted: bool = Field(description="Whether the KPI is to be trusted now.", examples=[True])


class Horizon(_Answer):
    """What is foreseen between now and `seconds` later."""

    seconds: float = Field(examples=[300])
    predicted: tuple[Predicted, ...]
    breach: dict[str, float] = Field(description="Probability by SLO.", examples=[{"ttft_p99": 0.25}])
    breach_trusted: dict[str, bool] = Field(description="By SLO: whether its KPI is.", examples=[{"ttft_p99": True}])
    breach_interval: dict[str, tuple[float, float]] = Field(
        description="90 % credible interval of that probability by SLO.", examples=[{"ttft_p99": (0.05, 0.6)}]
    )


class PolicyOutlook(_Answer):
    """A policy and what is foreseen under it."""

    name: str = Field(examples=["half_max_num_seqs"])
    flags: tuple[str, ...] = Field(description="Of `vllm serve`.", examples=[["--max-num-seqs 128"]])
    deployable: bool = Field(description="Whether the flags deploy all of it.", examples=[True])
    problem: str = Field(description="Why it could not be simulated; empty: it was.", examples=[""])
    in_force: bool = Field(description="Whether it is today's.", examples=[False])
    horizons: tuple[Horizon, ...]
    first_breach: dict[str, Quantiles] = Field(
        description="By SLO: seconds to its first breach, in the worst tenth of scenarios and the median one; "
        "null: none within the longest horizon.",
        examples=[{"ttft_p99": {"0.1": 300.0, "0.5": 840.0}}],
    )
    first_breach_probability: dict[str, float] = Field(
        description="By SLO: the share of scenarios in which it comes within the longest horizon. Alerts follow it.",
        examples=[{"ttft_p99": 0.55}],
    )


class Gain(_Answer):
    """What a policy gains over today's."""

    by_objective: dict[str, float] = Field(
        description="Of slo: expected breaches avoided; of the rest: the share saved.",
        examples=[{"slo": 1.25, "latency": 0.2}],
    )
    decided_by: str = Field(description="The objective in which they differ.", examples=["slo"])
    probability: Figure = Field(description="That it is truly better in that objective.", examples=[0.98])


class Best(_Answer):
    """The policy recommended."""

    policy: str = Field(examples=["half_max_num_seqs"])
    flags: tuple[str, ...] = Field(examples=[["--max-num-seqs 128"]])
    deployable: bool = Field(examples=[True])
    reason: str = Field(examples=["expected SLO breaches 0.25 (today's: 1.50)"])
    gain: Gain | None
    switch: tuple[Horizon, ...] = Field(description="With the restart that brings it, from now on; empty: none needed.")
    switch_gain: Gain | None = Field(description="What is gained in spite of that restart.")


class LoadAhead(_Answer):
    """The arrival rate over one horizon, requests per second."""

    horizon_seconds: float = Field(examples=[300])
    mean: float = Field(examples=[4.2])
    p10: float = Field(description="Of the rate at the horizon's end.", examples=[3.5])
    p90: float = Field(description="Of the rate at the horizon's end.", examples=[5.0])
    by_method: dict[str, float] = Field(description="The mean by method.", examples=[{"persistence": 4.0}])


class LoadOutlook(_Answer):
    """How the load to come is forecast."""

    method: str = Field(description="In use: best over the recent past.", examples=["exponential_smoothing"])
    errors: dict[str, Figure] = Field(
        description="Mean absolute scaled error by method; null: not tried yet.", examples=[{"persistence": 1.1}]
    )
    dispersion_ratio: float = Field(description="Variance over mean of arrival counts; 1: Poisson.", examples=[1.0])
    refitted_seconds: Figure = Field(description="Event time of the last fit.", examples=[1767225600.5])
    ahead: tuple[LoadAhead, ...]


class Outlook(_Answer):
    """One forecast."""

    event_seconds: float = Field(description="Where the scenario begins.", examples=[1767225600.5])
    made_unix_seconds: float = Field(examples=[1767225601.0])
    duration_seconds: Figure = Field(description="That it took.", examples=[2.5])
    scenarios: int = Field(examples=[8])
    rate_per_second: Figure = Field(description="Arrivals assumed.", examples=[4.2])
    calibrated: bool = Field(description="False: not to be trusted.", examples=[True])
    policies: tuple[PolicyOutlook, ...] = Field(description="Best first.")
    best: Best | None
    load: LoadOutlook | None
    stopped_because: str = Field(
        description="Why no more scenarios were simulated: certain, time, all_scenarios.", examples=["certain"]
    )
    shed: tuple[str, ...] = Field(description="Policies for which no time was left.", examples=[()])
    notes: tuple[str, ...] = Field(description="What a reader of the figures must know.", examples=[()])


class SloTold(_Answer):
    """A service level objective."""

    name: str = Field(examples=["ttft_p99"])
    kpi: str = Field(examples=["ttft_seconds"])
    statistic: str = Field(examples=["p99"])
    threshold: float = Field(examples=[1.0])
    higher_is_better: bool = Field(description="Breached below the threshold instead of above.", examples=[False])


class PoolForecast(_Answer):
    """What is foreseen for one pool."""

    pool: PoolName
    currency: str = Field(description="Of costs (ISO 4217); empty: none told.", examples=["EUR"])
    every_seconds: Figure = Field(description="Between two forecasts.", examples=[30])
    forecasts: dict[str, int] = Field(description="Made since the start, by result.", examples=[{"succeeded": 12}])
    slos: tuple[SloTold, ...]
    outlook: Outlook | None


class Forecasts(_Answer):
    """What is foreseen for every pool asked for."""

    pools: tuple[PoolForecast, ...]


class PolicyTold(_Answer):
    """A policy that is forecast."""

    name: str = Field(examples=["half_max_num_seqs"])
    overrides: dict[str, bool | int | float | str] = Field(examples=[{"max_num_seqs": "0.5x"}])
    flags: tuple[str, ...] = Field(description="Of `vllm serve`.", examples=[["--max-num-seqs 128"]])
    deployable: bool = Field(description="Whether the flags deploy all of it.", examples=[True])
    problem: str = Field(description="Why it cannot be applied; empty: it can.", examples=[""])


class PoolPolicies(_Answer):
    """The policies that one pool is forecast under."""

    pool: PoolName
    policies: tuple[PolicyTold, ...]
    configured: bool = Field(description="In the settings file; false: set through this API.", examples=[False])
    kept: bool = Field(
        description="A restart of the twin goes on with them, as long as the settings file names the same as now; "
        "false: it keeps no checkpoints, or could not write.",
        examples=[True],
    )
    settings: tuple[str, ...] = Field(description="What a policy may override.", examples=[["max_num_seqs"]])


class Policies(_Answer):
    """The policies of every pool asked for."""

    pools: tuple[PoolPolicies, ...]


class Series(_Answer):
    """One KPI over the times of its pool's history. Running and waiting requests are means over the replicas."""

    kpi: str = Field(examples=["ttft_seconds"])
    statistic: str = Field(examples=["p99"])
    mirrored: tuple[Figure, ...] = Field(examples=[[0.12, 0.13]])
    observed: tuple[Figure, ...] = Field(examples=[[0.11, 0.14]])


class PoolHistory(_Answer):
    """The last hour of one pool."""

    pool: PoolName
    event_seconds: tuple[float, ...] = Field(
        description="Ends of the stretches of time, mostly minutes, that the values are of: requests that ended, or "
        "samples taken, since the one before. The last stretch is under way.",
        examples=[[1767225600, 1767225624]],
    )
    series: tuple[Series, ...]


class Histories(_Answer):
    """The last hour of every pool asked for."""

    pools: tuple[PoolHistory, ...]
