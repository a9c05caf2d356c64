"""What a `config.json` tells that one shape for all layers cannot hold: refused by name rather than read wrongly.

A cache is computed from the fields that `config_json` reads. So every field whose name speaks of attention, of a cache
or of a layer's kind must be among those, or be known not to change either (`_HARMLESS`); any other one, of whatever
model, refuses the file. A field that is null, false, zero or empty tells nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from kavier_twin.catalog.errors import CatalogError

# DeepSeek's sparse attention keeps a key of every token like the full one; the indexer's fields tell the rest.
FULL_LAYERS: Final = frozenset(
    {"full_attention", "attention", "global_attention", "global", "deepseek_sparse_attention"}
)
WINDOW_LAYERS: Final = frozenset({"sliding_attention", "chunked_attention", "local_attention", "local"})

# Layers that keep a state of fixed size a sequence: state-space models, linear attention, convolutions.
_STATE_KIND: Final = re.compile(r"linear|mamba|ssm|recurrent|conv|rwkv|delta|retention|lightning|rglru|hybrid|kda")
_STATE_FAMILY: Final = re.compile(
    r"mamba|rwkv|[jbz]amba|nemotron_h|lfm2|falcon_h1|plamo2|recurrent_gemma|retnet|minimax_text|minimax_m1|kimi_linear"
    r"|qwen3_next|qwen3_5|bailing_hybrid|^minimax$"
)
_STATE_FIELD: Final = re.compile(
    r"mamba|ssm|rwkv|rglru|lru_width|^linear_(attn|attention|conv|key|value|num|block)|full_attention_interval"
    r"|conv_l_cache|^conv_kernel$|state_size|hybrid_override_pattern|attn_layer_(indices|period|offset)"
    r"|full_attn_(idxs|layers)"
)
# No decoder with a growing cache, or one with a second attention to an encoder.
_ENCODER_FAMILY: Final = re.compile(
    r"^(mt5|t5|umt5|t5gemma.*|m?bart|pegasus|marian|whisper|mllama.*|nllb.*|m2m_100|speecht5|florence2|.*bert.*|electra"
    r"|clip.*|siglip.*|vit.*|longformer|mpnet)$|roberta"
)
_TELLING: Final = re.compile(
    r"attn|attention|(^|_)kv(_|$)|key_value|window|swa|sliding|cache|cross|encoder|compress|sparse|^index|mla_"
    r"|layer_types|layer_kinds|block_type|block_config|block_pattern|layer_pattern|mixer|global|^local|shared_layers"
    r"|attention_layers|per_layer|altup|laurel|^conv|chunk_size"
)
_HARMLESS: Final = re.compile(
    r"dropout|pdrop|bias|scal(e|ing|ar)|multiplier|softcap|softmax|theta|rope|rotary|base_freq|eps$|_act$|range"
    r"|token_id|token_index|dtype|implementation|flash|_impl$|fused|^use_cache$|^output_|ngram|temperature|floor"
    r"|chunk_size_feed_forward|layernorm|norm$|prefix_lm|upcast|reorder|type_ids|gradient|qk_clip|_coef$|aux_loss|^vision|^audio"
    r"|^image|^img|^video|quantization|router|mlp_layer_types|^mtp_|init_|bidirectional|vocab_size_per_layer_input"
)
# Understood where they say what the reader takes for granted.
_PLAIN: Final[Mapping[str, Collection[Any]]] = {
    "attn_type_list": ([1],),  # MiniMax-M2: every layer attends; 0 is lightning attention
    "indexer_types": (["full"],),  # GLM-5.2 shares the choice of one layer with the next ones
    "attention_type": ("full", "full_attention", "GQA", "gqa", "mha", "MHA"),
    "attn_type": ("multihead_attention", "grouped_query_attention", "multiquery_attention"),
    "attention_method": ("GQA", "MHA"),
}


def refuse_what_is_not_understood(
    raw: Mapping[str, Any], *, family: str, layer_types: Sequence[str], understood: Collection[str], origin: str
) -> None:
    """Raises CatalogError naming `origin` and the field, the family or the kind of layer.

    `understood`: the fields that the reader takes into account. Fields of a state layer tell nothing where
    `layer_types` lists every layer and none is of that kind (Granite 4 without Mamba).
    """
    state = "layers that keep a state instead of a cache are not simulated"
    for kind in dict.fromkeys(layer_types):
        if _STATE_KIND.search(kind):
            raise CatalogError(f"{origin}: {kind}: {state}")
        if kind not in FULL_LAYERS | WINDOW_LAYERS:
            raise CatalogError(f"{origin}: layer_types: layers of kind {kind!r} are not simulated")
    if _STATE_FAMILY.search(family):
        raise CatalogError(f"{origin}: {family}: {state}")
    if _ENCODER_FAMILY.search(family):
        raise CatalogError(f"{origin}: {family}: only decoders are simulated, not encoders and cross-attention")
    states, strange = [], []
    for field, value in raw.items():
        name = field.lower()
        if not _tells(value) or _HARMLESS.search(name):
            continue
        if _STATE_FIELD.search(name):
            states += [] if layer_types else [field]
        elif _TELLING.search(name) and field not in understood and _distinct(value) not in _PLAIN.get(field, ()):
            strange.append(field)
    if states:
        raise CatalogError(f"{origin}: {', '.join(states)}: {state}")
    if strange:
        raise CatalogError(
            f"{origin}: {', '.join(strange)}: not understood; models whose layers differ in size or kind, or that keep"
            " a cache of another kind, are not simulated"
        )


def _tells(value: Any) -> bool:
    return not (value is None or value is False or value in (0, "", [], {}, -1))


def _distinct(value: Any) -> Any:
    """A list as its distinct items."""
    return list(dict.fromkeys(map(_hashable, value))) if isinstance(value, list) else _hashable(value)


def _hashable(value: Any) -> Any:
    return str(value) if isinstance(value, dict | list) else value
