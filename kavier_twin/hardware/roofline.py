"""Step times from data sheets: what the hardware allows, times the share of it that kernels are measured to reach.

A step is a row of kernels, each under its roofline (Williams, Waterman and Patterson, CACM 52(4), 2009):

- linear layers: weights are read once per step, operations grow with its tokens. Of both times, read / share and
  operations / share, the larger counts, rounded where they meet: (a^q + b^q)^(1/q), never less than either.
- experts: each token passes `per_token` of `count`, so n tokens touch count * (1 - (1 - per_token / count)^n) of them
  if they are spread evenly (vLLM and others measure that uneven routing touches fewer).
- attention: decodes read the cache of their context; prefills do operations on every pair of tokens.
- between them, small kernels that move activations, launches that cost the same whatever they do, and, with several
  GPUs, two all-reduces a layer.

The shares are those of kernels, not of served requests: their defaults are medians over NVIDIA's measured operators
(AIConfigurator 0.12.0, Apache-2.0: `systems/data/*/{gemm,attention,moe,comm}` of six GPUs under vLLM), so that measured
requests remain free to test against. The host's work cannot be seen in operators. `seconds_per_step` is an estimate:
some hundred small kernels and copies. The two `_synchronous` ones are a straight line through what five runs of
AIConfigurator's measured requests (vLLM 0.12, Qwen3-32B on eight H100, 1024 tokens in and out, 8 to 128 at once) take
beyond this roofline; no number was fitted to its other 217 runs, nor to the H100 and RTX measurements. They were looked
at while it was built, and where they were off, other operators were consulted (experts, 8 bits, the RTX cards' own
shares). The A10's two shares are Kavier's, whose authors will have chosen them on runs like those of its table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from kavier_twin.catalog.deployment import Deployment, check
from kavier_twin.catalog.gpu import Bend, ComputeType, Gpu, Share
from kavier_twin.catalog.model import Indexer, ModelShape
from kavier_twin.simulation.settings import StepTime

Seconds = Annotated[float, Field(ge=0.0, le=1.0)]

# Where the piecewise affine function of a step's tokens has its points: dense where the roofline bends.
TOKENS = (
    *(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    *(768, 1024, 1536, 2048, 3072, 4096, 8192, 16_384),
)
BYTES = 2.0  # of an activation


class Roofline(BaseModel):
    """How far kernels get. Every share is of a dense peak and at most 1; a GPU's own measured shares go first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compute_share: Share = 0.75
    """Matrix products of 2,048 and more tokens in 16 bits: 0.63 (L40S) to 0.86 (A100)."""
    bandwidth_share: Share = 0.80
    """Reading weights or cache: 0.77 (A100, L40S) to 0.93 (RTX PRO 6000)."""
    bend: Bend = 2.5
    """The order q of the norm that joins reading and computing: 1.7 (A100, RTX PRO 6000) to 3.3 (H100)."""
    narrow_compute_share: Share = 0.55
    """As `compute_share`, in 8 bits and less: 0.48 (B200) to 0.60 (H200); 0.88 on the RTX PRO 6000."""
    narrow_bend: Bend = 1.25
    """As `bend`, in 8 bits and less: 1.0 (H200) to 1.5 (L40S)."""
    attention_share: Share = 0.55
    """Prefill attention on 4,096 and more tokens: 0.46 (L40S) to 0.62 (H100)."""
    expert_share: Share = 0.42
    """Products of many small experts, of the 16-bit peak: 0.35 (RTX PRO 6000) to 0.54 (H200); MXFP4 0.19 to 0.44."""
    expert_bend: Bend = 1.0
    """As `bend`: each expert has few tokens and its product waits for its weights; 1.0 to 1.3 (RTX PRO 6000)."""
    seconds_per_step: Seconds = 0.5e-3
    """Preparing inputs, sampling, and what of the scheduler is not hidden behind the GPU."""
    seconds_per_step_synchronous: Seconds = 0.7e-3
    """Scheduling and handling outputs, on top of the above, where asynchronous scheduling does not hide them."""
    seconds_per_sequence_synchronous: Seconds = 46e-6
    """The same for each sequence."""
    seconds_per_layer: Seconds = 41e-6
    """Launches and tails: four matrix products of 3.6 us, attention 12 us, five small kernels of 3 us."""
    seconds_per_narrow_layer: Seconds = 14e-6
    """On top of it with 8-bit products, whose launches are 7 us each."""
    seconds_per_expert_layer: Seconds = 25e-6
    """Routing, sorting and gathering around the experts: 18 to 39 us, less the two products that they replace."""
    seconds_per_latent_layer: Seconds = 100e-6
    """The many small products of latent attention: 133 us for a layer's, where others take 30 (H100, vLLM 0.24)."""
    seconds_per_sequence: Seconds = 2e-6
    """Sampling a sequence: its logits go through the memory about six times in FP32, at some 2 TB/s."""
    seconds_per_all_reduce: Seconds = 5e-6
    """Over NVLink, whatever the number of GPUs: 4 to 8 us."""
    seconds_per_all_reduce_rank: Seconds = 3.2e-6
    """Over PCIe, for each GPU: 5, 13 and 25 us for 2, 4 and 8."""
    link_share: Share = 0.5
    """Of the ring's ideal bandwidth, 8 to 64 MB over NVLink: 0.36 to 0.70."""
    pcie_share: Share = 0.3
    """The same over PCIe: 0.6 for two GPUs, 0.04 to 0.36 for four and eight, as the host connects them."""

    @staticmethod
    def of(gpu: Gpu) -> Roofline:
        """The defaults, with what was measured on this card in their place."""
        measured = {name: getattr(gpu, name) for name in Roofline.model_fields.keys() & Gpu.model_fields.keys()}
        return Roofline.model_validate({name: value for name, value in measured.items() if value is not None})

    @staticmethod
    def peak() -> Roofline:
        """Every kernel at its dense peak, reading while it computes, and nothing around it."""
        names = Roofline.model_fields
        ideal = {name: 0.0 if name.startswith("seconds_") else math.inf if "bend" in name else 1.0 for name in names}
        return Roofline.model_validate(ideal)


@dataclass(frozen=True)
class _Rates:
    """What one GPU does in a second."""

    gpu: Gpu
    roofline: Roofline

    @property
    def bytes_read(self) -> float:
        return self.gpu.memory_bandwidth_bytes_per_second * self.roofline.bandwidth_share

    def operations(self, compute: ComputeType, share: float) -> float:
        return self.gpu.flops_per_second(compute) * share

    def is_narrow(self, compute: ComputeType) -> bool:
        """Whether the matrix units really work in less than 16 bits."""
        return self.gpu.flops_per_second(compute) > self.gpu.flops_per_second("bf16")

    def product(self, weight_bytes: float, operations: float, compute: ComputeType) -> float:
        """Seconds of matrix products that read so many bytes of weights."""
        narrow = self.is_narrow(compute)
        share = self.roofline.narrow_compute_share if narrow else self.roofline.compute_share
        bend = self.roofline.narrow_bend if narrow else self.roofline.bend
        return self.joined(weight_bytes / self.bytes_read, operations / self.operations(compute, share), bend)

    @staticmethod
    def joined(reading_seconds: float, computing_seconds: float, bend: float) -> float:
        """Seconds of kernels that read and compute at once."""
        larger, smaller = max(reading_seconds, computing_seconds), min(reading_seconds, computing_seconds)
        return larger * (1.0 + (smaller / larger) ** bend) ** (1.0 / bend) if larger > 0.0 else 0.0


def step_time(
    gpu: Gpu, model: ModelShape, deployment: Deployment | None = None, roofline: Roofline | None = None
) -> StepTime:
    """Step times of one engine (with data parallelism: of one rank, the others being as busy).

    `roofline` None: the defaults with the card's own shares. Layers with a sliding window are taken to have filled it
    where only some of a model's layers have one, and never to fill it where all have.

    Raises CatalogError where the model does not divide over the GPUs.
    """
    deployment = deployment or Deployment()
    check(model, deployment)
    reach = roofline or Roofline.of(gpu)
    rates = _Rates(gpu, reach)
    tensor = deployment.tensor_parallel_size
    attention = _attention(rates, model, deployment)
    head = model.head_parameters / tensor
    kept = model.stored_as(deployment.quantization)
    narrow = rates.is_narrow(kept.of_attention.compute)
    all_reduces = 2 * model.layers * _all_reduce_launch(rates, deployment)
    return StepTime(
        fixed=(
            reach.seconds_per_step
            + (0.0 if deployment.async_scheduling else reach.seconds_per_step_synchronous)
            + model.layers * reach.seconds_per_layer
            + (model.layers * reach.seconds_per_narrow_layer if narrow else 0.0)
            + (model.layers * reach.seconds_per_latent_layer if model.latent else 0.0)
            + (model.experts.layers * reach.seconds_per_expert_layer if model.experts else 0.0)
            + all_reduces
            + BYTES * head / rates.bytes_read
        ),
        per_prefill_token=attention.per_prefill_token,
        per_decode_sequence=(
            reach.seconds_per_sequence
            + (0.0 if deployment.async_scheduling else reach.seconds_per_sequence_synchronous)
            + 2.0 * head / rates.operations(model.dtype, reach.compute_share)
            + attention.per_decode_sequence
        ),
        per_context_token=attention.per_context_token,
        per_prefill_attention=attention.per_pair,
        linear_layers=_linear_layers(rates, model, deployment),
    )


# ---- linear layers --------------------------------------------------------------------------------------------------


def _linear_layers(rates: _Rates, model: ModelShape, deployment: Deployment) -> tuple[tuple[float, float], ...]:
    """The points of `StepTime.linear_layers`.

    `StepTime` extrapolates along the last two points. In the largest steps of TOKENS a model with many experts may
    still wait for its weights, as each expert gets few tokens. A line through two such points is too flat: it would
    exceed the dense peak. So the last point is on the line that the roofline approaches. The slope of that line is the
    mean over so many tokens that reading the weights no longer counts.
    """
    last, beyond, countless = TOKENS[-1], 2 * TOKENS[-1], 10**18
    seconds = {tokens: _linear_seconds(rates, model, deployment, tokens) for tokens in TOKENS}
    slope = _linear_seconds(rates, model, deployment, countless) / countless
    seconds[beyond] = seconds[last] + slope * (beyond - last)
    return tuple((float(tokens), value) for tokens, value in seconds.items())


def _linear_seconds(rates: _Rates, model: ModelShape, deployment: Deployment, tokens: int) -> float:
    """Seconds that `tokens` of one rank spend outside attention, launches aside."""
    kept, tensor = model.stored_as(deployment.quantization), deployment.tensor_parallel_size
    parts: dict[tuple[float, ComputeType], int] = {}
    for part, parameters in (
        (kept.of_attention, model.attention_parameters),
        (kept.of_dense_layers, model.dense_mlp_parameters),
    ):
        way = (part.bits_per_weight, part.compute)
        parts[way] = parts.get(way, 0) + parameters
    seconds = sum(
        rates.product(parameters / tensor * bits / 8, 2.0 * parameters / tensor * tokens, compute)
        for (bits, compute), parameters in parts.items()
    )
    if model.experts:
        everyone = tokens * deployment.data_parallel_size
        share = 1.0 / deployment.expert_gpus
        touched = touched_experts(model.experts.count, model.experts.per_token, everyone)
        used = model.experts.per_token * model.expert_parameters * share
        seconds += rates.joined(
            touched * model.expert_parameters * share * kept.bits_per_weight / 8 / rates.bytes_read,
            2.0 * used * everyone / rates.operations(kept.compute, rates.roofline.expert_share),
            rates.roofline.expert_bend,
        )
    moved = tokens * _activation_bytes(model, tensor) / rates.bytes_read
    return seconds + moved + _communication(rates, model, deployment, tokens)


def touched_experts(count: int, per_token: int, tokens: int) -> float:
    """Expected number of a layer's experts that `tokens` tokens reach, evenly spread."""
    return count * (1.0 - (1.0 - per_token / count) ** tokens)


def _activation_bytes(model: ModelShape, tensor: int) -> float:
    """Bytes a token's activations move through memory between the matrix products, over all layers.

    Two fused residual additions and norms read and write two vectors each; rotating queries and keys and gating the MLP
    read and write theirs once (vllm/model_executor/layers/{layernorm,rotary_embedding,activation}.py).
    """
    rotated = 2 * (model.attention_heads + (1 if model.latent else model.kv_heads)) * model.head_dim / tensor
    dense = model.layers - (model.experts.layers if model.experts else 0)
    gated = dense * model.intermediate_size
    if model.experts:
        width = model.experts.per_token * model.experts.intermediate_size + model.experts.shared_intermediate_size
        gated += model.experts.layers * width
    return BYTES * (model.layers * (8 * model.hidden_size + rotated) + model.mlp_matrices * gated / tensor)


# ---- attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attention:
    """Seconds, as StepTime's coefficients."""

    per_context_token: float
    per_pair: float
    per_decode_sequence: float
    per_prefill_token: float


def _attention(rates: _Rates, model: ModelShape, deployment: Deployment) -> _Attention:
    tensor = deployment.tensor_parallel_size
    heads = model.attention_heads / tensor
    element = 1 if deployment.kv_cache_dtype == "fp8" else 2
    reading = model.kv_elements_per_token(tensor) * element / rates.bytes_read
    operations = rates.operations(model.dtype, rates.roofline.attention_share)
    # A decode under MLA works on the latent vectors themselves: for every head as wide as they are, twice.
    width = (
        (model.head_dim + model.value_head_dim)
        if not model.latent
        else (2 * model.latent.kv_lora_rank + model.latent.qk_rope_head_dim)
    )
    decode = max(reading, 2.0 * heads * width / operations)
    pair = 2.0 * heads * (model.head_dim + model.value_head_dim) / operations
    if model.indexer:
        return _indexed_attention(rates, model, model.indexer, decode, pair)
    sliding = model.sliding_layers if model.sliding_layers < model.layers else 0
    window = (model.sliding_window_tokens or 0) * sliding
    full = model.layers - sliding
    return _Attention(
        per_context_token=full * decode,
        per_pair=full * pair,
        per_decode_sequence=window * decode,
        per_prefill_token=window * pair,
    )


def _indexed_attention(rates: _Rates, model: ModelShape, indexer: Indexer, decode: float, pair: float) -> _Attention:
    """Attention to the `top_k` tokens that an indexer chooses, taken to be filled, and the indexer's own scan.

    Every GPU scans with all of the indexer's heads, in 8 bits (DeepGEMM's `fp8_mqa_logits`).
    """
    score = 2.0 * indexer.heads * indexer.head_dim / rates.operations("fp8", rates.roofline.attention_share)
    scan = max(indexer.bytes_per_token / rates.bytes_read, score)
    return _Attention(
        per_context_token=model.layers * scan,
        per_pair=model.layers * score,
        per_decode_sequence=model.layers * indexer.top_k * decode,
        per_prefill_token=model.layers * indexer.top_k * pair,
    )


# ---- communication --------------------------------------------------------------------------------------------------


def _has_link(gpu: Gpu) -> bool:
    return gpu.gpu_link_bytes_per_second > gpu.pcie_bytes_per_second


def _all_reduce_launch(rates: _Rates, deployment: Deployment) -> float:
    """Seconds of one all-reduce of nothing; gathering and scattering between data-parallel ranks are as costly."""
    gpus = deployment.tensor_parallel_size * deployment.data_parallel_size
    if gpus == 1:
        return 0.0
    if _has_link(rates.gpu):
        return rates.roofline.seconds_per_all_reduce
    return gpus * rates.roofline.seconds_per_all_reduce_rank


def _communication(rates: _Rates, model: ModelShape, deployment: Deployment, tokens: int) -> float:
    """Seconds that the bytes of a step's tokens are on the links.

    An all-reduce in a ring moves 2 (g - 1) / g of its bytes over each link (Patarasuk and Yuan, JPDC 69(2), 2009). With
    data parallelism a layer's experts gather the tokens of all ranks and scatter them back (vLLM's default all-to-all
    backend, allgather_reducescatter), each (d - 1) times one rank's.
    """
    share = rates.roofline.link_share if _has_link(rates.gpu) else rates.roofline.pcie_share
    link = rates.gpu.gpu_link_bytes_per_second * share
    tensor, data = deployment.tensor_parallel_size, deployment.data_parallel_size
    token_bytes = BYTES * model.hidden_size
    seconds = 2 * model.layers * 2.0 * (tensor - 1) / tensor * tokens * token_bytes / link
    if model.experts:
        seconds += 2 * model.experts.layers * (data - 1) * tokens * token_bytes / link
    return seconds
