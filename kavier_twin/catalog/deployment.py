"""How one engine lays a model onto GPUs. Names are those of vLLM's flags."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.gpu import Gpu
from kavier_twin.catalog.model import KvDtype, ModelShape, QuantizationName

Degree = Annotated[int, Field(ge=1, le=1024)]


class Deployment(BaseModel):
    """Tensor parallelism shards every layer over `tensor_parallel_size` GPUs. With data parallelism each of
    `data_parallel_size` ranks has requests, attention and cache of its own, while the experts are spread over all
    GPUs: whole experts with `enable_expert_parallel`, slices of each without (vLLM's documentation, data parallel and
    expert parallel deployment). `quantization`: None keeps the weights as published.
    `async_scheduling` is vLLM's default since 0.14 and hides most of the host's work behind the GPU's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor_parallel_size: Degree = 1
    data_parallel_size: Degree = 1
    enable_expert_parallel: bool = False
    quantization: QuantizationName | None = None
    kv_cache_dtype: KvDtype = "auto"
    async_scheduling: bool = True

    @property
    def expert_gpus(self) -> int:
        """GPUs that share the experts."""
        return self.tensor_parallel_size * self.data_parallel_size


def check(model: ModelShape, deployment: Deployment) -> None:
    """Raises CatalogError where vLLM would refuse to start, as heads or experts do not divide, and where the choice of
    a type is left to a checkpoint that is not understood."""
    tensor = deployment.tensor_parallel_size
    if model.attention_heads % tensor:
        raise CatalogError(
            f"tensor_parallel_size: {model.name} has {model.attention_heads} heads, not a multiple of {tensor}"
        )
    if deployment.enable_expert_parallel and model.experts is None:
        raise CatalogError(f"enable_expert_parallel: {model.name} has no experts")
    if deployment.quantization is None and model.named_quantization is None and "quantization" in model.unread:
        raise CatalogError(f"{model.unread['quantization']}; set hardware.quantization")
    if deployment.kv_cache_dtype == "auto" and "kv_cache_dtype" in model.unread:
        raise CatalogError(f"{model.unread['kv_cache_dtype']}; set engine.kv_cache_dtype to fp8")


def weight_bytes_per_gpu(model: ModelShape, deployment: Deployment) -> int:
    """Bytes of weights on one GPU: linear layers, embedding and head sharded, norms and router on every one, keys' and
    values' projections on as many as there are heads (vllm/model_executor/layers: linear.py, vocab_parallel_embedding).
    """
    tensor = deployment.tensor_parallel_size
    kept = model.stored_as(deployment.quantization)
    copies = 1.0 if model.latent else max(1.0, tensor / model.kv_heads)  # of each key and value head
    key_values = model.layers * model.key_value_parameters
    attention = (model.attention_parameters - key_values + key_values * copies) / tensor
    dense = model.dense_mlp_parameters / tensor
    experts = (model.experts.count if model.experts else 0) * model.expert_parameters / deployment.expert_gpus
    replicated = model.router_parameters + model.vector_parameters + model.position_embeddings * model.hidden_size
    sharded = (model.embedding_parameters - model.position_embeddings * model.hidden_size) / tensor
    bits = (
        attention * kept.of_attention.bits_per_weight
        + dense * kept.of_dense_layers.bits_per_weight
        + experts * kept.bits_per_weight
    )
    return round(bits / 8 + 2 * (replicated + sharded))


def largest_batch(gpu: Gpu, *, max_model_len: int) -> tuple[int, int]:
    """vLLM's defaults (max_num_batched_tokens, max_num_seqs) for its API server on one GPU.

    By memory: 16384 and 1024 from 160 GiB, 8192 and 1024 from 70 GiB unless an A100, else 2048 and 256; then no more
    tokens than max_num_seqs sequences of max_model_len have (vLLM 0.32, engine/arg_utils.py, get_batch_defaults).
    """
    gib = gpu.usable_memory_bytes / 2**30
    if gib >= 160:
        tokens, sequences = 16_384, 1024
    elif gib >= 70 and "A100" not in gpu.name:
        tokens, sequences = 8192, 1024
    else:
        tokens, sequences = 2048, 256
    tokens = min(tokens, sequences * max_model_len)
    return tokens, min(sequences, tokens)
