"""What an engine and a fleet are configured to do. Names are vLLM's own wherever vLLM has the setting."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kavier_twin.simulation.footprint import Footprint
from kavier_twin.simulation.state import MAX_KNOTS

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
    model_config = ConfigDict(frozen=True, extra="forbid")


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

    fixed: Coefficient
    per_prefill_token: Coefficient = 0.0
    per_decode_sequence: Coefficient = 0.0
    per_context_token: Coefficient = 0.0
    per_prefill_attention: Coefficient = 0.0
    linear_scale: Coefficient = 1.0
    linear_layers: Annotated[tuple[tuple[Coefficient, Coefficient], ...], Field(max_length=MAX_KNOTS)] = ()

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
    eviction: EvictionPolicy = "lru"  # vLLM has LRU only; for the others see docs/policies.md
    eviction_ttl_seconds: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 300.0
    eviction_pinned_tokens: Annotated[int, Field(ge=0)] = 1024
    eviction_pinned_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25


class FleetSettings(_Settings):
    """A pool of identical engines behind one router. `footprint`, where told, is what energy and cost follow from."""

    replicas: Annotated[int, Field(ge=1, le=100_000)] = 1
    engine: EngineSettings
    step_time: StepTime
    router: RouterPolicy = "prefix_aware"
    router_max_imbalance: Annotated[int, Field(ge=0)] = 8
    footprint: Footprint | None = None
