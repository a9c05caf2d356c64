"""`config.json` files as published: each read right, with the engine that follows from it, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kavier_twin.catalog.deployment import Deployment
from kavier_twin.catalog.gpu import find_gpu
from kavier_twin.catalog.models import find_model
from kavier_twin.errors import UserError
from kavier_twin.hardware.fleet_file import FleetFile
from kavier_twin.hardware.roofline import step_time
from kavier_twin.recordings.scenario import read_fleet

FILES = Path(__file__).parents[1] / "data" / "cases" / "models"


def fleet_of(name: str, gpu: str, tensor: int = 1, **hardware: object) -> FleetFile:
    told = {"gpu": gpu, "model": str(FILES / f"{name}.json"), "tensor_parallel_size": tensor, **hardware}
    return FleetFile.model_validate({"hardware": told})


@pytest.mark.parametrize(
    ("name", "gpu", "tensor", "bytes_per_token_and_gpu", "blocks", "billions"),
    [
        ("deepseek-v3.2-indexer", "H200", 8, 61 * (576 * 2 + 132), 38_400, 671.9),
        ("ernie-4.5-start-index", "H100 SXM 80GB", 1, 57_344, 32_900, 21.8),
        ("kv-fp8-by-checkpoint", "H200", 2, 163_840 // 2, 73_370, 70.6),
        ("compressed-tensors-two-groups", "H200", 2, 327_680 // 2, 41_400, 70.6),
        ("gemma-3-4b-nested", "L4", 1, 139_264, 4970, 3.88),
        ("gemma-3-12b-nested", "H100 SXM 80GB", 1, 393_216, 7160, 11.77),
        ("gemma-3-12b-nested_vocab", "H100 SXM 80GB", 1, 393_216, 7160, 11.77),
        ("qwen2.5-omni-thinker", "L40S", 1, 57_344, 29_000, 7.616),
    ],
)
def test_what_is_read_right(
    name: str, gpu: str, tensor: int, bytes_per_token_and_gpu: int, blocks: int, billions: float
) -> None:
    fleet = fleet_of(name, gpu, tensor)
    assert fleet.hardware is not None
    assert fleet.engine.kv_bytes_per_token == tensor * bytes_per_token_and_gpu
    assert fleet.engine.num_gpu_blocks == pytest.approx(blocks, rel=0.01)
    assert fleet.hardware.shape.total_parameters / 1e9 == pytest.approx(billions, rel=0.002)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("qwen3-next", "qwen3_next: layers that keep a state"),
        ("falcon-h1", "falcon_h1: layers that keep a state"),
        ("step-3.5-attention-groups", "attention_other_setting: not understood"),
        ("gemma-3n-kv-sharing", "num_kv_shared_layers, .*not understood"),
        ("modelopt-mixed-precision", "quant_algo 'MIXED_PRECISION' is not known; .*set hardware.quantization"),
    ],
)
def test_what_is_refused_by_name(tmp_path: Path, name: str, named: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(f"hardware: {{gpu: H200, model: {FILES / name}.json, tensor_parallel_size: 2}}\n")
    with pytest.raises(UserError, match=f"{name}.json: .*{named}"):
        read_fleet(path)


def test_an_algorithm_that_is_not_known_gives_way_to_the_setting() -> None:
    fleet = fleet_of("modelopt-mixed-precision", "H200", 2, quantization="nvfp4")
    assert fleet.engine.kv_cache_dtype == "fp8"  # of that the file speaks plainly


def test_three_of_four_layers_of_llama_4_attend_within_a_chunk() -> None:
    """The published file tells it by nothing but the family; the other has the same as `layer_types`."""
    published, listed = (fleet_of(f"llama-4-chunked{name}", "H200", 8) for name in ("", "_with_layer_types"))
    assert published.step_time == listed.step_time
    assert published.step_time.per_context_token == pytest.approx(1.52e-9, rel=0.01)
    assert published.step_time.per_prefill_attention == pytest.approx(5.6e-11, rel=0.01)


def test_attention_to_chosen_tokens_stops_growing() -> None:
    """DeepSeek-V3.2 reads 2,048 tokens however long the context; without the fields it would be V3.1."""
    deployment, gpu = Deployment(tensor_parallel_size=8), find_gpu("H200")
    sparse = step_time(gpu, find_model(str(FILES / "deepseek-v3.2-indexer.json")), deployment)
    dense = step_time(gpu, find_model("deepseek-ai/DeepSeek-V3"), deployment)
    assert sparse.per_context_token < dense.per_context_token / 4
    assert sparse.per_decode_sequence - dense.per_decode_sequence == pytest.approx(2048 * dense.per_context_token)


def test_a_checkpoint_asks_for_its_cache_and_the_setting_goes_first() -> None:
    told = {"gpu": "H200", "model": str(FILES / "kv-fp8-by-checkpoint.json"), "tensor_parallel_size": 2}
    by_checkpoint, by_setting = (
        FleetFile.model_validate({"hardware": told, "engine": engine}).engine
        for engine in ({}, {"kv_cache_dtype": "fp8"})
    )
    assert by_checkpoint == by_setting
    assert by_checkpoint.kv_cache_dtype == "fp8"


def test_a_host_tier_is_sized_by_the_model() -> None:
    told = {"gpu": "H200", "model": "meta-llama/Llama-3.1-70B", "tensor_parallel_size": 4}
    fleet = FleetFile.model_validate({"hardware": told, "engine": {"host_tier": {"capacity_gib": 64}}})
    assert fleet.engine.kv_bytes_per_token == 327_680
    assert fleet.engine.chunks_in(64) * fleet.engine.block_size == pytest.approx(209_715, rel=0.001)
    given = FleetFile.model_validate({"hardware": told, "engine": {"kv_bytes_per_token": 1000}})
    assert given.engine.kv_bytes_per_token == 1000
