"""Sizes derived from a config.json agree with what is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kavier_twin.catalog.config_json import read_config
from kavier_twin.catalog.deployment import Deployment, check
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.models import find_model

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
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mistral-Nemo-12B-2407": 12_247_782_400,
    "mistralai/Mistral-Large-2411": 122_610_069_504,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b": 999_885_952,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
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
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (107.8, 17.0),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (400.7, 17.0),
    "MiniMaxAI/MiniMax-M2.5": (228.7, 11.0),
    "ibm-granite/granite-3.3-8b": (8.17, 8.17),
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
        ({**LLAMA, "layer_types": ["linear_attention", "full_attention"]}, "linear_attention: .*not simulated"),
        ({**LLAMA, "block_configs": [{}]}, "block_configs: .*not simulated"),
        ({**LLAMA, "layer_types": ["full_attention"]}, "layer_types: 1 kinds for 2 layers"),
        ({**LLAMA, "layer_types": ["full_attention", "tidal"]}, "layers of kind 'tidal'"),
        ({**LLAMA, "mamba_d_state": 16}, "mamba_d_state: .*state"),
        ({**LLAMA, "full_attention_interval": 4}, "full_attention_interval: .*state"),
        ({**LLAMA, "num_kv_shared_layers": 1}, "num_kv_shared_layers: not understood"),
        ({**LLAMA, "cross_attention_layers": [1]}, "cross_attention_layers: not understood"),
        ({**LLAMA, "sparse_attention_config": {"x": 1}}, "sparse_attention_config: not understood"),
        ({**LLAMA, "attn_type_list": [1, 0]}, "attn_type_list: not understood"),
        ({**LLAMA, "attention_chunk_size": 64}, "attention_chunk_size: .*which layers"),
        ({**LLAMA, "num_key_value_heads": [1, 2]}, "num_key_value_heads: .*differ in size"),
        ({**LLAMA, "vocab_size": None}, "vocab_size: a whole number"),
        ({**LLAMA, "model_type": "whisper"}, "whisper: only decoders"),
        ({**LLAMA, "num_experts": 4, "num_experts_per_tok": 5}, "per_token: 5 experts"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(raw: Any, message: str) -> None:
    with pytest.raises(CatalogError, match=f"mine.json: .*{message}") as error:
        read_config(raw, "mine.json")
    assert "\n" not in str(error.value)


@settings(max_examples=100)
@given(
    stem=st.sampled_from(["attention", "kv", "window", "mamba", "cache", "layer_types", "ssm", "block_type", "sparse"]),
    before=st.from_regex(r"[a-z]{3,8}_", fullmatch=True),
    value=st.one_of(st.integers(1, 99), st.just([1, 2]), st.just({"a": 1})),
)
def test_no_unknown_field_that_tells_of_a_cache_is_passed_over(stem: str, before: str, value: Any) -> None:
    name = f"zz{before}{stem}"
    read_config(LLAMA | {name: None}, "mine.json")  # a null tells nothing
    with pytest.raises(CatalogError, match=f"{name}: "):
        read_config(LLAMA | {name: value}, "mine.json")


def test_what_changes_neither_cache_nor_layers_is_passed_over() -> None:
    plain = read_config(LLAMA, "x")
    harmless = {
        "attention_dropout": 0.1, "attention_probs_dropout_prob": 0.1, "use_cache": True,
        "attn_logit_softcapping": 50.0,
        "_attn_implementation": "sdpa", "query_pre_attn_scalar": 256, "attention_multiplier": 0.1, "is_decoder": True,
        "rope_local_base_freq": 10_000, "attn_type_list": [1, 1], "encoder_no_repeat_ngram_size": 0,
    }  # fmt: skip
    assert read_config(LLAMA | harmless, "x") == plain


def test_a_hybrid_family_without_hybrid_layers() -> None:
    """Granite 4 micro lists attention for every layer and keeps the family's fields of Mamba."""
    fields = {"model_type": "granitemoehybrid", "layer_types": ["attention"] * 2, "mamba_d_state": 128}
    assert read_config(LLAMA | fields, "x").layers == 2


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*self_attn*"]}, (16.0, 4.5)),
        ({"quant_method": "fp8", "modules_to_not_convert": ["gate", "lm_head"]}, (8.0, 8.0)),
        (
            {"quant_method": "compressed-tensors", "ignore": ["re:.*self_attn.*"], "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}}},
            (16.0, 4.625),
        ),
    ],
)  # fmt: skip
def test_layers_that_a_quantizer_spared(raw: dict[str, Any], parts: tuple[float, float]) -> None:
    kept = read_config(LLAMA | {"quantization_config": raw}, "x").stored_as(None)
    assert (kept.of_attention.bits_per_weight, kept.of_dense_layers.bits_per_weight) == parts


@pytest.mark.parametrize(
    ("raw", "dtype"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None}, "auto"),
        ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}, "fp8"),
        ({"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "fp8"),
        ({"quant_method": "fp8", "kv_cache_scheme": None}, "auto"),
    ],
)
def test_the_cache_that_a_checkpoint_asks_for(raw: dict[str, Any], dtype: str) -> None:
    assert read_config(LLAMA | {"quantization_config": raw}, "x").kv_cache_dtype == dtype


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"quant_method": "magic"}, "method 'magic' is not known; known: fp8.*set hardware.quantization"),
        ({"quant_method": "modelopt", "quant_algo": "W3A3"}, "quant_algo 'W3A3' is not known.*hardware.quantization"),
        ({"quant_method": "fp8", "kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo: 'NVFP4'.*kv_cache_dtype"),
        (
            {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8, "type": "int"}},
            "kv_cache_scheme: 8 bits of type 'int'",
        ),
    ],
)
def test_types_that_are_not_known_matter_where_the_checkpoint_decides(raw: dict[str, Any], message: str) -> None:
    shape = read_config(LLAMA | {"quantization_config": raw}, "mine.json")
    with pytest.raises(CatalogError, match=f"mine.json: quantization_config: {message}"):
        check(shape, Deployment())
    check(shape, Deployment(quantization="fp8", kv_cache_dtype="fp8"))


def test_the_defaults_of_a_family_stand_for_what_a_text_part_leaves_out() -> None:
    llava = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32_064}}
    assert read_config(llava, "x").kv_bytes_per_token() == find_model("Llama-2-7b").kv_bytes_per_token()


def test_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert find_model(str(tmp_path)).hidden_size == 64
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert find_model(str(tmp_path)).stored_as(None).name == "nvfp4"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CatalogError, match=r"config.json: not JSON"):
        find_model(str(tmp_path / "config.json"))
    with pytest.raises(CatalogError, match="cannot be read"):
        find_model(str(tmp_path / "none.json"))
