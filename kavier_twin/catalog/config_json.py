"""Reads a Hugging Face `config.json` into a ModelShape.

Every family of models has names of its own for the same sizes; `ALIASES` lists them, and `FAMILIES` says what the file
leaves unsaid (whether the MLP is gated, which small vectors there are). Sources: the `configuration_*.py` and
`modeling_*.py` files of Hugging Face transformers, and for how vLLM reads them `vllm/config/model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.gpu import ComputeType
from kavier_twin.catalog.model import Dtype, Experts, LatentAttention, ModelShape, Quantization
from kavier_twin.errors import problems_of

# The first name that the file has counts. A dot goes into a nested object.
ALIASES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "d_model", "n_embd", "n_embed"),
    "attention_heads": ("num_attention_heads", "n_heads", "n_head"),
    "kv_heads": (
        "num_key_value_heads",
        "attn_config.kv_n_heads",
        "num_kv_heads",
        "n_head_kv",
        "multi_query_group_num",
    ),
    "head_dim": ("head_dim", "kv_channels", "attention_head_dim"),
    "intermediate_size": (
        "intermediate_size_mlp",
        "dense_intermediate_size",
        "intermediate_size",
        "ffn_hidden_size",
        "n_inner",
        "ffn_dim",
        "ffn_config.ffn_hidden_size",
    ),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "max_model_len": ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length", "max_sequence_length"),
    "experts": (
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "moe_num_experts",
        "ffn_config.moe_num_experts",
    ),
    "experts_per_token": (
        "num_experts_per_tok",
        "experts_per_token",
        "num_experts_per_token",
        "moe_top_k",
        "moe_k",
        "ffn_config.moe_top_k",
    ),
    "expert_intermediate_size": (
        "moe_intermediate_size",
        "expert_intermediate_size",
        "ffn_config.ffn_hidden_size",
        "intermediate_size",
    ),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "dtype": ("dtype", "torch_dtype"),
}


_SHARED_EXPERT_SIZES = ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim")


@dataclass(frozen=True)
class Family:
    """What a family's `config.json` does not say. The defaults are Llama's."""

    gated: bool = True  # MLP of three matrices: gate, up, down
    norms: int = 2  # a layer's, each of hidden_size
    norm_bias: bool = False
    qk_norm: bool = False  # norms over head_dim
    qkv_bias: bool = False  # unless attention_bias or its like says otherwise
    out_bias: bool = False  # attention's output projection and the MLP
    tied: bool = False  # unless tie_word_embeddings says otherwise
    learned_positions: bool = False


_GPT = Family(gated=False, norm_bias=True, qkv_bias=True, out_bias=True, tied=True)
_QWEN3 = Family(qk_norm=True)
FAMILIES: dict[str, Family] = {
    "bloom": _GPT,
    "cohere": Family(norms=1, tied=True),
    "cohere2": Family(norms=1, tied=True),
    "falcon": Family(gated=False, norm_bias=True, tied=True),
    "gemma": Family(tied=True),
    "gemma2": Family(norms=4, tied=True),
    "gemma3": Family(norms=4, qk_norm=True, tied=True),
    "gemma3_text": Family(norms=4, qk_norm=True, tied=True),
    "glm4": Family(norms=4),
    "glm4_moe": Family(qkv_bias=True),
    "gpt2": Family(gated=False, norm_bias=True, qkv_bias=True, out_bias=True, tied=True, learned_positions=True),
    "gpt_bigcode": Family(gated=False, norm_bias=True, qkv_bias=True, out_bias=True, tied=True, learned_positions=True),
    "gpt_neox": Family(gated=False, norm_bias=True, qkv_bias=True, out_bias=True),
    "gptj": Family(gated=False, norms=1, norm_bias=True),
    "mpt": Family(gated=False, tied=True),
    "nemotron": Family(gated=False, norm_bias=True),
    "opt": Family(gated=False, norm_bias=True, qkv_bias=True, out_bias=True, tied=True, learned_positions=True),
    "phi": Family(gated=False, norms=1, norm_bias=True, qkv_bias=True, out_bias=True),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=True),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "starcoder2": Family(gated=False, norm_bias=True, qkv_bias=True, out_bias=True, tied=True),
}

# What is refused rather than read wrongly: layers that keep a state instead of a growing cache (state-space, linear
# attention), and fields that give layers sizes of their own, which one shape for all layers cannot tell.
_STATE_LAYERS = {"linear_attention", "mamba", "mamba2", "ssm", "recurrent", "conv"}
_STATE_FAMILIES = {"mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "nemotron_h", "rwkv", "zamba2", "lfm2"}
_FOREIGN_FIELDS = (
    "linear_attn_config",
    "block_configs",
    "compress_ratios",
    "swa_num_key_value_heads",
    "global_head_dim",
)


class _Config:
    """The file's text model, looked up by our names."""

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self.origin = origin
        nested = raw.get("text_config") or raw.get("llm_config")
        # A multimodal model's language part; what it does not repeat is said outside.
        self.raw: dict[str, Any] = {**raw, **nested} if isinstance(nested, Mapping) else dict(raw)
        self.family_name = str(self.raw.get("model_type", "llama"))
        self.family = FAMILIES.get(self.family_name, Family())

    def get(self, name: str) -> Any:
        """The value under a dotted name; None if absent or null."""
        value: Any = self.raw
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def find(self, name: str) -> Any:
        return next((value for alias in ALIASES[name] if (value := self.get(alias)) is not None), None)

    def number(self, name: str, default: int | None = None) -> int:
        value = self.find(name)
        if isinstance(value, list):  # some families list one size per layer
            value = value[0] if len(set(map(str, value))) == 1 else None
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or int(value) != value:
            raise CatalogError(f"{self.origin}: {ALIASES[name][0]}: a whole number is needed, got {value!r}")
        return int(value)

    def flag(self, *names: str, default: bool) -> bool:
        return next((bool(value) for name in names if (value := self.get(name)) is not None), default)


def read_config(raw: Mapping[str, Any], origin: str) -> ModelShape:
    """The shape that a `config.json`, already parsed, describes; `origin` names it in errors and as the model's name.

    Raises CatalogError naming `origin`, the field and what it needs.
    """
    if not isinstance(raw, Mapping):
        raise CatalogError(f"{origin}: a JSON object is needed")
    config = _Config(raw, origin)
    layer_types = [str(kind) for kind in config.get("layer_types") or config.get("layers_block_type") or []]
    states = sorted(_STATE_LAYERS.intersection(layer_types)) + sorted(
        _STATE_FAMILIES.intersection({config.family_name})
    )
    if states:
        raise CatalogError(f"{origin}: {states[0]}: layers that keep a state instead of a cache are not simulated")
    foreign = next((field for field in _FOREIGN_FIELDS if config.get(field)), None)
    if foreign:
        raise CatalogError(f"{origin}: {foreign}: models whose layers differ in size or kind are not simulated")
    try:
        return _shape(config, layer_types)
    except ValidationError as error:
        raise CatalogError(f"{origin}: {problems_of(error)[0]}") from None


def _shape(config: _Config, layer_types: list[str]) -> ModelShape:
    layers, hidden, heads = config.number("layers"), config.number("hidden_size"), config.number("attention_heads")
    head_dim = config.number("head_dim", default=hidden // heads)
    value_head_dim = head_dim
    latent = _latent(config)
    if latent:
        head_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        value_head_dim = int(config.get("v_head_dim") or latent.qk_nope_head_dim)
    intermediate = config.number("intermediate_size", default=_default_intermediate(config, hidden))
    kv_heads = heads if latent else _kv_heads(config, heads)
    if config.family_name == "qwen":  # Qwen 1 counts gate and up together
        intermediate //= 2
    experts = _experts(config, layers)
    window, sliding_layers = _sliding(config, layers, layer_types)
    shape = ModelShape(
        name=str(config.get("_name_or_path") or config.origin),
        architecture=config.family_name,
        layers=layers,
        hidden_size=hidden,
        attention_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        latent=latent,
        sliding_window_tokens=window,
        sliding_layers=sliding_layers,
        intermediate_size=intermediate,
        mlp_matrices=3 if config.family.gated else 2,
        experts=experts,
        vocab_size=config.number("vocab_size"),
        tied_embeddings=config.flag("tie_word_embeddings", default=config.family.tied),
        position_embeddings=config.number("max_model_len") if config.family.learned_positions else 0,
        max_model_len=config.number("max_model_len", default=2048),
        dtype=_dtype(config),
        quantization=_quantization(config),
    )
    return shape.model_copy(update={"vector_parameters": _vectors(config, shape)})


def _default_intermediate(config: _Config, hidden: int) -> int:
    ratio = config.get("expansion_ratio")
    return int(hidden * (ratio if isinstance(ratio, int | float) else 4))


def _kv_heads(config: _Config, heads: int) -> int:
    if config.family_name == "falcon" and config.get("new_decoder_architecture"):
        return config.number("kv_heads", default=heads)
    if config.flag("multi_query", default=False):
        return 1
    if config.family_name == "chatglm" and not config.flag("multi_query_attention", default=False):
        return heads
    if config.family_name == "falcon":
        return heads
    return config.number("kv_heads", default=heads)


def _latent(config: _Config) -> LatentAttention | None:
    if config.get("kv_lora_rank") is None:
        return None
    return LatentAttention(
        q_lora_rank=config.get("q_lora_rank"),
        kv_lora_rank=config.get("kv_lora_rank"),
        qk_nope_head_dim=config.get("qk_nope_head_dim"),
        qk_rope_head_dim=config.get("qk_rope_head_dim"),
    )


def _experts(config: _Config, layers: int) -> Experts | None:
    count = config.find("experts") or 0
    if not config.flag("enable_moe_block", default=True) or not isinstance(count, int) or count <= 1:
        return None
    size = config.number("expert_intermediate_size")
    if config.get("intermediate_size_mlp") is not None:  # Llama 4: the experts' size is the plain one
        size = int(config.get("intermediate_size"))
    shared = next(
        (value for name in _SHARED_EXPERT_SIZES if (value := config.get(name)) is not None),
        None,
    )
    if shared is None:
        default = 1 if config.family_name in ("llama4", "llama4_text") else 0
        shared = config.number("shared_experts", default=default) * size
    return Experts(
        layers=_layers_with_experts(config, layers),
        count=count,
        per_token=config.number("experts_per_token"),
        intermediate_size=size,
        shared_intermediate_size=shared,
    )


def _layers_with_experts(config: _Config, layers: int) -> int:
    if config.get("moe_layers") is not None:
        return len(config.get("moe_layers"))
    every = config.get("moe_layer_freq")
    if isinstance(every, list):  # one flag per layer
        return sum(map(bool, every))
    first = int(config.get("first_k_dense_replace") or 0)
    step = int(every or config.get("interleave_moe_layer_step") or config.get("decoder_sparse_step") or 1)
    dense = set(config.get("mlp_only_layers") or ())
    # DeepSeek counts from layer 0, Qwen and Llama 4 take the last of each `step`.
    offset = 0 if config.get("first_k_dense_replace") is not None else step - 1
    return sum(1 for layer in range(first, layers) if layer % step == offset % step and layer not in dense)


def _sliding(config: _Config, layers: int, layer_types: list[str]) -> tuple[int | None, int]:
    """(window in tokens, layers that have it)."""
    window = config.get("sliding_window") or config.get("attention_chunk_size")
    if not isinstance(window, int) or not config.flag("use_sliding_window", default=True):
        return None, 0
    if layer_types:
        sliding = sum(1 for kind in layer_types if kind in ("sliding_attention", "chunked_attention"))
    elif isinstance(config.get("sliding_window_pattern"), int):
        sliding = layers - layers // int(config.get("sliding_window_pattern"))
    elif config.family_name in ("gemma3", "gemma3_text"):
        sliding = layers - layers // 6  # transformers' default pattern: every sixth layer is global
    elif config.family_name == "gemma2":
        sliding = (layers + 1) // 2
    elif config.family_name in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"):
        sliding = max(0, layers - int(config.get("max_window_layers") or 0))
    else:
        sliding = layers
    return (window, sliding) if sliding else (None, 0)


def _dtype(config: _Config) -> Dtype:
    """Served type: vLLM's `auto` keeps 16-bit types and serves others in 16 bits (vllm/config/model.py)."""
    name = str(config.find("dtype") or "bfloat16").removeprefix("torch.")
    return "fp16" if name == "float16" else "bf16"


def _quantization(config: _Config) -> Quantization | None:
    """From `quantization_config`, as quantisers write it. None: not quantised."""
    raw = config.get("quantization_config")
    if not raw:
        return None
    method = str(raw.get("quant_method") or raw.get("quant_algo") or "").lower()
    algorithm = str(raw.get("quant_algo") or "").lower()
    if method in ("fp8", "fbgemm_fp8") or algorithm.startswith("fp8"):
        return Quantization(name="fp8", bits_per_weight=8.0, compute="fp8")
    if method == "mxfp4":
        return Quantization(name="mxfp4", bits_per_weight=4.25, compute="bf16", experts_only=True)
    if algorithm == "nvfp4" or method == "nvfp4":
        return Quantization(name="nvfp4", bits_per_weight=4.5, compute="fp4")
    if method in ("gptq", "awq", "auto-round"):
        bits, group = int(raw.get("bits") or raw.get("w_bit") or 4), int(raw.get("group_size") or 128)
        return _integer_weights(method, bits, group)
    if method == "bitsandbytes":
        return _integer_weights(method, 4 if raw.get("load_in_4bit") else 8, 64)
    if method == "compressed-tensors":
        return _compressed_tensors(raw, config.origin)
    raise CatalogError(
        f"{config.origin}: quantization_config: method {method!r} is not known; known: fp8, mxfp4, nvfp4, gptq, awq,"
        " auto-round, bitsandbytes, compressed-tensors"
    )


def _integer_weights(name: str, bits: int, group: int) -> Quantization:
    """Weight-only: a 16-bit scale and a zero point of `bits` per group (-1: one group per row, negligible)."""
    overhead = (16 + bits) / group if group > 0 else 0.0
    return Quantization(name=f"{name}-int{bits}", bits_per_weight=bits + overhead, compute="bf16")


def _compressed_tensors(raw: Mapping[str, Any], origin: str) -> Quantization:
    groups = raw.get("config_groups") or {}
    first: Mapping[str, Any] = next(iter(groups.values()), {})
    weights, activations = first.get("weights") or {}, first.get("input_activations")
    if not weights.get("num_bits"):
        raise CatalogError(f"{origin}: quantization_config.config_groups: no group gives weights.num_bits")
    bits, group = int(weights["num_bits"]), int(weights.get("group_size") or -1)
    if not activations:
        return _integer_weights("compressed-tensors", bits, group)
    floating = weights.get("type") == "float"
    compute: ComputeType = ("fp4" if floating else "bf16") if bits == 4 else ("fp8" if floating else "int8")
    scale_bits = 8 / group if floating and bits == 4 and group > 0 else 0.0
    return Quantization(
        name=f"compressed-tensors-{'fp' if floating else 'int'}{bits}",
        bits_per_weight=bits + scale_bits,
        compute=compute,
    )


def _vectors(config: _Config, shape: ModelShape) -> int:
    """Norms, biases and the like over all layers, and the final norm."""
    family, hidden = config.family, shape.hidden_size
    biased = not config.flag("no_bias", default=False)
    norm = hidden * (2 if family.norm_bias and biased else 1)
    norms = family.norms
    if config.family_name == "falcon" and config.flag("parallel_attn", default=True):
        norms = 2 if config.get("new_decoder_architecture") else 1
    layer = norms * norm
    queries, keys = shape.attention_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if config.flag("use_qk_norm", default=family.qk_norm) and not shape.latent:
        layer += 2 * shape.head_dim
    if shape.latent:
        layer += shape.latent.kv_lora_rank + (shape.latent.q_lora_rank or 0)
    qkv_bias = config.flag("attention_bias", "add_qkv_bias", "use_qkv_bias", "use_bias", default=family.qkv_bias)
    out_bias = config.flag("use_bias", default=family.out_bias)
    if qkv_bias and biased and not shape.latent:
        layer += queries + 2 * keys
    if out_bias or (config.get("attention_bias") and config.family_name in ("llama", "gpt_oss", "granite")):
        layer += hidden  # of attention's output projection
    total = shape.layers * layer + norm
    if shape.experts and config.family_name == "gpt_oss":
        expert = 2 * shape.experts.intermediate_size + hidden
        total += shape.layers * (shape.attention_heads + shape.experts.count * (1 + expert))
    elif shape.experts:
        gate = shape.experts.count if config.get("topk_method") == "noaux_tc" else 0
        gate += hidden if config.get("shared_expert_intermediate_size") else 0
        total += shape.experts.layers * gate
    elif config.flag("mlp_bias", "use_bias", default=family.out_bias):
        total += shape.layers * ((shape.mlp_matrices - 1) * shape.intermediate_size + hidden)
    if config.family_name == "bloom":
        total += norm  # of the embeddings
    if config.family_name == "phi":
        total += shape.vocab_size  # of the head
    return total
