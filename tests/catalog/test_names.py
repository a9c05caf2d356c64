"""Served names find their architecture, or say why not."""

from __future__ import annotations

import pytest

from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.models import find_model, models
from kavier_twin.catalog.names import RULES, words_of


@pytest.mark.parametrize(
    ("name", "model", "quantization", "cache"),
    [
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-30B-A3B", "bf16", "auto"),
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "meta-llama/Llama-3.1-8B", "fp8", "fp8"),
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-quantized.w4a16", "meta-llama/Llama-3.1-70B", "int4", "auto"),
        ("RedHatAI/Qwen3-32B-FP8-dynamic", "Qwen/Qwen3-32B", "fp8", "auto"),
        ("RedHatAI/Qwen2.5-7B-Instruct-quantized.w8a8", "Qwen/Qwen2.5-7B", "int8", "auto"),
        ("Qwen/Qwen3-32B-AWQ", "Qwen/Qwen3-32B", "int4", "auto"),
        ("Qwen/Qwen2.5-72B-Instruct-GPTQ-Int8", "Qwen/Qwen2.5-72B", "int8", "auto"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B", "int4", "auto"),
        ("amd/Llama-3.1-405B-Instruct-FP8-KV", "meta-llama/Llama-3.1-405B", "fp8", "fp8"),
        ("nvidia/DeepSeek-R1-0528-NVFP4-v2", "deepseek-ai/DeepSeek-R1", "nvfp4", "fp8"),
        ("openai/gpt-oss-120b", "openai/gpt-oss-120b", "mxfp4", "auto"),
        ("moonshotai/Kimi-K2-Thinking", "moonshotai/Kimi-K2.5", "compressed-tensors-int4", "auto"),
        ("NousResearch/Hermes-3-Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "bf16", "auto"),
        ("dphn/Dolphin3.0-Llama3.1-8B", "meta-llama/Llama-3.1-8B", "bf16", "auto"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "meta-llama/Llama-3.3-70B", "bf16", "auto"),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "Qwen/Qwen3-8B", "bf16", "auto"),
        ("nvidia/Llama-3.1-Nemotron-70B-Instruct-HF", "meta-llama/Llama-3.1-70B", "bf16", "auto"),
        ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistralai/Mistral-Small-24B-Base-2501", "bf16", "auto"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct-FP8", "Qwen/Qwen3-30B-A3B", "fp8", "auto"),
        ("Qwen/Qwen3-Embedding-8B", "Qwen/Qwen3-8B", "bf16", "auto"),
        ("llama3.1:8b", "meta-llama/Llama-3.1-8B", "bf16", "auto"),
        ("/models/gpt-oss-20b/", "openai/gpt-oss-20b", "mxfp4", "auto"),
        ("/cache/models--Qwen--Qwen3-8B/snapshots/abcdef", "Qwen/Qwen3-8B", "bf16", "auto"),
    ],
)
def test_a_served_name_finds_its_architecture(name: str, model: str, quantization: str, cache: str) -> None:
    found = find_model(name)
    assert (found.name, found.stored_as(None).name, found.kv_cache_dtype) == (model, quantization, cache)
    assert (name in found.rule and model in found.rule) == (name != model)


def test_the_longer_context_of_a_later_release() -> None:
    assert find_model("Qwen/Qwen3-30B-A3B").max_model_len == 40_960
    assert find_model("Qwen/Qwen3-30B-A3B-Thinking-2507-FP8").max_model_len == 262_144


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen3-80B",  # the family has no such size
        "meta-llama/Llama-3.1-8B-Instruct-speculator.eagle3",
        "nvidia/Llama-3.1-Minitron-4B-Width-Base",
        "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
        "bartowski/Qwen3-8B-GGUF",
        "zai-org/GLM-4.6-Flash",
        "support-bot",
    ],
)
def test_another_architecture_is_answered_with_the_three_nearest(name: str) -> None:
    with pytest.raises(CatalogError, match=r"not in the catalogue; nearest: (\S+, ){2}\S+; .*config\.json") as error:
        find_model(name)
    assert "\n" not in str(error.value)


def test_the_nearest_are_of_the_family() -> None:
    with pytest.raises(CatalogError, match=r"nearest: Qwen/Qwen3-\S+, Qwen/Qwen3-\S+, Qwen/Qwen3-"):
        find_model("Qwen/Qwen3-80B")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "state"),
        ("Qwen/Qwen3.5-35B-A3B-FP8", "state"),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "state"),
        ("ibm-granite/granite-4.0-h-small", "state"),
        ("google/gemma-3n-E4B-it", "differ in size or kind"),
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1_5", "differ in size or kind"),
        ("deepseek-ai/DeepSeek-V4-Flash", "sparse attention"),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", "cross-attention"),
    ],
)
def test_what_cannot_be_simulated_says_why(name: str, reason: str) -> None:
    with pytest.raises(CatalogError, match=f"'{name}' is not simulated: .*{reason}"):
        find_model(name)


def test_every_model_is_found_by_its_own_name_and_no_two_share_one() -> None:
    assert len(models()) >= 40
    assert len({words_of(name) for name in models()}) == len(models())
    for name, shape in models().items():
        assert find_model(name).total_parameters == shape.total_parameters
        assert find_model(f"someone/{name.rsplit('/', 1)[-1]}-support-v2-FP8").name == name


def test_every_rule_leads_to_a_model_or_a_reason() -> None:
    for rule in RULES:
        assert bool(rule.model) != bool(rule.refused), rule
        assert "*" in rule.model or not rule.model or rule.model in models(), rule
