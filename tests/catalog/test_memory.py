"""Cache blocks as vLLM finds them by profiling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kavier_twin.catalog.deployment import Deployment, largest_batch, weight_bytes_per_gpu
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.gpu import find_gpu, gpus
from kavier_twin.catalog.memory import activation_peak_bytes, num_gpu_blocks
from kavier_twin.catalog.models import find_model, models


def test_a_recorded_engine(shared_data: Path) -> None:
    """vLLM 0.19 on an RTX 4090, which set nothing aside for CUDA graphs."""
    meta = json.loads((shared_data / "rtx" / "RTX4090-Llama-3.1-8B" / "meta.json").read_text())
    gpu = find_gpu(meta["hardware"]["device_name"])
    assert gpu.usable_memory_bytes == meta["hardware"]["device_total_memory_bytes"]
    found = num_gpu_blocks(
        gpu,
        find_model(meta["model"]),
        gpu_memory_utilization=meta["kv_cache"]["gpu_memory_utilization"],
        block_size=meta["kv_cache"]["block_size"],
        max_num_batched_tokens=meta["engine_kwargs"]["max_num_batched_tokens"],
        max_num_seqs=meta["engine_kwargs"]["max_num_seqs"],
        cuda_graph_bytes=0,
    )
    assert found == pytest.approx(meta["kv_cache"]["num_gpu_blocks"], rel=0.01)


def test_activations_of_published_logs() -> None:
    """vLLM pull request 10511 (8,192 tokens, 256 sequences): 1.26 GiB for Llama-3-8B, the same with two GPUs."""
    model = find_model("Meta-Llama-3-8B")
    for tensor in (1, 2):
        peak = activation_peak_bytes(
            model, Deployment(tensor_parallel_size=tensor), max_num_batched_tokens=8192, max_num_seqs=256
        )
        assert peak / 2**30 == pytest.approx(1.26, rel=0.15)


def test_weights_are_sharded() -> None:
    llama = find_model("Llama-3.1-70B")
    whole = weight_bytes_per_gpu(llama, Deployment())
    assert whole == llama.weight_bytes()
    norms = 2 * llama.vector_parameters
    assert weight_bytes_per_gpu(llama, Deployment(tensor_parallel_size=8)) == pytest.approx(
        (whole - norms) / 8 + norms, rel=1e-6
    )
    # 4 key-value heads on 8 GPUs: each head is there twice.
    qwen = find_model("Qwen3-30B-A3B")
    assert weight_bytes_per_gpu(qwen, Deployment(tensor_parallel_size=8)) > qwen.weight_bytes() / 8 * 1.005
    # Experts are spread over the data-parallel ranks as well, attention is not.
    spread = weight_bytes_per_gpu(qwen, Deployment(data_parallel_size=8, enable_expert_parallel=True))
    attention = 2 * (qwen.attention_parameters + qwen.embedding_parameters)
    experts = 2 * 128 * qwen.expert_parameters / 8
    assert spread == pytest.approx(attention + experts, rel=0.01)


@pytest.mark.parametrize(
    ("gpu", "batch"),
    [("b200_sxm", (16_384, 1024)), ("h100_sxm", (8192, 1024)), ("a100_sxm_80gb", (2048, 256)), ("l4", (2048, 256))],
)
def test_default_batches_by_memory(gpu: str, batch: tuple[int, int]) -> None:
    assert largest_batch(find_gpu(gpu), max_model_len=131_072) == batch


def test_default_batches_are_no_larger_than_sequences_fill() -> None:
    assert largest_batch(find_gpu("h100_sxm"), max_model_len=4) == (4096, 1024)


def test_more_memory_more_blocks_everywhere() -> None:
    """Utilisation, a smaller cache type, more GPUs and smaller batches each give blocks."""
    tried = 0
    for gpu in gpus().values():
        for model in models().values():
            try:
                base = num_gpu_blocks(gpu, model)
            except CatalogError:
                continue
            tried += 1
            assert num_gpu_blocks(gpu, model, gpu_memory_utilization=0.95) > base
            assert num_gpu_blocks(gpu, model, Deployment(kv_cache_dtype="fp8")) >= 2 * base
            assert num_gpu_blocks(gpu, model, Deployment(tensor_parallel_size=2)) > base
            tokens, sequences = largest_batch(gpu, max_model_len=model.max_model_len)
            fewer = num_gpu_blocks(gpu, model, max_num_batched_tokens=tokens // 2, max_num_seqs=sequences // 2)
            assert fewer > base
    assert tried > 100


def test_what_does_not_fit_says_what_takes_the_memory() -> None:
    with pytest.raises(CatalogError, match=r"Llama-3.1-70B does not fit on 1 x NVIDIA H100.*weights take 131.4"):
        num_gpu_blocks(find_gpu("h100"), find_model("Llama-3.1-70B"))


def test_heads_must_divide() -> None:
    with pytest.raises(CatalogError, match="64 heads, not a multiple of 3"):
        num_gpu_blocks(find_gpu("h100"), find_model("Llama-3.1-70B"), Deployment(tensor_parallel_size=3))
    with pytest.raises(CatalogError, match="has no experts"):
        num_gpu_blocks(find_gpu("h100"), find_model("Llama-3.1-8B"), Deployment(enable_expert_parallel=True))
