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
from kavier_twin.catalog.model import Dtype, Experts, Indexer, KvDtype, LatentAttention, ModelShape, Quantization
from kavier_twin.catalog.not_understood import WINDOW_LAYERS, refuse_what_is_not_understood
from kavier_twin.catalog.quantization_config import NotUnderstood, read_kv_cache_dtype, read_quantization
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
        "num_attention_groups",
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
        "top_k_experts",
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


# The usual name of a size, for errors, where it is not the first of ALIASES.
_USUAL = {"vocab_size": "vocab_size", "intermediate_size": "intermediate_size"}
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
    "qwen2_5_omni": Family(qkv_bias=True),
    "qwen2_5_vl": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=True),
    "qwen2_vl": Family(qkv_bias=True),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "qwen3_omni_moe": _QWEN3,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "starcoder2": Family(gated=False, norm_bias=True, qkv_bias=True, out_bias=True, tied=True),
}

# What the configuration classes of transformers take where a file leaves it out. Multimodal files rely on it: their
# text part repeats only what differs. A null in the file is no omission.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256_000,
              "max_position_embeddings": 8192},
    "gemma2": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256_000,
               "max_position_embeddings": 8192, "sliding_window": 4096},
    "gemma3": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208,
               "max_position_embeddings": 131_072, "sliding_window": 4096},
    "llama": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "vocab_size": 32_000, "max_position_embeddings": 2048},
    "llama4": {"hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16_384,
               "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
               "vocab_size": 202_048, "max_position_embeddings": 131_072, "attention_chunk_size": 8192,
               "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 131_072},
    "qwen2": {"hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "vocab_size": 151_936, "max_position_embeddings": 32_768,
              "use_sliding_window": False},
    "qwen2_5_omni": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
                     "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
                     "max_position_embeddings": 32_768, "use_sliding_window": False},
}  # fmt: skip
# Where a multimodal file keeps its language model, outermost first.
_NESTED = ("thinker_config", "text_config", "llm_config", "language_config", "language_model_config", "llm")

_HYBRID_LAYERS = ("layer_types", "layers_block_type")
# Fields of attention, layers and cache that the reader below takes into account, beside those of ALIASES.
_UNDERSTOOD = frozenset(
    {alias.partition(".")[0] for names in ALIASES.values() for alias in names}
    | set(_HYBRID_LAYERS)
    | {"kv_lora_rank", "sliding_window", "use_sliding_window", "sliding_window_pattern", "_sliding_window_pattern"}
    | {"max_window_layers", "attention_chunk_size", "multi_query", "multi_query_attention", "decoder_sparse_step"}
    | {"index_topk", "index_n_heads", "index_head_dim", "parallel_attn", "new_decoder_architecture"}
)


class _Config:
    """The file's text model, looked up by our names."""

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self.origin = origin
        inner, outer = raw, dict(raw)
        while nested := next((inner[name] for name in _NESTED if isinstance(inner.get(name), Mapping)), None):
            inner = nested
            outer |= inner
        family = str(inner.get("model_type") or raw.get("model_type") or "llama")
        self.family_name = family.removesuffix("_text")
        self.family = FAMILIES.get(self.family_name, Family())
        defaults = DEFAULTS.get(self.family_name, {})
        if inner is raw and not self.family_name.startswith("gemma"):
            defaults = {}  # a plain file names its sizes; without them it is broken
        # A multimodal model's language part; what it does not repeat is said outside.
        self.raw: dict[str, Any] = {**defaults, **outer}

    def get(self, name: str) -> Any:
        """The value under a dotted name; None if absent or null."""
        value: Any = self.raw
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def find(self, name: str) -> Any:
        return next((value for alias in ALIASES[name] if (value := self.get(alias)) is not None), None)

    def number(self, name: str, default: int | None = None) -> int:
        alias, value = next(
            ((alias, value) for alias in ALIASES[name] if (value := self.get(alias)) is not None),
            (_USUAL.get(name, ALIASES[name][0]), None),
        )
        if isinstance(value, list):  # some families list one size per layer
            if len(set(map(str, value))) != 1:
                raise CatalogError(f"{self.origin}: {alias}: models whose layers differ in size are not simulated")
            value = value[0]
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or int(value) != value:
            raise CatalogError(f"{self.origin}: {alias}: a whole number is needed, got {value!r}")
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
    layer_types = _layer_types(config)
    refuse_what_is_not_understood(
        config.raw, family=config.family_name, layer_types=layer_types, understood=_UNDERSTOOD, origin=origin
    )
    try:
        return _shape(config, layer_types)
    except ValidationError as error:
        raise CatalogError(f"{origin}: {problems_of(error)[0]}") from None


def _layer_types(config: _Config) -> list[str]:
    """The kind of each layer; empty where the file does not list them."""
    listed = next((config.get(name) for name in _HYBRID_LAYERS if config.get(name)), None) or []
    kinds, layers = [str(kind) for kind in listed], config.find("layers")
    if not kinds or not isinstance(layers, int):
        return kinds
    if len(kinds) < layers:
        raise CatalogError(f"{config.origin}: layer_types: {len(kinds)} kinds for {layers} layers")
    return kinds[:layers]  # those of multi-token prediction may follow


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
    quantization, kv_cache_dtype, unread = _checkpoint_types(config, layers, has_experts=experts is not None)
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
        indexer=_indexer(config),
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
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        unread=unread,
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


def _indexer(config: _Config) -> Indexer | None:
    if config.get("index_topk") is None:
        return None
    return Indexer(
        top_k=config.get("index_topk"), heads=config.get("index_n_heads"), head_dim=config.get("index_head_dim")
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
        default = 1 if config.family_name == "llama4" else 0
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
    if config.get("mlp_layer_types") is not None:
        return [str(kind) for kind in config.get("mlp_layer_types")][:layers].count("sparse")
    if config.get("moe_layers_enum") is not None:  # "3,4,5"
        return len(str(config.get("moe_layers_enum")).split(","))
    if config.get("moe_layer_start_index") is not None or config.get("moe_layer_interval") is not None:
        start, end = config.get("moe_layer_start_index") or 0, config.get("moe_layer_end_index")
        step = int(config.get("moe_layer_interval") or 1)
        # ERNIE 4.5: the last of each `step`, from start to end (-1: the last layer).
        last = layers - 1 if end in (None, -1) else int(end)
        return sum(1 for layer in range(int(start), last + 1) if (layer + 1) % step == 0)
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
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    if layer_types:
        sliding = sum(1 for kind in layer_types if kind in WINDOW_LAYERS)
    elif config.get("sliding_window") is None:
        sliding = _chunked_layers(config, layers)
    elif isinstance(pattern, int) and pattern > 0:
        sliding = layers - layers // pattern
    elif isinstance(pattern, str) and pattern:  # EXAONE 4: "LLLG", local and global layers
        sliding = sum(1 for layer in range(layers) if pattern[layer % len(pattern)] == "L")
    elif config.family_name == "gemma3":
        sliding = layers - layers // 6  # transformers' default pattern: every sixth layer is global
    elif config.family_name in ("gemma2", "gpt_oss"):
        sliding = (layers + 1) // 2
    elif config.family_name in (
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen2_5_vl",
        "qwen2_5_omni",
        "qwen2_vl",
        "qwen3_omni_moe",
    ):
        sliding = max(0, layers - int(config.get("max_window_layers") or 0))
    else:
        sliding = layers
    return (window, sliding) if sliding else (None, 0)


def _chunked_layers(config: _Config, layers: int) -> int:
    """Layers that attend within a chunk: those of Llama 4 with rotary embeddings.

    `no_rope_layers` has a 1 for each of them; empty or absent, every fourth layer is without and global (transformers,
    `Llama4TextConfig`).
    """
    if config.family_name != "llama4":
        raise CatalogError(f"{config.origin}: attention_chunk_size: the file does not tell which layers have it")
    rotary = config.get("no_rope_layers")
    if rotary:
        return sum(map(bool, rotary[:layers]))
    return layers - layers // int(config.get("no_rope_layer_interval") or 4)


def _dtype(config: _Config) -> Dtype:
    """Served type: vLLM's `auto` keeps 16-bit types and serves others in 16 bits (vllm/config/model.py)."""
    name = str(config.find("dtype") or "bfloat16").removeprefix("torch.")
    return "fp16" if name == "float16" else "bf16"


def _checkpoint_types(
    config: _Config, layers: int, *, has_experts: bool
) -> tuple[Quantization | None, KvDtype, dict[str, str]]:
    """How the checkpoint keeps weights (None: not quantised) and cache, and what of that is not understood."""
    raw = config.get("quantization_config") or config.get("compression_config")
    if not raw:
        return None, "auto", {}
    unread: dict[str, str] = {}
    quantization: Quantization | None = None
    kv_cache_dtype: KvDtype = "auto"
    try:
        quantization = read_quantization(raw, layers=layers, has_experts=has_experts)
    except NotUnderstood as error:
        unread["quantization"] = f"{config.origin}: quantization_config: {error}"
    try:
        kv_cache_dtype = read_kv_cache_dtype(raw)
    except NotUnderstood as error:
        unread["kv_cache_dtype"] = f"{config.origin}: quantization_config: {error}"
    return quantization, kv_cache_dtype, unread


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
