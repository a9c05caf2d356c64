"""Key performance indicators of a stretch of simulation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.data_plane import Samples
from kavier_twin.simulation.impact import Impact
from kavier_twin.simulation.kpi_table import KPIS
from kavier_twin.simulation.plain import plain
from kavier_twin.simulation.power import Reading
from kavier_twin.simulation.request_kpis import Requests, durations
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
        sums = {name: replicas[name].sum().item() for name in _SUMMED}
        return Counters(
            time_seconds=time_seconds,
            replicas=int(alive.sum()),
            usable_blocks=int((state.engines["num_blocks"] - 1)[alive].sum()),
            itl_counts=state.itl_counts.sum(axis=0),
            reading=Reading.of(state, time_seconds),
            **sums,
        )


_SUMMED: Final = [field.name for field in fields(Counters) if field.name in (layout.REPLICA.names or ())]


class Stretch:
    """What the counters say of the simulation between two readings (`before` None: from zero at `start_seconds`).

    KPIs are methods of their name. NaN: there is nothing to divide by.
    """

    def __init__(self, before: Counters | None, after: Counters, start_seconds: float = 0.0) -> None:
        self._before, self._after = before, after
        self.start_seconds = start_seconds if before is None else before.time_seconds
        self.seconds = max(after.time_seconds - self.start_seconds, 1e-12)

    def more(self, counter: str) -> Any:
        """By how much a counter rose."""
        return getattr(self._after, counter) - (0 if self._before is None else getattr(self._before, counter))

    def rate(self, counter: str) -> float:
        """By how much it rose a second: the mean of what an integral over time is of."""
        return float(self.more(counter) / self.seconds)

    def itl_seconds(self) -> Distribution:
        return Distribution.of_histogram(self.more("itl_counts"))

    def prefix_cache_hit_ratio(self) -> float:
        return _quotient(self.more("hit_tokens"), self.more("query_tokens"))

    def external_cache_hit_ratio(self) -> float:
        hits = self.more("host_hit_tokens") + self.more("disk_hit_tokens")
        return _quotient(hits, self.more("external_query_tokens"))

    def requests_running(self) -> float:
        return self.rate("running_seconds")

    def requests_waiting(self) -> float:
        return self.rate("waiting_seconds")

    def kv_cache_usage_ratio(self) -> float:
        return self.rate("used_block_seconds") / max(self._after.usable_blocks, 1)

    def output_tokens_per_second(self) -> float:
        return self.rate("output_tokens")

    def preemptions(self) -> float:
        return float(self.more("preemptions"))

    def busy_ratio(self) -> float:
        return self.rate("busy_seconds") / max(self._after.replicas, 1)


@dataclass(frozen=True)
class Kpis:
    """What a stretch of simulation amounts to. Ratios are 0..1, rates per second, latencies in seconds."""

    duration_seconds: float
    requests: int
    requests_finished: int
    requests_rejected: int
    ttft_seconds: Distribution
    itl_seconds: Distribution
    tpot_seconds: Distribution
    e2e_seconds: Distribution
    queue_seconds: Distribution
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
    requests_running: float
    requests_waiting: float
    kv_cache_usage_ratio: float
    requests_running_peak: int | None
    requests_waiting_peak: int | None
    kv_cache_usage_peak_ratio: float | None
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
        gpu, external = np.nan_to_num((self.prefix_cache_hit_ratio, self.external_cache_hit_ratio))
        return float(gpu + (1.0 - gpu) * external)

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
    frontend_seconds: float = 0.0,
    samples: Samples | None = None,
    slo: Slo | None = None,
    impact: Impact | None = None,
) -> Kpis:
    """KPIs of the requests in `outcomes` and of the time between two counter readings (`before` None: from zero).

    `frontend_seconds` pass between the arrival of a request and its queue time.
    """
    stretch = Stretch(before, after, start_seconds)
    finished = outcomes["status"] == layout.FINISHED
    done = outcomes if finished.all() else outcomes[finished]
    requests = Requests.simulated(done, frontend_seconds=frontend_seconds)
    good = None if slo is None else int(good_requests(requests, slo).sum())

    def latency(name: str) -> Distribution:
        return Distribution.of(durations(KPIS[name], requests))

    return Kpis(
        duration_seconds=stretch.seconds,
        requests=int(outcomes.size),
        requests_finished=int(done.size),
        requests_rejected=int(outcomes.size - done.size),
        ttft_seconds=latency("ttft_seconds"),
        itl_seconds=stretch.itl_seconds(),
        tpot_seconds=latency("tpot_seconds"),
        e2e_seconds=latency("e2e_seconds"),
        queue_seconds=latency("queue_seconds"),
        prefix_cache_hit_ratio=stretch.prefix_cache_hit_ratio(),
        prefix_cache_hit_tokens=stretch.more("hit_tokens"),
        external_cache_hit_ratio=stretch.external_cache_hit_ratio(),
        host_hit_tokens=stretch.more("host_hit_tokens"),
        disk_hit_tokens=stretch.more("disk_hit_tokens"),
        offload_loaded_bytes=stretch.more("loaded_bytes"),
        offload_stored_bytes=stretch.more("stored_bytes"),
        disk_read_bytes=stretch.more("read_bytes"),
        disk_written_bytes=stretch.more("written_bytes"),
        offload_dropped_stores=stretch.more("dropped_stores"),
        prompt_tokens=stretch.more("prompt_tokens"),
        output_tokens=stretch.more("output_tokens"),
        prompt_tokens_per_second=stretch.rate("prompt_tokens"),
        output_tokens_per_second=stretch.output_tokens_per_second(),
        requests_per_second=done.size / stretch.seconds,
        requests_running=stretch.requests_running(),
        requests_waiting=stretch.requests_waiting(),
        kv_cache_usage_ratio=stretch.kv_cache_usage_ratio(),
        requests_running_peak=max(samples.running, default=0) if samples else None,
        requests_waiting_peak=max(samples.waiting, default=0) if samples else None,
        kv_cache_usage_peak_ratio=max(samples.kv_usage_ratio, default=0.0) if samples else None,
        busy_ratio=stretch.busy_ratio(),
        preemptions=stretch.more("preemptions"),
        evictions=stretch.more("evictions"),
        engine_steps=stretch.more("steps"),
        goodput_requests_per_second=None if good is None else good / stretch.seconds,
        goodput_ratio=None if good is None or outcomes.size == 0 else good / outcomes.size,
        impact=impact,
    )


def good_requests(requests: Requests, slo: Slo) -> npt.NDArray[np.bool_]:
    """Which finished requests met every objective. A request of one token has no TPOT to miss."""
    good = np.ones(requests.arrival.size, dtype=bool)
    for field in fields(slo):
        limit = getattr(slo, field.name)
        if limit is not None:
            good &= ~(durations(KPIS[field.name], requests) > limit)
    return good


def _quotient(amount: float, of: float) -> float:
    return amount / of if of else np.nan
