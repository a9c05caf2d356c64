"""The records that cross the boundary of the twin, and their validation.

Everything the twin learns from outside arrives as one of these frozen models, whatever the source. Times are
seconds on one clock per stream (unix time for live sources, seconds since the start for trace files). Prompt text
never appears: content is known only as a chain of block hashes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1

Tokens = Annotated[int, Field(ge=0, le=100_000_000)]
Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
# Within 3,000 years of the clock's zero: what is farther off is no time, or not in seconds.
FARTHEST_SECONDS = 1e11
EventTime = Annotated[float, Field(ge=-FARTHEST_SECONDS, le=FARTHEST_SECONDS, allow_inf_nan=False)]
Identifier = Annotated[str, Field(min_length=1, max_length=512)]
BlockHash = Annotated[int, Field(ge=0, lt=2**64)]
Amount = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]


class Record(BaseModel):
    """Common settings: immutable, unknown keys ignored so that newer producers do not break older twins."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1


class RequestSeen(Record):
    """A request reached the fleet.

    `block_hashes` is the chained content identity of the leading `block_tokens`-sized blocks (unsigned 64-bit; the
    last one may cover its block only in part, up to the end of the prompt).

    A producer may send a first record when the request comes, and a fuller one with the same `id` and `time_seconds`
    when its prompt is tokenised: see `completes`. `prompt_tokens_from` tells how the length of the prompt is known:
    estimated, tokenised, or counted by the engine (`usage`). `adapter` names the request's LoRA adapter.
    `skip_reading_prefix_cache`: it uses no cached prefix, as vLLM has it with `prompt_logprobs`.
    """

    kind: Literal["request_seen"] = "request_seen"
    id: Identifier
    time_seconds: EventTime
    pool: Identifier = "default"
    model: str | None = None
    session: str | None = None
    prompt_tokens: Annotated[int, Field(ge=1, le=100_000_000)]
    prompt_tokens_from: Literal["estimate", "tokenizer", "usage"] = "tokenizer"
    max_tokens: Tokens | None = None
    block_hashes: tuple[BlockHash, ...] = ()
    block_tokens: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    pod: str | None = None
    adapter: Identifier | None = None
    skip_reading_prefix_cache: bool = False

    @model_validator(mode="after")
    def _hashes_need_a_size(self) -> RequestSeen:
        if self.block_hashes and self.block_tokens is None:
            raise ValueError("block_hashes given without block_tokens (tokens under one hash)")
        return self

    def completes(self, other: RequestSeen) -> bool:
        """Whether this record takes the place of another one with the same id, whichever came first.

        Both tell of one arrival, so that their times are equal. The better known length wins, then the longer chain of
        hashes. Equal records complete nothing.
        """
        return self.time_seconds == other.time_seconds and self._knowledge() > other._knowledge()

    def _knowledge(self) -> tuple[int, int]:
        return ("estimate", "tokenizer", "usage").index(self.prompt_tokens_from), len(self.block_hashes)


class RequestFinished(Record):
    """A request left the fleet. Fields that the source did not measure are None.

    `block_hashes`, where known, is the chain over prompt and output together (same block size as when seen), which is
    what a following turn of the session will find in the cache. It may end before the output does, where the content
    is not known further. It may come in a second record with the same `id`: see `completes`.
    """

    kind: Literal["request_finished"] = "request_finished"
    id: Identifier
    time_seconds: EventTime
    pool: Identifier = "default"
    output_tokens: Tokens
    ttft_seconds: Seconds | None = None
    e2e_seconds: Seconds | None = None
    queue_seconds: Seconds | None = None
    cached_tokens: Tokens | None = None
    preemptions: Annotated[int, Field(ge=0)] | None = None
    finish_reason: str | None = None
    block_hashes: tuple[BlockHash, ...] = ()

    def completes(self, other: RequestFinished) -> bool:
        """Whether this record takes the place of another one with the same id and time, whichever came first."""
        return self.time_seconds == other.time_seconds and len(self.block_hashes) > len(other.block_hashes)


class RequestRecord(RequestSeen):
    """A request whose whole story is known: a line of a trace, or a gateway's access log.

    `hashes_cover_output` tells whether `block_hashes` runs over the full blocks of prompt and output, or over the
    prompt alone. `time_seconds` is the arrival.
    """

    kind: Literal["request"] = "request"  # type: ignore[assignment]
    output_tokens: Tokens
    hashes_cover_output: bool = False
    ttft_seconds: Seconds | None = None
    e2e_seconds: Seconds | None = None
    queue_seconds: Seconds | None = None
    cached_tokens: Tokens | None = None
    preemptions: Annotated[int, Field(ge=0)] | None = None
    finish_reason: str | None = None

    @model_validator(mode="after")
    def _ends_at_a_time(self) -> RequestRecord:
        if self.time_seconds + (self.e2e_seconds or 0.0) > FARTHEST_SECONDS:
            raise ValueError(f"time_seconds + e2e_seconds is above {FARTHEST_SECONDS:g}: no time, or not in seconds")
        return self

    def seen(self) -> RequestSeen:
        """The arrival half. Hashes beyond the prompt are withheld: at arrival nobody knows them."""
        hashes = self.block_hashes
        if self.hashes_cover_output and self.block_tokens:
            hashes = hashes[: self.prompt_tokens // self.block_tokens]
        return RequestSeen(
            id=self.id,
            time_seconds=self.time_seconds,
            pool=self.pool,
            model=self.model,
            session=self.session,
            prompt_tokens=self.prompt_tokens,
            prompt_tokens_from=self.prompt_tokens_from,
            max_tokens=self.max_tokens,
            block_hashes=hashes,
            block_tokens=self.block_tokens if hashes else None,
            priority=self.priority,
            pod=self.pod,
            adapter=self.adapter,
            skip_reading_prefix_cache=self.skip_reading_prefix_cache,
        )

    def finished(self) -> RequestFinished | None:
        """The finishing half, or None where the record does not say when the request ended."""
        if self.e2e_seconds is None:
            return None
        return RequestFinished(
            id=self.id,
            time_seconds=self.time_seconds + self.e2e_seconds,
            pool=self.pool,
            output_tokens=self.output_tokens,
            ttft_seconds=self.ttft_seconds,
            e2e_seconds=self.e2e_seconds,
            queue_seconds=self.queue_seconds,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            finish_reason=self.finish_reason,
            block_hashes=self.block_hashes if self.hashes_cover_output else (),
        )


class Histogram(BaseModel):
    """A Prometheus histogram since its process started.

    `buckets` maps an upper limit to the observations at or below it; the bucket without limit is `count`. The limits
    are the engine's own: an operator can change them.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    buckets: dict[Amount, Amount] = {}
    sum: Amount
    count: Amount


class EngineSample(Record):
    """What one vLLM engine reports of itself at one moment: gauges as they are, counters since its process started.

    A field that the engine did not report is None. `engine` is the data-parallel rank within the pod. Meanings as in
    vLLM's v1/metrics/loggers.py: prefix-cache counters count tokens of requests at their admission, `prompt_tokens` at
    their first token, `generation_tokens` as they come; the `request_...` histograms observe a request when it ends.
    """

    kind: Literal["engine_sample"] = "engine_sample"
    time_seconds: EventTime
    pool: Identifier = "default"
    namespace: str = ""
    pod: str = ""
    engine: str = ""
    model: str | None = None
    started_seconds: EventTime | None = None  # when its process, and with it every counter, began
    requests_running: Amount | None = None
    requests_waiting: Amount | None = None
    requests_waiting_by_reason: dict[str, Amount] = {}
    kv_cache_usage_ratio: Ratio | None = None
    prefix_cache_queries_tokens: Amount | None = None
    prefix_cache_hits_tokens: Amount | None = None
    external_prefix_cache_queries_tokens: Amount | None = None
    external_prefix_cache_hits_tokens: Amount | None = None
    prompt_tokens: Amount | None = None
    prompt_tokens_by_source: dict[str, Amount] = {}
    generation_tokens: Amount | None = None
    preemptions: Amount | None = None
    requests_finished_by_reason: dict[str, Amount] = {}
    requests_rejected_by_reason: dict[str, Amount] = {}  # at admission; counted for all engines of a pod at the first
    ttft_seconds: Histogram | None = None
    inter_token_latency_seconds: Histogram | None = None
    e2e_seconds: Histogram | None = None
    queue_seconds: Histogram | None = None
    prefill_seconds: Histogram | None = None
    decode_seconds: Histogram | None = None
    request_prompt_tokens: Histogram | None = None
    request_generation_tokens: Histogram | None = None
    step_tokens: Histogram | None = None  # one observation for every engine step that put out tokens
    sleep_state: dict[str, Amount] = {}  # 1 under the state that the engine is in: awake, weights_offloaded, ...
    lora_requests: dict[str, Amount] = {}  # unix time of the newest request, by the running adapters' names
    spec_decode_drafts: Amount | None = None
    spec_decode_draft_tokens: Amount | None = None
    spec_decode_accepted_tokens: Amount | None = None
    kv_offload_load_bytes: Amount | None = None  # from the host tier to the GPU
    kv_offload_load_seconds: Amount | None = None
    kv_offload_store_bytes: Amount | None = None
    kv_offload_store_seconds: Amount | None = None
    kv_block_lifetime_seconds: Histogram | None = None  # of a sample of the blocks, from allocation to eviction
    kv_block_idle_before_evict_seconds: Histogram | None = None
    kv_block_reuse_gap_seconds: Histogram | None = None
    vllm_version: str | None = None


class GpuSample(Record):
    """What DCGM reports of one GPU, or of one MIG instance of it, at one moment.

    `pod` is the engine's pod that uses it, empty where none is named. `energy_joules` counts since the driver loaded.
    """

    kind: Literal["gpu_sample"] = "gpu_sample"
    time_seconds: EventTime
    pool: Identifier = "default"
    namespace: str = ""
    pod: str = ""
    gpu: Identifier  # its UUID
    mig_instance: str = ""
    mig_profile: str = ""
    model: str | None = None  # of the card
    host: str = ""
    utilization_ratio: Ratio | None = None
    tensor_active_ratio: Ratio | None = None
    dram_active_ratio: Ratio | None = None
    power_watts: Amount | None = None
    energy_joules: Amount | None = None
    memory_used_bytes: Amount | None = None
    memory_free_bytes: Amount | None = None


class KvBlocksStored(BaseModel):
    """Blocks that got an identity in a cache, in chain order after `parent_hash` (None at the start of a prompt).

    `block_tokens` is 0 where the event does not tell it, and `spec_kind`, vLLM's kind of the group's layers, empty.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    event: Literal["stored"] = "stored"
    block_hashes: tuple[BlockHash, ...]
    parent_hash: BlockHash | None = None
    block_tokens: Annotated[int, Field(ge=0)] = 0
    medium: str = "GPU"
    group: int = 0
    spec_kind: str = ""


class KvBlocksRemoved(BaseModel):
    """Blocks whose memory was handed out again: one copy of each is gone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    event: Literal["removed"] = "removed"
    block_hashes: tuple[BlockHash, ...]
    medium: str = "GPU"
    group: int = 0


class KvCacheCleared(BaseModel):
    """The cache lost every block."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    event: Literal["cleared"] = "cleared"


KvEvent = KvBlocksStored | KvBlocksRemoved | KvCacheCleared


class KvEventBatch(Record):
    """What one engine step changed in the engine's cache.

    `sequence` counts the batches of one publisher process from 0. `continues` tells that the batch follows the one
    before it; otherwise batches were lost, or the publisher began anew, and what was known of the cache is void.
    """

    kind: Literal["kv_event_batch"] = "kv_event_batch"
    time_seconds: EventTime
    pool: Identifier = "default"
    pod: str = ""
    engine: str = ""
    sequence: Annotated[int, Field(ge=0)]
    continues: bool
    events: tuple[Annotated[KvEvent, Field(discriminator="event")], ...]


class CarbonSample(Record):
    """Carbon intensity of the pool's electricity from this moment on, grams of CO2 per kilowatt-hour."""

    kind: Literal["carbon_sample"] = "carbon_sample"
    time_seconds: EventTime
    pool: Identifier = "default"
    gco2_per_kwh: Annotated[float, Field(ge=0, le=10_000)]


TelemetryRecord = RequestSeen | RequestFinished | RequestRecord | EngineSample | GpuSample | KvEventBatch | CarbonSample
