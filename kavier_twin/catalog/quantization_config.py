"""Reads `quantization_config` of a `config.json`: how weights and cache are kept.

Quantisers write what they did in forms of their own. Sources: vllm/model_executor/layers/quantization of vLLM
(`modelopt.py`, `compressed_tensors/`, `fp8.py`) and for the cache `vllm/utils/torch_utils.py`
(`get_kv_cache_quant_algo_string`), from which `--kv-cache-dtype auto` takes its type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

from kavier_twin.catalog.gpu import ComputeType
from kavier_twin.catalog.model import QUANTIZATIONS, KvDtype, Quantization

# vLLM's modelopt.py, QUANT_ALGOS.
_MODELOPT: Final[Mapping[str, Quantization]] = {
    "FP8": QUANTIZATIONS["fp8"],
    "FP8_PER_CHANNEL_PER_TOKEN": QUANTIZATIONS["fp8"],
    "FP8_PB_WO": QUANTIZATIONS["fp8"],
    "MXFP8": Quantization(name="mxfp8", bits_per_weight=8.25, compute="fp8"),
    "NVFP4": QUANTIZATIONS["nvfp4"],
    "W4A16_NVFP4": Quantization(name="nvfp4-weights", bits_per_weight=4.5, compute="bf16"),
    "W4A16_AWQ": Quantization(name="awq-int4", bits_per_weight=4.0 + 20 / 128, compute="bf16"),
    "W8A8_SQ_PER_CHANNEL": QUANTIZATIONS["int8"],
}
_INTEGER_METHODS: Final = ("gptq", "awq", "auto-round", "awq_marlin", "gptq_marlin")
_KNOWN_METHODS: Final = "fp8, mxfp4, nvfp4, gptq, awq, auto-round, bitsandbytes, compressed-tensors, modelopt"

# Names of linear layers as checkpoints have them, that stand for a model's attention, dense layers and experts.
_MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "attention": tuple(f"self_attn.{name}_proj" for name in ("q", "o", "q_a", "kv_a")),
    "mlp": tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "experts": tuple(f"mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")),
}
_PREFIXES: Final = ("model.layers.{}.", "language_model.model.layers.{}.", "model.language_model.layers.{}.")


class NotUnderstood(Exception):
    """What of the field is not understood: the message names it."""


def read_quantization(raw: Mapping[str, Any], *, layers: int, has_experts: bool) -> Quantization:
    """How the linear layers are kept. Raises NotUnderstood naming the method, algorithm or group."""
    raw = _flat(raw)
    if raw.get("config_groups") and (raw.get("quant_method") or "compressed-tensors") == "compressed-tensors":
        return _compressed_tensors(raw, layers=layers, has_experts=has_experts)
    kept = _uniform(raw)
    spared = {part for part in _MODULES if _is_spared(part, _ignored(raw), layers)}
    return _joined({part: None if part in spared else kept for part in _MODULES}, has_experts=has_experts)


def read_kv_cache_dtype(raw: Mapping[str, Any]) -> KvDtype:
    """The type that `--kv-cache-dtype auto` takes from the checkpoint; "auto" where it tells none.

    Raises NotUnderstood for a type that is not simulated.
    """
    raw = _flat(raw)
    scheme, algorithm = raw.get("kv_cache_scheme"), raw.get("kv_cache_quant_algo")
    if isinstance(algorithm, str) and algorithm.upper() != "NONE":
        if algorithm.upper() != "FP8":
            raise NotUnderstood(f"kv_cache_quant_algo: {algorithm!r} is not simulated, only FP8")
        return "fp8"
    if isinstance(scheme, Mapping) and scheme:
        bits, kind = scheme.get("num_bits"), scheme.get("type")
        if (bits, kind) != (8, "float"):
            raise NotUnderstood(
                f"kv_cache_scheme: {bits} bits of type {kind!r} are not simulated, only 8 of type float"
            )
        return "fp8"
    if isinstance(scheme, str) and scheme:
        if not scheme.lower().startswith("fp8"):
            raise NotUnderstood(f"kv_cache_scheme: {scheme!r} is not simulated, only fp8")
        return "fp8"
    return "auto"


def _flat(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`hf_quant_config.json` has all of it under `quantization`."""
    inner = raw.get("quantization")
    return {**raw, **inner} if isinstance(inner, Mapping) else raw


def _uniform(raw: Mapping[str, Any]) -> Quantization:
    method = str(raw.get("quant_method") or "").lower()
    algorithm = str(raw.get("quant_algo") or "").upper()
    if algorithm or method.startswith("modelopt"):
        if algorithm not in _MODELOPT:
            raise NotUnderstood(f"quant_algo {algorithm or None!r} is not known; known: {', '.join(_MODELOPT)}")
        return _MODELOPT[algorithm]
    if method in ("fp8", "fbgemm_fp8", "ptpc_fp8"):
        return QUANTIZATIONS["fp8"]
    if method in ("mxfp4", "gpt_oss_mxfp4"):
        return QUANTIZATIONS["mxfp4"].model_copy(update={"experts_only": True})
    if method == "nvfp4":
        return QUANTIZATIONS["nvfp4"]
    if method in _INTEGER_METHODS:
        return integer_weights(method, int(raw.get("bits") or raw.get("w_bit") or 4), int(raw.get("group_size") or 128))
    if method == "bitsandbytes":
        return integer_weights(method, 4 if raw.get("load_in_4bit") else 8, 64)
    raise NotUnderstood(f"method {method!r} is not known; known: {_KNOWN_METHODS}")


def integer_weights(name: str, bits: int, group: int) -> Quantization:
    """Weight-only: a 16-bit scale and a zero point of `bits` per group (-1: one group per row, negligible)."""
    overhead = (16 + bits) / group if group > 0 else 0.0
    return Quantization(name=f"{name}-int{bits}", bits_per_weight=bits + overhead, compute="bf16")


# ---- which layers ----------------------------------------------------------------------------------------------------


def _ignored(raw: Mapping[str, Any]) -> list[str]:
    names = ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers")
    return [str(item) for name in names if isinstance(raw.get(name), list) for item in raw[name]]


def _is_spared(part: str, ignored: Iterable[str], layers: int) -> bool:
    """Whether the first of the part's modules in the middle layer is kept in 16 bits."""
    patterns = list(ignored)
    return any(
        _matches(pattern, prefix.format(layers // 2) + module)
        for pattern in patterns
        for prefix in _PREFIXES
        for module in _MODULES[part]
    )


def _matches(pattern: str, module: str) -> bool:
    """As quantisers write them: a regular expression after `re:`, a pattern with `*`, or whole parts of the name."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    if "*" in pattern:
        return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
    return f".{pattern}." in f".{module}."


def _compressed_tensors(raw: Mapping[str, Any], *, layers: int, has_experts: bool) -> Quantization:
    groups = [_group(group, str(raw.get("format") or "")) for group in raw["config_groups"].values()]
    ignored = _ignored(raw)
    found: dict[str, Quantization | None] = {}
    for part, modules in _MODULES.items():
        names = [prefix.format(layers // 2) + module for prefix in _PREFIXES for module in modules]
        found[part] = None
        if not _is_spared(part, ignored, layers):
            found[part] = next(
                (
                    kept
                    for targets, kept in groups
                    if any(target == "Linear" or any(_matches(target, name) for name in names) for target in targets)
                ),
                None,
            )
    return _joined(found, has_experts=has_experts)


def _group(group: Mapping[str, Any], format_: str) -> tuple[list[str], Quantization]:
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    if not weights.get("num_bits"):
        raise NotUnderstood("config_groups: no group gives weights.num_bits")
    targets = [str(target) for target in group.get("targets") or ["Linear"]]
    bits, size = int(weights["num_bits"]), int(weights.get("group_size") or -1)
    floating = weights.get("type") == "float"
    if not activations:
        if not floating:
            return targets, integer_weights("compressed-tensors", bits, size)
        mx = "mxfp4" in str(group.get("format") or format_)
        overhead = 8 / size if size > 0 else 0.0
        name = "mxfp4" if mx else f"compressed-tensors-fp{bits}-weights"
        return targets, Quantization(name=name, bits_per_weight=bits + overhead, compute="bf16")
    compute: ComputeType = ("fp4" if floating else "bf16") if bits == 4 else ("fp8" if floating else "int8")
    scale_bits = 8 / size if floating and bits == 4 and size > 0 else 0.0
    return targets, Quantization(
        name=f"compressed-tensors-{'fp' if floating else 'int'}{bits}",
        bits_per_weight=bits + scale_bits,
        compute=compute,
    )


def _joined(parts: Mapping[str, Quantization | None], *, has_experts: bool) -> Quantization:
    """One Quantization from those of attention, dense layers and experts (None: 16 bits)."""
    attention, dense = parts["attention"], parts["mlp"]
    main = parts["experts"] if has_experts else dense
    if has_experts and main is not None and (dense is None or main.experts_only) and attention is None:
        return main.model_copy(update={"experts_only": True})
    if main is None:
        if attention is None:
            return QUANTIZATIONS["bf16"]
        main = QUANTIZATIONS["bf16"]
    if main.experts_only or attention == main:
        return main
    return main.model_copy(update={"attention": attention or QUANTIZATIONS["bf16"]})
