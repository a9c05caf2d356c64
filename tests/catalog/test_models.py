"""Sizes derived from a config.json agree with what is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kavier_twin.catalog.config_json import read_config
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.models import find_model, models

# Totals of the published weights: Hugging Face, safetensors metadata of each repository.
TOTALS = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-2-7b": 6_738_415_616,
    "meta-llama/Llama-2-13b": 13_015_864_320,
    "meta-llama/Llama-2-70b": 68_976_648_192,
    "codellama/CodeLlama-34b": 33_743_970_304,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "bigcode/starcoder2-15b": 15_957_889_024,
}
# Rounded figures of model cards, in billions: (total, active).
ROUNDED = {
    "deepseek-ai/DeepSeek-V3": (671.0, 37.0),
    "mistralai/Mixtral-8x7B-v0.1": (46.7, 12.9),
    "Qwen/Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen/Qwen3-235B-A22B": (235.0, 22.0),
    "ibm-granite/granite-20b-code-base-8k": (20.1, 20.1),
    "mosaicml/mpt-30b": (29.96, 29.96),
    "google/gemma-3-27b": (27.0, 27.0),
}


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_to_the_last_one(name: str) -> None:
    assert find_model(name).total_parameters == TOTALS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_as_the_cards_round_them(name: str) -> None:
    total, active = ROUNDED[name]
    model = find_model(name)
    assert model.total_parameters / 1e9 == pytest.approx(total, rel=0.002)
    assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.02)


def test_gpt_oss_counts_no_embedding_among_its_active_parameters() -> None:
    """OpenAI's 5.1 and 3.6 billion leave the embedding table out."""
    for name, billions in (("openai/gpt-oss-120b", 5.13), ("openai/gpt-oss-20b", 3.61)):
        model = find_model(name)
        assert (model.active_parameters - model.head_parameters) / 1e9 == pytest.approx(billions, rel=0.01)


def test_against_the_recorded_shapes(shared_data: Path) -> None:
    for name, row in json.loads((shared_data / "h100" / "stages.json").read_text())["model_configs"].items():
        model = find_model(name)
        assert model.total_parameters == row["params_total"]
        assert model.active_parameters == row["params_active_per_token"]
        assert model.kv_bytes_per_token() == row["kv_bytes_per_token_fp16"]


def test_cache_bytes_of_every_kind_of_attention() -> None:
    def cached(name: str) -> int:
        return find_model(name).kv_bytes_per_token()

    assert cached("Llama-2-13b") == 40 * 2 * 40 * 128 * 2  # one key and value a head
    assert cached("Llama-3.1-8B") == 32 * 2 * 8 * 128 * 2  # grouped
    assert cached("granite-20b-code-base-8k") == 52 * 2 * 1 * 128 * 2  # one for all heads
    assert cached("DeepSeek-V3") == 61 * (512 + 64) * 2  # latent
    assert find_model("Llama-3.1-8B").kv_bytes_per_token("fp8") == cached("Llama-3.1-8B") // 2


def test_a_head_is_kept_whole_where_gpus_are_more() -> None:
    model = find_model("Qwen3-30B-A3B")
    assert model.kv_elements_per_token(8) == model.kv_elements_per_token(4)
    assert find_model("DeepSeek-V3").kv_elements_per_token(8) == 576


def test_weight_bytes_under_quantization() -> None:
    llama = find_model("Llama-3.1-8B")
    kept_in_16_bits = 2 * llama.embedding_parameters
    assert llama.weight_bytes() == 2 * llama.total_parameters
    assert llama.weight_bytes("fp8") == pytest.approx(llama.weight_bytes() / 2 + kept_in_16_bits / 2, rel=1e-3)
    assert llama.weight_bytes("int4") < llama.weight_bytes("nvfp4") < llama.weight_bytes("fp8")
    # OpenAI: a checkpoint of 60.8 GiB; attention stays in 16 bits.
    assert find_model("gpt-oss-120b").weight_bytes() / 2**30 == pytest.approx(60.8, rel=0.01)


GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
FOREIGN: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt2": (124_439_808, GPT2),
    "falcon-7b": (
        6_921_720_704,
        {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32,
         "multi_query": True, "parallel_attn": True, "bias": False, "vocab_size": 65024},
    ),
    "phi-2": (
        2_779_683_840,
        {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32,
         "num_hidden_layers": 32, "vocab_size": 51200, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    ),
    "Phi-3-mini-4k": (
        3_821_079_552,
        {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
         "num_hidden_layers": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "tie_word_embeddings": False},
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
         "num_key_value_heads": 4, "num_hidden_layers": 28, "vocab_size": 152064, "max_position_embeddings": 131072,
         "use_sliding_window": False, "tie_word_embeddings": False},
    ),
    "gemma-2-9b": (
        9_241_705_984,
        {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 256, "num_hidden_layers": 42, "vocab_size": 256000,
         "sliding_window": 4096, "max_position_embeddings": 8192},
    ),
    "Qwen1.5-MoE-A2.7B": (
        14_315_784_192,
        {"model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408,
         "shared_expert_intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
         "num_hidden_layers": 24, "num_experts": 60, "num_experts_per_tok": 4, "decoder_sparse_step": 1,
         "vocab_size": 151936, "max_position_embeddings": 8192, "tie_word_embeddings": False},
    ),
    "DeepSeek-V2-Lite": (
        15_706_484_224,
        {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
         "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
         "moe_layer_freq": 1, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
         "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "vocab_size": 102400, "max_position_embeddings": 163840, "tie_word_embeddings": False},
    ),
    "bloom-560m": (
        559_214_592,
        {"model_type": "bloom", "hidden_size": 1024, "n_head": 16, "n_layer": 24, "vocab_size": 250880,
         "seq_length": 2048},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_models_that_do_not_ship(name: str) -> None:
    total, raw = FOREIGN[name]
    assert read_config(raw, name).total_parameters == total


LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 128,
}  # fmt: skip


def test_the_language_part_of_a_multimodal_model() -> None:
    assert read_config({"model_type": "vision", "text_config": LLAMA}, "x").hidden_size == 64


def test_sliding_windows() -> None:
    def sliding(**extra: Any) -> tuple[int | None, int]:
        model = read_config(LLAMA | {"num_hidden_layers": 12} | extra, "x")
        return model.sliding_window_tokens, model.sliding_layers

    assert sliding() == (None, 0)
    assert sliding(sliding_window=64) == (64, 12)
    assert sliding(sliding_window=64, use_sliding_window=False) == (None, 0)
    assert sliding(sliding_window=64, sliding_window_pattern=6) == (64, 10)
    assert sliding(sliding_window=64, layer_types=["sliding_attention", "full_attention"] * 6) == (64, 6)


@pytest.mark.parametrize(
    ("raw", "bits", "compute"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8.0, "fp8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.15625, "bf16"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, 4.625, "bf16"),
        ({"quant_method": "mxfp4"}, 4.25, "bf16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5, "fp4"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {
                "weights": {"num_bits": 8, "type": "float"}, "input_activations": {"num_bits": 8, "type": "float"}}}},
            8.0,
            "fp8",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {
                "weights": {"num_bits": 4, "type": "int", "group_size": 128}, "input_activations": None}}},
            4.15625,
            "bf16",
        ),
    ],
)  # fmt: skip
def test_how_quantizers_say_it(raw: dict[str, Any], bits: float, compute: str) -> None:
    found = read_config(LLAMA | {"quantization_config": raw}, "x").quantization
    assert found is not None
    assert (found.bits_per_weight, found.compute) == (bits, compute)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "a JSON object"),
        ({**LLAMA, "hidden_size": None}, "hidden_size: a whole number"),
        ({**LLAMA, "num_key_value_heads": 3}, "kv_heads: 4 attention heads"),
        ({**LLAMA, "quantization_config": {"quant_method": "magic"}}, "method 'magic' is not known; known: fp8"),
        ({**LLAMA, "layer_types": ["linear_attention", "full_attention"]}, "linear_attention: .*not simulated"),
        ({**LLAMA, "block_configs": [{}]}, "block_configs: .*not simulated"),
        ({**LLAMA, "num_experts": 4, "num_experts_per_tok": 5}, "per_token: 5 experts"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(raw: Any, message: str) -> None:
    with pytest.raises(CatalogError, match=f"mine.json: .*{message}") as error:
        read_config(raw, "mine.json")
    assert "\n" not in str(error.value)


def test_names_and_files(tmp_path: Path) -> None:
    assert find_model("meta-llama/Llama-2-7b-hf") is models()["meta-llama/Llama-2-7b"]
    assert find_model("CodeLlama-34b-Instruct-hf") is models()["codellama/CodeLlama-34b"]
    assert find_model("Meta-Llama-3.1-8B-Instruct") is models()["meta-llama/Llama-3.1-8B"]
    with pytest.raises(CatalogError, match=r"'gpt-5'.*Qwen/Qwen3-32B.*config.json"):
        find_model("gpt-5")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert find_model(str(tmp_path)).hidden_size == 64
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert find_model(str(tmp_path)).stored_as(None).name == "nvfp4"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CatalogError, match=r"config.json: not JSON"):
        find_model(str(tmp_path / "config.json"))
    with pytest.raises(CatalogError, match="cannot be read"):
        find_model(str(tmp_path / "none.json"))
