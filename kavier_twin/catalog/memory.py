"""How many cache blocks fit: what vLLM finds out by profiling at start, estimated from shapes.

vLLM (v1/worker/gpu_worker.py, determine_available_memory) takes its share of the device, loads the weights, runs one
batch of the largest size and then the sampler on the largest number of sequences, and gives the cache what is left.
"""

from __future__ import annotations

from kavier_twin.catalog.deployment import Deployment, check, largest_batch, weight_bytes_per_gpu
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.gpu import Gpu
from kavier_twin.catalog.model import ModelShape

# Bytes per logit that the sampler's profile run holds at once (v1/worker/gpu_model_runner.py, _dummy_sampler_run: top-k
# and top-p on, so the logits are sorted): the model's 16-bit logits, their FP32 copy, the sorted values with 64-bit
# indices, and the two 64-bit work arrays of PyTorch's segmented sort (aten/src/ATen/native/cuda/Sort.cu).
SAMPLER_BYTES_PER_LOGIT = 2 + 4 + 4 + 8 + 16
# Workspaces of cuBLAS and the attention kernels, outside PyTorch's allocator: what vLLM logs as non-torch memory is
# 0.05 to 0.15 GiB on one GPU; each further GPU brings NCCL's buffers (AIConfigurator 0.12.0, systems/*.yaml, nccl_mem:
# 342 MiB for two, 392 MiB for four and eight).
NON_TORCH_BYTES = 96 * 2**20
NCCL_BYTES = {1: 0, 2: 342 * 2**20}
NCCL_BYTES_FROM_FOUR = 392 * 2**20
# CUDA graphs, which vLLM estimates and sets aside since 0.21; logs of 8B to 70B models show 0.3 to 0.7 GiB.
CUDA_GRAPH_BYTES = 512 * 2**20


def activation_peak_bytes(
    model: ModelShape, deployment: Deployment, *, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """Largest memory of activations on one GPU in vLLM's profile run, estimated.

    Either a layer on the largest batch: residual, its normed copy and the layer's output (hidden_size each) beside the
    widest pair of the layer's tensors; or, after the layers, the sampler: its logits are of the whole vocabulary on
    every GPU. The batch's last hidden states stay during both.
    """
    tensor = deployment.tensor_parallel_size
    hidden = model.hidden_size
    queries = model.attention_heads * (model.head_dim + model.value_head_dim)
    keys = 0 if model.latent else model.kv_heads * (model.head_dim + model.value_head_dim)
    widest = max((queries + keys) // tensor, model.mlp_matrices * model.intermediate_size // tensor)
    if model.experts:
        used = model.experts.per_token
        slices = 1 if deployment.enable_expert_parallel else tensor
        widest = max(widest, used * (model.mlp_matrices * model.experts.intermediate_size // slices + hidden))
    layer = max_num_batched_tokens * 2 * (3 * hidden + widest)
    sampler = min(max_num_seqs, max_num_batched_tokens) * model.vocab_size * SAMPLER_BYTES_PER_LOGIT
    return max(layer, sampler) + 2 * max_num_batched_tokens * hidden


def num_gpu_blocks(
    gpu: Gpu,
    model: ModelShape,
    deployment: Deployment | None = None,
    *,
    gpu_memory_utilization: float = 0.92,
    block_size: int = 16,
    max_num_batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
    cuda_graph_bytes: int = CUDA_GRAPH_BYTES,
) -> int:
    """Blocks of `block_size` tokens that vLLM would report as num_gpu_blocks; it includes the null block.

    utilisation * memory - weights - activation peak - workspaces - CUDA graphs, over the bytes of a block
    (v1/core/kv_cache_utils.py, get_num_blocks). Layers with a sliding window count like the others: vLLM keeps them in
    groups that draw on the same blocks, and this is the number that gives the cache the same tokens. Defaults are vLLM
    0.32's; vLLM before 0.21 set nothing aside for CUDA graphs.

    Raises CatalogError where nothing is left, saying what takes the memory.
    """
    deployment = deployment or Deployment()
    check(model, deployment)
    default_tokens, default_sequences = largest_batch(gpu, max_model_len=model.max_model_len)
    weights = weight_bytes_per_gpu(model, deployment)
    activations = activation_peak_bytes(
        model,
        deployment,
        max_num_batched_tokens=max_num_batched_tokens or default_tokens,
        max_num_seqs=max_num_seqs or default_sequences,
    )
    gpus = deployment.tensor_parallel_size
    other = NON_TORCH_BYTES + NCCL_BYTES.get(deployment.expert_gpus, NCCL_BYTES_FROM_FOUR) + cuda_graph_bytes
    granted = gpu_memory_utilization * gpu.usable_memory_bytes
    left = granted - weights - activations - other
    block = block_size * model.kv_bytes_per_token(deployment.kv_cache_dtype, gpus)
    if left < 2 * block:
        gib = 2**30
        raise CatalogError(
            f"{model.name} does not fit on {gpus} x {gpu.name}: of {granted / gib:.1f} GiB per GPU weights take"
            f" {weights / gib:.1f}, activations {activations / gib:.1f}, the rest {other / gib:.1f}; use more GPUs"
            " (tensor_parallel_size), a quantization, or fewer max_num_batched_tokens and max_num_seqs"
        )
    return int(left // block)
