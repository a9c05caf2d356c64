"""What an engine and a fleet are configured to do. Names are vLLM's own wherever vLLM has the setting."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kavier_twin.simulation.footprint import Footprint
from kavier_twin.simulation.state import MAX_KNOTS
from kavier_twin.simulation.versions import release

Positive = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
EvictionPolicy = Literal[
    "lru", "fifo", "lfu", "cost_aware", "belady", "ttl", "pinned", "slru", "arc", "sieve", "s3fifo"
]
RouterPolicy = Literal["round_robin", "least_loaded", "session_affinity", "prefix_aware"]

# StepTime's coefficients in the order of `state.WORK`.
COEFFICIENTS: Final = (
    "fixed",
    "per_prefill_token",
    "per_decode_sequence",
    "per_context_token",
    "per_prefill_attention",
    "linear_scale",
)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StepTime(_Settings):
    """Seconds that one engine step lasts, piecewise affine in what the step does.

    seconds = fixed + per_prefill_token * P + per_decode_sequence * D + per_context_token * C
              + per_prefill_attention * A + linear_scale * L(P + D)

    over the scheduled requests (n tokens each, c computed before): a request with n = 1 behind its prompt is a decode;
    D counts decodes and C sums their c + 1; for all others P sums n and A sums n c + n (n + 1) / 2. Physically: launch
    and weight reading; the linear layers' compute; per-sequence work; reading the KV cache; attention's quadratic part.

    L, given by `linear_layers`, is for what is not affine in the tokens of a step: the roofline of the linear layers
    (weights are read once, then compute takes over), the experts that a batch touches, communication. It goes through
    the points (tokens, seconds), is constant below the first and has the slope of the last two beyond the last.
    A decode step's tokens do not change from step to step, so a run of them still has a closed form.
    """

    fixed: Coefficient = Field(examples=[0.01])
    """Seconds of every step."""

    per_prefill_token: Coefficient = 0.0
    """Seconds per prompt token computed."""

    per_decode_sequence: Coefficient = 0.0
    """Seconds per request that decodes."""

    per_context_token: Coefficient = 0.0
    """Seconds per token of context that decoding reads."""

    per_prefill_attention: Coefficient = 0.0
    """Seconds per pair of a prompt token and a token before it."""

    linear_scale: Coefficient = 1.0
    """Factor of `linear_layers`."""

    linear_layers: Annotated[tuple[tuple[Coefficient, Coefficient], ...], Field(max_length=MAX_KNOTS)] = Field(
        default=(), examples=[[[1, 0.004], [256, 0.006]]]
    )
    """Points (tokens of a step, seconds) of the linear layers."""

    @model_validator(mode="after")
    def _time_must_pass(self) -> StepTime:
        tokens = [knot[0] for knot in self.linear_layers]
        seconds = [knot[1] for knot in self.linear_layers]
        if any(a >= b for a, b in pairwise(tokens)) or any(a > b for a, b in pairwise(seconds)):
            raise ValueError("linear_layers: tokens must increase and seconds must not decrease from point to point")
        if (
            self.fixed <= 0.0
            and (self.per_prefill_token <= 0.0 or self.per_decode_sequence <= 0.0)
            and (not seconds or self.linear_scale * seconds[0] <= 0.0)
        ):
            raise ValueError(
                "a step must last: fixed > 0, or both per_prefill_token and per_decode_sequence > 0, or linear_layers"
            )
        return self

    def coefficients(self) -> npt.NDArray[np.float64]:
        """The coefficients in the order of COEFFICIENTS: a step's seconds are their product with its `state.WORK`."""
        return np.array([getattr(self, name) for name in COEFFICIENTS])

    def linear_seconds(self, tokens: float) -> float:
        """L of so many tokens, without `linear_scale`."""
        if not self.linear_layers:
            return 0.0
        at, seconds = zip(*self.linear_layers, strict=True)
        if tokens > at[-1] and len(at) > 1:
            return float(seconds[-1] + (seconds[-1] - seconds[-2]) / (at[-1] - at[-2]) * (tokens - at[-1]))
        return float(np.interp(tokens, at, seconds))

    def with_coefficients(self, values: npt.ArrayLike) -> StepTime:
        """The same layers with other coefficients, in the order of COEFFICIENTS."""
        named = dict(zip(COEFFICIENTS, np.asarray(values, np.float64).tolist(), strict=True))
        return StepTime(**named, linear_layers=self.linear_layers)


# Until the mirror has fitted the pool's own: a step of a mid-sized model on a data-centre GPU. Not to be trusted.
CRUDE_STEP_TIME: Final = StepTime(
    fixed=0.01, per_prefill_token=3e-5, per_decode_sequence=3e-5, per_context_token=6e-8, per_prefill_attention=1e-9
)


class HostTier(_Settings):
    """Host memory behind the GPU's KV cache: vLLM's native OffloadingConnector (`v1/kv_offload/cpu/`).

    `capacity_gib` is `--kv-offloading-size`: GiB over all tensor-parallel ranks. A transfer takes `latency_seconds`
    and its bytes at `bytes_per_second`, each direction on its own. Default: 80 % of the 63 GB/s that PCIe 5.0 x16
    carries each way (32 GT/s x 16 lanes x 128/130); halve it for PCIe 4.0. 20 us for launching a copy.
    """

    capacity_gib: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Field(examples=[64.0])
    """Memory over all tensor-parallel ranks (`--kv-offloading-size`)."""

    blocks_per_chunk: Annotated[int, Field(ge=1, le=65_536)] = 1
    """GPU blocks that are stored together."""

    eviction_policy: Literal["lru", "arc"] = "lru"
    """What goes first when it is full."""

    store_threshold: Annotated[int, Field(ge=0)] = 0
    """Lookups before a chunk is stored; 0 and 1 store at once."""

    max_tracker_size: Annotated[int, Field(ge=1, le=2**24)] = 64_000
    """Chunks whose lookups are counted."""

    offload_prompt_only: bool = True
    """Whether decoded tokens are left out."""

    bytes_per_second: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 50e9
    """Rate of transfers, each direction on its own."""

    latency_seconds: Coefficient = 20e-6
    """Time before a transfer's first byte."""


class DiskTier(_Settings):
    """A disk behind the host tier: vLLM's TieringOffloadingSpec with an `fs` tier (`v1/kv_offload/tiering/`).

    vLLM itself never removes a file; here the least recently used go when `capacity_gib` is full. Defaults: sequential
    rates of a PCIe 4.0 data centre drive (Samsung PM9A3 U.2, announced: 6.5 GB/s read, 3.5 GB/s write) and 100 us.
    """

    capacity_gib: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Field(examples=[1000.0])
    """Room on the disk."""

    read_bytes_per_second: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 6.5e9
    """Rate of reading."""

    write_bytes_per_second: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 3.5e9
    """Rate of writing."""

    latency_seconds: Coefficient = 100e-6
    """Time before a transfer's first byte."""


class EngineSettings(_Settings):
    """One vLLM engine. Defaults are vLLM 0.32's for an H100 where they do not follow from model and memory.

    `num_gpu_blocks` counts vLLM's null block, as vLLM does: one less is usable.
    """

    vllm: Literal["0.32", "0.33"] = "0.32"
    """The version of vLLM whose decisions are reproduced."""

    block_size: Annotated[int, Field(ge=1, le=8192)] = 16
    """Tokens of a KV-cache block (`--block-size`)."""

    num_gpu_blocks: Annotated[int, Field(ge=2, le=2**30)] = Field(examples=[27000])
    """KV-cache blocks, vLLM's null block included; from `hardware` unless given."""

    max_num_seqs: Positive = 1024
    """Requests in a batch (`--max-num-seqs`)."""

    max_num_active_seqs: Positive | None = Field(default=None, examples=[64])
    """Running requests above which none is admitted (`--max-num-active-seqs`); as `max_num_seqs` unless given."""

    max_num_batched_tokens: Positive = 8192
    """Tokens in a batch (`--max-num-batched-tokens`)."""

    max_num_scheduled_tokens: Positive | None = Field(default=None, examples=[4096])
    """Tokens scheduled in a batch at most; as `max_num_batched_tokens` unless given."""

    max_loras: Annotated[int, Field(ge=0)] = 0
    """LoRA adapters in a batch (`--max-loras`); 0 for no limit."""

    max_model_len: Annotated[int, Field(ge=2, le=2**30)] = 131_072
    """The longest prompt with its output (`--max-model-len`)."""

    prefix_caching: bool = True
    """Whether cached prefixes are used again (`--enable-prefix-caching`)."""

    async_scheduling: bool = True
    """Whether a batch is scheduled while the last one runs (`--async-scheduling`)."""

    enable_chunked_prefill: bool = True
    """Whether a prompt may be computed in parts (`--enable-chunked-prefill`)."""

    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """Who is admitted first (`--scheduling-policy`)."""

    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = 0
    """Prompt tokens of one request in a batch at most; 0 for no limit (`--long-prefill-token-threshold`)."""

    watermark: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the blocks that admission keeps free (`--watermark`)."""

    scheduler_reserve_full_isl: bool = True
    """Whether admission needs room for the whole prompt (`--scheduler-reserve-full-isl`)."""

    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """How cached keys and values are kept (`--kv-cache-dtype`)."""

    eviction: EvictionPolicy = "lru"
    """What the cache evicts first: vLLM has lru only, for the others see docs/policies.md."""

    eviction_ttl_seconds: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 300.0
    """With `ttl`: how long an unused block stays."""

    eviction_pinned_tokens: Annotated[int, Field(ge=0)] = 1024
    """With `pinned`: leading tokens that go last."""

    eviction_pinned_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25
    """With `pinned`: share of the blocks that may be pinned."""

    kv_bytes_per_token: Positive = 131_072
    """Bytes of one cached token over all ranks. The default is Llama-3.1-8B's."""

    host_tier: HostTier | None = Field(default=None, examples=[{"capacity_gib": 64}])
    """Host memory behind the GPU's cache."""

    disk_tier: DiskTier | None = Field(default=None, examples=[{"capacity_gib": 1000}])
    """A disk behind the host memory."""

    @field_validator("vllm", mode="before")
    @classmethod
    def _release_of_vllm(cls, value: object) -> object:
        return release(value) or value

    @model_validator(mode="after")
    def _limits_must_agree(self) -> EngineSettings:
        if (self.max_num_scheduled_tokens or 0) > self.max_num_batched_tokens:
            raise ValueError("max_num_scheduled_tokens must not be above max_num_batched_tokens")
        if self.max_loras > 0 and self.host_tier is not None:
            raise ValueError("max_loras is not modelled together with a host_tier; leave one out")
        return self

    @model_validator(mode="after")
    def _tiers_must_fit(self) -> EngineSettings:
        host, disk = self.host_tier, self.disk_tier
        if disk is not None and host is None:
            raise ValueError("disk_tier needs a host_tier: what is read from disk goes through host memory")
        if disk is not None and host is not None and host.store_threshold >= 2:
            raise ValueError("host_tier.store_threshold: vLLM has none where there is a disk_tier")
        for name, tier in (("host_tier", host), ("disk_tier", disk)):
            if tier is not None and not 1 <= self.chunks_in(tier.capacity_gib) <= 2**28:
                raise ValueError(f"{name}.capacity_gib must hold 1 to {2**28} chunks of {self.chunk_bytes} bytes")
        return self

    @property
    def chunk_bytes(self) -> int:
        """Bytes a chunk takes in host memory, in whole pages (vLLM `v1/kv_offload/cpu/spec.py`)."""
        blocks = self.host_tier.blocks_per_chunk if self.host_tier is not None else 1
        return -(-self.kv_bytes_per_token * self.block_size * blocks // 4096) * 4096

    def chunks_in(self, gib: float) -> int:
        """Chunks that so much memory holds."""
        return int(gib * 2**30) // self.chunk_bytes


class FleetSettings(_Settings):
    """A pool of identical engines behind one router. `footprint`, where told, is what energy and cost follow from."""

    replicas: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Engines at the start; pods that telemetry names join and leave."""

    engine: EngineSettings = Field(examples=[{"num_gpu_blocks": 27000, "max_num_seqs": 256}])
    """How each engine is set; with `hardware` only what differs from vLLM's choice."""

    step_time: StepTime = Field(examples=[{"fixed": 0.01}])
    """How long an engine step lasts."""

    router: RouterPolicy = "prefix_aware"
    """Who gets a request whose record names no pod."""

    router_max_imbalance: Annotated[int, Field(ge=0)] = 8
    """With `prefix_aware`: requests above the least loaded replica that a match may cost."""

    footprint: Footprint | None = Field(
        default=None, examples=[{"power": {"idle_watts": 70, "max_watts": 700}, "price_per_gpu_hour": 2.5}]
    )
    """What energy, carbon and cost follow from."""
