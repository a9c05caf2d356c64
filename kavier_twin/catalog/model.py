"""The shape of a language model: what its time, memory and cache follow from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kavier_twin.catalog.gpu import ComputeType

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["fp16", "bf16"]
KvDtype = Literal["auto", "fp8"]
QuantizationName = Literal["fp16", "bf16", "fp8", "int8", "int4", "mxfp4", "nvfp4"]


class Quantization(BaseModel):
    """How the weights of the linear layers are kept. Embeddings, output head, norms and the router stay in 16 bits.

    `bits_per_weight` includes the scales; `compute` is the type the matrix units work in; `experts_only`: attention
    and dense layers stay in 16 bits as well, as in gpt-oss; `attention`: how attention is kept where it differs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bits_per_weight: Annotated[float, Field(gt=0.0, le=32.0)]
    compute: ComputeType
    experts_only: bool = False
    attention: Quantization | None = None

    @property
    def of_attention(self) -> Quantization:
        """How the linear layers of attention are kept."""
        return QUANTIZATIONS["bf16"] if self.experts_only else self.attention or self

    @property
    def of_dense_layers(self) -> Quantization:
        """How dense layers and shared experts are kept."""
        return QUANTIZATIONS["bf16"] if self.experts_only else self


# Bits with scales. INT4: one 16-bit scale per 128 weights (GPTQ and AWQ as usually published); MXFP4: one 8-bit scale
# per 32 (OCP Microscaling Formats v1.0); NVFP4: one 8-bit scale per 16 (NVIDIA). Weight-only types compute in 16 bits,
# as MXFP4 does in vLLM with 16-bit activations (vllm/model_executor/layers/quantization/mxfp4.py).
QUANTIZATIONS: dict[str, Quantization] = {
    kind.name: kind
    for kind in (
        Quantization(name="fp16", bits_per_weight=16.0, compute="fp16"),
        Quantization(name="bf16", bits_per_weight=16.0, compute="bf16"),
        Quantization(name="fp8", bits_per_weight=8.0, compute="fp8"),
        Quantization(name="int8", bits_per_weight=8.0, compute="int8"),
        Quantization(name="int4", bits_per_weight=4.125, compute="bf16"),
        Quantization(name="mxfp4", bits_per_weight=4.25, compute="bf16"),
        Quantization(name="nvfp4", bits_per_weight=4.5, compute="fp4"),
    )
}


class LatentAttention(BaseModel):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one latent vector per token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    q_lora_rank: Positive | None
    kv_lora_rank: Positive
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Positive


class Indexer(BaseModel):
    """Sparse attention (DeepSeek-V3.2, arXiv 2512.02556): `heads` of `head_dim` score every token of the context, and
    attention reads the `top_k` best. The indexer keeps one key of `head_dim` a token and layer, in 8 bits with a
    32-bit scale (vllm/v1/attention/backends/mla/indexer.py)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    top_k: Positive
    heads: Positive
    head_dim: Positive

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's key in one layer."""
        return self.head_dim + 4


class Experts(BaseModel):
    """The mixture-of-experts layers: `layers` of the model's, each with `count` experts, `per_token` of them used, and
    shared experts that every token passes, counted together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: Positive
    count: Positive
    per_token: Positive
    intermediate_size: Positive
    shared_intermediate_size: Count = 0

    @model_validator(mode="after")
    def _is_plausible(self) -> Experts:
        if self.per_token > self.count:
            raise ValueError(f"per_token: {self.per_token} experts are used of {self.count}")
        return self


class ModelShape(BaseModel):
    """A decoder-only transformer.

    Sizes are numbers of elements, `sliding_layers` the layers that attend to no more than the last
    `sliding_window_tokens`; `vector_parameters` counts biases, norms and other small ones over all layers;
    `quantization` is how the published weights are kept (None: in `dtype`), `kv_cache_dtype` the type of cache that
    the checkpoint asks for. `unread` says what of either was not understood, by the field's name here; it matters where
    the deployment leaves the choice to the checkpoint. `rule` says how the model was found where a name
    meant it, and `named_quantization` is the one that the name tells.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    architecture: str
    layers: Positive
    hidden_size: Positive
    attention_heads: Positive
    kv_heads: Positive
    head_dim: Positive
    value_head_dim: Positive
    latent: LatentAttention | None = None
    indexer: Indexer | None = None
    sliding_window_tokens: Positive | None = None
    sliding_layers: Count = 0
    intermediate_size: Positive
    mlp_matrices: Literal[2, 3] = 3
    experts: Experts | None = None
    vocab_size: Positive
    tied_embeddings: bool = False
    position_embeddings: Count = 0
    vector_parameters: Count = 0
    max_model_len: Positive
    dtype: Dtype = "bf16"
    quantization: Quantization | None = None
    kv_cache_dtype: KvDtype = "auto"
    unread: dict[str, str] = {}
    rule: str = ""
    named_quantization: QuantizationName | None = None

    @model_validator(mode="after")
    def _is_plausible(self) -> ModelShape:
        if self.attention_heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.attention_heads} attention heads do not divide into {self.kv_heads}")
        if self.sliding_layers > self.layers or (self.sliding_layers and self.sliding_window_tokens is None):
            raise ValueError("sliding_layers: at most `layers`, and with a window")
        if self.experts and self.experts.layers > self.layers:
            raise ValueError(f"experts.layers: {self.experts.layers} of {self.layers} layers")
        return self

    # ---- parameters -----------------------------------------------------------------------------------------------

    @property
    def query_parameters(self) -> int:
        """Of one layer's projections into queries."""
        width = self.attention_heads * self.head_dim
        if self.latent and self.latent.q_lora_rank:
            return self.latent.q_lora_rank * (self.hidden_size + width)
        return self.hidden_size * width

    @property
    def key_value_parameters(self) -> int:
        """Of one layer's projections into keys and values."""
        if self.latent:
            up = self.attention_heads * (self.latent.qk_nope_head_dim + self.value_head_dim)
            return self.hidden_size * (self.latent.kv_lora_rank + self.latent.qk_rope_head_dim) + (
                self.latent.kv_lora_rank * up
            )
        return self.hidden_size * self.kv_heads * (self.head_dim + self.value_head_dim)

    @property
    def indexer_parameters(self) -> int:
        """Of one layer's indexer: queries, the key, and the weights of its heads."""
        if self.indexer is None:
            return 0
        queries = (self.latent.q_lora_rank if self.latent else None) or self.hidden_size
        width = self.indexer.heads * self.indexer.head_dim
        return queries * width + self.hidden_size * (self.indexer.head_dim + self.indexer.heads)

    @property
    def attention_parameters(self) -> int:
        """Of the linear layers of attention, over all layers."""
        output = self.attention_heads * self.value_head_dim * self.hidden_size
        return self.layers * (self.query_parameters + self.key_value_parameters + output + self.indexer_parameters)

    @property
    def dense_mlp_parameters(self) -> int:
        """Of the layers without experts, and of the shared experts: what every token passes."""
        layers = self.layers - (self.experts.layers if self.experts else 0)
        width = layers * self.intermediate_size
        if self.experts:
            width += self.experts.layers * self.experts.shared_intermediate_size
        return self.mlp_matrices * self.hidden_size * width

    @property
    def expert_parameters(self) -> int:
        """Of one expert in each of the layers that have experts."""
        if not self.experts:
            return 0
        return self.experts.layers * self.mlp_matrices * self.hidden_size * self.experts.intermediate_size

    @property
    def router_parameters(self) -> int:
        return self.experts.layers * self.experts.count * self.hidden_size if self.experts else 0

    @property
    def head_parameters(self) -> int:
        """Of the projection onto the vocabulary, be it tied to the embedding or not."""
        return self.vocab_size * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Of the embeddings and, where it has weights of its own, the head."""
        copies = 1 if self.tied_embeddings else 2
        return copies * self.head_parameters + self.position_embeddings * self.hidden_size

    @property
    def total_parameters(self) -> int:
        """All weights, without those of multi-token prediction."""
        experts = self.experts.count if self.experts else 0
        return self._shared_by_all_tokens + experts * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Weights that one token passes, counted as published figures do: with embeddings, head and router."""
        used = self.experts.per_token if self.experts else 0
        return self._shared_by_all_tokens + used * self.expert_parameters

    @property
    def _shared_by_all_tokens(self) -> int:
        return (
            self.attention_parameters
            + self.dense_mlp_parameters
            + self.router_parameters
            + self.embedding_parameters
            + self.vector_parameters
        )

    # ---- bytes ----------------------------------------------------------------------------------------------------

    def stored_as(self, quantization: QuantizationName | None) -> Quantization:
        """How the linear layers are kept: as asked for, else as its name tells, else as published, else in `dtype`."""
        if (asked := quantization or self.named_quantization) is not None:
            return QUANTIZATIONS[asked]
        return self.quantization or QUANTIZATIONS[self.dtype]

    def weight_bytes(self, quantization: QuantizationName | None = None) -> int:
        """Bytes of all weights: the linear layers as `quantization` says (None: as published), the rest in 16 bits."""
        kept = self.stored_as(quantization)
        experts = (self.experts.count if self.experts else 0) * self.expert_parameters
        linear = experts + self.attention_parameters + self.dense_mlp_parameters
        bits = (
            experts * kept.bits_per_weight
            + self.attention_parameters * kept.of_attention.bits_per_weight
            + self.dense_mlp_parameters * kept.of_dense_layers.bits_per_weight
        )
        return round(bits / 8) + 2 * (self.total_parameters - linear)

    def kv_elements_per_token(self, tensor_parallel: int = 1) -> int:
        """Numbers that one token adds to the cache of one GPU in one layer.

        With fewer key-value heads than GPUs each GPU keeps one head (vllm/config/model.py, get_num_kv_heads); the
        latent vector of MLA is kept whole on every GPU.
        """
        if self.latent:
            return self.latent.kv_lora_rank + self.latent.qk_rope_head_dim
        return max(1, self.kv_heads // tensor_parallel) * (self.head_dim + self.value_head_dim)

    def kv_bytes_per_token(self, kv_dtype: KvDtype = "auto", tensor_parallel: int = 1) -> int:
        """Bytes that one token adds to the cache of one GPU, over all layers ("auto": 16 bits).

        The indexer's key comes on top. With it an 8-bit latent vector keeps its rotated part in 16 bits and a 32-bit
        scale for each 128 elements (vLLM's fp8_ds_mla: 656 bytes for 512 + 64 elements).
        """
        layer = self.kv_elements_per_token(tensor_parallel) * (1 if kv_dtype == "fp8" else 2)
        if self.indexer:
            if self.latent and kv_dtype == "fp8":
                layer += self.latent.qk_rope_head_dim + self.latent.kv_lora_rank // 32
            layer += self.indexer.bytes_per_token
        return self.layers * layer
