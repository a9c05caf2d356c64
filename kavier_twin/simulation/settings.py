"""What an engine and a fleet are configured to do. Names are vLLM's own wherever vLLM has the setting."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Coefficient = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
RouterPolicy = Literal["round_robin", "least_loaded", "session_affinity", "prefix_aware"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepTime(_Settings):
    """Seconds that one engine step lasts, affine in what the step does.

    seconds = fixed + per_prefill_token * P + per_decode_sequence * D + per_context_token * C
              + per_prefill_attention * A

    over the scheduled requests (n tokens each, c computed before): a request with n = 1 behind its prompt is a decode;
    D counts decodes and C sums their c + 1; for all others P sums n and A sums n c + n (n + 1) / 2. Physically: launch
    and weight reading; the linear layers' compute; per-sequence work; reading the KV cache; attention's quadratic part.
    """

    fixed: Coefficient
    per_prefill_token: Coefficient = 0.0
    per_decode_sequence: Coefficient = 0.0
    per_context_token: Coefficient = 0.0
    per_prefill_attention: Coefficient = 0.0

    @model_validator(mode="after")
    def _time_must_pass(self) -> StepTime:
        if self.fixed <= 0.0 and (self.per_prefill_token <= 0.0 or self.per_decode_sequence <= 0.0):
            raise ValueError("a step must last: fixed > 0, or both per_prefill_token and per_decode_sequence > 0")
        return self


class EngineSettings(_Settings):
    """One vLLM engine. Defaults are vLLM 0.32's for an H100 where they do not follow from model and memory.

    `num_gpu_blocks` counts vLLM's null block, as vLLM does: one less is usable.
    """

    block_size: Annotated[int, Field(ge=1, le=8192)] = 16
    num_gpu_blocks: Annotated[int, Field(ge=2, le=2**30)]
    max_num_seqs: Positive = 1024
    max_num_batched_tokens: Positive = 8192
    max_model_len: Annotated[int, Field(ge=2, le=2**30)] = 131_072
    prefix_caching: bool = True
    async_scheduling: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = 0
    watermark: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    scheduler_reserve_full_isl: bool = True
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"


class FleetSettings(_Settings):
    """A pool of identical engines behind one router."""

    replicas: Annotated[int, Field(ge=1, le=100_000)] = 1
    engine: EngineSettings
    step_time: StepTime
    router: RouterPolicy = "prefix_aware"
    router_max_imbalance: Annotated[int, Field(ge=0)] = 8
