"""Key performance indicators of a stretch of simulation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.data_plane import Samples
from kavier_twin.simulation.impact import Impact
from kavier_twin.simulation.plain import plain
from kavier_twin.simulation.power import Reading
from kavier_twin.simulation.state import FleetState, Records

QUANTILES = (0.50, 0.90, 0.95, 0.99)


@dataclass(frozen=True)
class Slo:
    """Objectives of one request: it is good if it meets all that are given. Seconds."""

    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    e2e_seconds: float | None = None


@dataclass(frozen=True)
class Distribution:
    """Mean and quantiles of a latency, seconds. NaN without observations."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    count: int

    @staticmethod
    def of(values: npt.NDArray[np.float64]) -> Distribution:
        values = values[np.isfinite(values)]
        if values.size == 0:
            return Distribution(np.nan, np.nan, np.nan, np.nan, np.nan, 0)
        p50, p90, p95, p99 = map(float, np.quantile(values, QUANTILES))
        return Distribution(float(values.mean()), p50, p90, p95, p99, values.size)

    @staticmethod
    def of_histogram(counts: npt.NDArray[np.int64]) -> Distribution:
        """From a histogram with the bins of `state.ITL_*`: quantiles are exact to a bin (2 %)."""
        total = int(counts.sum())
        if total == 0:
            return Distribution(np.nan, np.nan, np.nan, np.nan, np.nan, 0)
        edges = layout.ITL_SMALLEST_SECONDS * layout.ITL_BIN_RATIO ** np.arange(counts.size + 1)
        centres = np.sqrt(edges[:-1] * edges[1:])
        reached = np.cumsum(counts)
        at = np.searchsorted(reached, np.array(QUANTILES) * total, side="left")
        p50, p90, p95, p99 = map(float, centres[at])
        return Distribution(float((centres * counts).sum() / total), p50, p90, p95, p99, total)


@dataclass(frozen=True)
class Counters:
    """Cumulative counts and integrals of a fleet at one moment; the difference of two describes what lay between."""

    time_seconds: float
    replicas: int
    steps: int
    query_tokens: int
    hit_tokens: int
    external_query_tokens: int
    host_hit_tokens: int
    disk_hit_tokens: int
    loaded_bytes: int
    stored_bytes: int
    read_bytes: int
    written_bytes: int
    dropped_stores: int
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    preemptions: int
    evictions: int
    stranded_tokens: int  # cached but not hit, an ancestor being gone; not counted with LRU
    busy_seconds: float
    running_seconds: float
    waiting_seconds: float
    used_block_seconds: float
    usable_blocks: int
    itl_counts: npt.NDArray[np.int64]
    reading: Reading  # what energy follows from

    @staticmethod
    def of(state: FleetState, time_seconds: float) -> Counters:
        replicas = state.replicas
        alive = replicas["alive"] == 1
        sums = {
            name: replicas[name].sum().item()
            for name in (
                "steps",
                "query_tokens",
                "hit_tokens",
                "external_query_tokens",
                "host_hit_tokens",
                "disk_hit_tokens",
                "loaded_bytes",
                "stored_bytes",
                "read_bytes",
                "written_bytes",
                "dropped_stores",
                "prompt_tokens",
                "computed_tokens",
                "output_tokens",
                "preemptions",
                "evictions",
                "stranded_tokens",
                "busy_seconds",
                "running_seconds",
                "waiting_seconds",
                "used_block_seconds",
            )
        }
        return Counters(
            time_seconds=time_seconds,
            replicas=int(alive.sum()),
            usable_blocks=int((state.engines["num_blocks"] - 1)[alive].sum()),
            itl_counts=state.itl_counts.sum(axis=0),
            reading=Reading.of(state, time_seconds),
            **sums,
        )


@dataclass(frozen=True)
class Kpis:
    """What a stretch of simulation amounts to. Ratios are 0..1, rates per second, latencies in seconds."""

    duration_seconds: float
    requests: int
    finished: int
    rejected: int
    ttft: Distribution
    itl: Distribution
    tpot: Distribution
    e2e: Distribution
    queue: Distribution
    prefix_cache_hit_ratio: float
    prefix_cache_hit_tokens: int
    external_cache_hit_ratio: float  # of the tokens that the GPU's cache did not have: vllm:external_prefix_cache_*
    host_hit_tokens: int
    disk_hit_tokens: int
    offload_loaded_bytes: int
    offload_stored_bytes: int
    disk_read_bytes: int
    disk_written_bytes: int
    offload_dropped_stores: int
    prompt_tokens: int
    output_tokens: int
    prompt_tokens_per_second: float
    output_tokens_per_second: float
    requests_per_second: float
    running_mean: float
    waiting_mean: float
    kv_usage_mean_ratio: float
    running_peak: int | None
    waiting_peak: int | None
    kv_usage_peak_ratio: float | None
    busy_ratio: float
    preemptions: int
    evictions: int
    engine_steps: int
    goodput_requests_per_second: float | None
    goodput_ratio: float | None
    impact: Impact | None  # energy, carbon and cost, where the fleet's footprint is told

    @property
    def cache_hit_ratio(self) -> float:
        """Of all prompt tokens, those that the GPU's cache or a tier behind it had."""
        gpu = self.prefix_cache_hit_ratio
        return gpu + (1.0 - gpu) * self.external_cache_hit_ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN becomes None."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def kpis(
    outcomes: Records,
    before: Counters | None,
    after: Counters,
    *,
    start_seconds: float,
    samples: Samples | None = None,
    slo: Slo | None = None,
    impact: Impact | None = None,
) -> Kpis:
    """KPIs of the requests in `outcomes` and of the time between two counter readings (`before` None: from zero)."""
    duration = max(after.time_seconds - start_seconds, 1e-12)

    def delta(name: str) -> Any:
        return getattr(after, name) - (getattr(before, name) if before is not None else 0)

    finished = outcomes["status"] == layout.FINISHED
    done = outcomes if finished.all() else outcomes[finished]
    ttft = done["first_token"] - done["arrival"]
    e2e = done["finish"] - done["arrival"]
    several = done["output"] > 1
    tpot = np.where(several, (done["finish"] - done["first_token"]) / np.maximum(done["output"] - 1, 1), np.nan)
    queries = delta("query_tokens")
    external = delta("host_hit_tokens") + delta("disk_hit_tokens")
    block_seconds = after.usable_blocks * duration
    good = good_requests(done, slo) if slo is not None else None
    return Kpis(
        duration_seconds=duration,
        requests=int(outcomes.size),
        finished=int(done.size),
        rejected=int(outcomes.size - done.size),
        ttft=Distribution.of(ttft),
        itl=Distribution.of_histogram(delta("itl_counts")),
        tpot=Distribution.of(tpot),
        e2e=Distribution.of(e2e),
        queue=Distribution.of(done["scheduled"] - done["arrival"]),
        prefix_cache_hit_ratio=delta("hit_tokens") / queries if queries else 0.0,
        prefix_cache_hit_tokens=delta("hit_tokens"),
        external_cache_hit_ratio=external / asked if (asked := delta("external_query_tokens")) else 0.0,
        host_hit_tokens=delta("host_hit_tokens"),
        disk_hit_tokens=delta("disk_hit_tokens"),
        offload_loaded_bytes=delta("loaded_bytes"),
        offload_stored_bytes=delta("stored_bytes"),
        disk_read_bytes=delta("read_bytes"),
        disk_written_bytes=delta("written_bytes"),
        offload_dropped_stores=delta("dropped_stores"),
        prompt_tokens=delta("prompt_tokens"),
        output_tokens=delta("output_tokens"),
        prompt_tokens_per_second=delta("prompt_tokens") / duration,
        output_tokens_per_second=delta("output_tokens") / duration,
        requests_per_second=done.size / duration,
        running_mean=delta("running_seconds") / duration,
        waiting_mean=delta("waiting_seconds") / duration,
        kv_usage_mean_ratio=delta("used_block_seconds") / block_seconds if block_seconds else 0.0,
        running_peak=max(samples.running, default=0) if samples else None,
        waiting_peak=max(samples.waiting, default=0) if samples else None,
        kv_usage_peak_ratio=max(samples.kv_usage_ratio, default=0.0) if samples else None,
        busy_ratio=delta("busy_seconds") / (max(after.replicas, 1) * duration),
        preemptions=delta("preemptions"),
        evictions=delta("evictions"),
        engine_steps=delta("steps"),
        goodput_requests_per_second=None if good is None else float(good.sum()) / duration,
        goodput_ratio=None if good is None or outcomes.size == 0 else float(good.sum()) / outcomes.size,
        impact=impact,
    )


def good_requests(done: Records, slo: Slo) -> npt.NDArray[np.bool_]:
    """Which finished requests met every objective. A request of one token has no TPOT to miss."""
    good = np.ones(done.size, dtype=bool)
    if slo.ttft_seconds is not None:
        good &= done["first_token"] - done["arrival"] <= slo.ttft_seconds
    if slo.tpot_seconds is not None:
        steps = np.maximum(done["output"] - 1, 1)
        good &= (done["output"] <= 1) | ((done["finish"] - done["first_token"]) / steps <= slo.tpot_seconds)
    if slo.e2e_seconds is not None:
        good &= done["finish"] - done["arrival"] <= slo.e2e_seconds
    return good
