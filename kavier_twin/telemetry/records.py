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
EventTime = Annotated[float, Field(allow_inf_nan=False)]
Identifier = Annotated[str, Field(min_length=1, max_length=512)]
BlockHash = Annotated[int, Field(ge=0, lt=2**64)]


class Record(BaseModel):
    """Common settings: immutable, unknown keys ignored so that newer producers do not break older twins."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1


class RequestSeen(Record):
    """A request reached the fleet.

    `block_hashes` is the chained content identity of the leading `block_tokens`-sized blocks (unsigned 64-bit; the
    last one may cover its block only in part, up to the end of the prompt).
    """

    kind: Literal["request_seen"] = "request_seen"
    id: Identifier
    time_seconds: EventTime
    pool: Identifier = "default"
    model: str | None = None
    session: str | None = None
    prompt_tokens: Annotated[int, Field(ge=1, le=100_000_000)]
    max_tokens: Tokens | None = None
    block_hashes: tuple[BlockHash, ...] = ()
    block_tokens: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    priority: int = 0
    pod: str | None = None

    @model_validator(mode="after")
    def _hashes_need_a_size(self) -> RequestSeen:
        if self.block_hashes and self.block_tokens is None:
            raise ValueError("block_hashes given without block_tokens (tokens under one hash)")
        return self


class RequestFinished(Record):
    """A request left the fleet. Fields that the source did not measure are None.

    `block_hashes`, where known, is the chain over prompt and output together (same block size as when seen), which is
    what a following turn of the session will find in the cache.
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
            max_tokens=self.max_tokens,
            block_hashes=hashes,
            block_tokens=self.block_tokens if hashes else None,
            priority=self.priority,
            pod=self.pod,
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


class EngineSample(Record):
    """What one vLLM engine reports of itself at one moment (gauges as they are, counters since its start)."""

    kind: Literal["engine_sample"] = "engine_sample"
    time_seconds: EventTime
    pool: Identifier = "default"
    pod: str = ""
    requests_running: Annotated[float, Field(ge=0)] | None = None
    requests_waiting: Annotated[float, Field(ge=0)] | None = None
    kv_cache_usage_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    prefix_cache_queries_tokens: Annotated[float, Field(ge=0)] | None = None
    prefix_cache_hits_tokens: Annotated[float, Field(ge=0)] | None = None
    prompt_tokens: Annotated[float, Field(ge=0)] | None = None
    generation_tokens: Annotated[float, Field(ge=0)] | None = None
    preemptions: Annotated[float, Field(ge=0)] | None = None


class CarbonSample(Record):
    """Carbon intensity of the pool's electricity from this moment on, grams of CO2 per kilowatt-hour."""

    kind: Literal["carbon_sample"] = "carbon_sample"
    time_seconds: EventTime
    pool: Identifier = "default"
    gco2_per_kwh: Annotated[float, Field(ge=0, le=10_000)]


TelemetryRecord = RequestSeen | RequestFinished | RequestRecord | EngineSample | CarbonSample
