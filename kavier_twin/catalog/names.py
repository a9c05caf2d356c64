"""Which architecture a served model's name means.

A name is cut into words: lower case, family and version joined (`Llama-3.1` and `llama3.1` are one word), and words
that change no size left out (`NOISE`). The model whose words are found in it in one piece is meant, the longest first.
What stands beside them tells the quantization (`fp8`, `w4a16`, `AWQ`), or is a fine-tune's own name; but a size
(`70B`), or a word that stands for another architecture (`OTHER`), means that it is another model. `RULES` tells what
words alone do not: models that were derived from others without saying so, and those that cannot be simulated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, Final

from kavier_twin.catalog.model import KvDtype, QuantizationName

# Words that change no size.
NOISE: Final = frozenset(
    {"hf", "instruct", "chat", "it", "base", "pt", "meta", "preview", "model", "turbo", "latest", "maas", "nvidia"}
)
# Words of models that share a name with a larger whole, and have another architecture.
OTHER: Final = frozenset(
    {"eagle", "eagle2", "eagle3", "speculator", "speculators", "draft", "drafter", "medusa", "mtp", "dflash", "dspark",
     "vision", "vl", "omni", "audio", "multimodal", "pruned", "reap", "minitron", "distill", "mamba", "gguf", "next",
     "linear", "air", "flash", "mini", "nano", "tiny", "lite"}
)  # fmt: skip
_SIZE: Final = re.compile(r"^(\d+x)?\d+(\.\d+)?[bt]$|^a\d+(\.\d+)?b$|^\d+e$|^e\d+b$")
_VERSION: Final = re.compile(r"^\d{1,2}(\.\d{1,2})?$")

# Of a word or two neighbours, by whole words; the first that fits.
_QUANTIZATIONS: Final[tuple[tuple[str, QuantizationName], ...]] = (
    ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("fp4", "nvfp4"), ("w4a4", "nvfp4"),
    ("gptq-int8", "int8"), ("w8a16", "int8"), ("w8a8", "int8"), ("int8", "int8"), ("8bit", "int8"),
    ("fp8", "fp8"), ("fp8block", "fp8"), ("w8a8-fp8", "fp8"),
    ("w4a16", "int4"), ("awq", "int4"), ("gptq", "int4"), ("int4", "int4"), ("4bit", "int4"), ("bnb", "int4"),
    ("autoround", "int4"), ("bf16", "bf16"), ("fp16", "fp16"),
)  # fmt: skip
_OF_QUANTIZATION: Final = frozenset(
    {"dynamic", "static", "block", "per", "tensor", "pertensor", "quantized", "marlin", "g128", "sym", "asym"}
)

STATES: Final = "its layers keep a state instead of a cache, which is not simulated"
MIXED: Final = "its layers differ in size or kind, which is not simulated"
SPARSE: Final = "its sparse attention is not simulated"


@dataclass(frozen=True)
class Rule:
    """`words`: of the name, `*` for any one word. Either `model`, of the catalogue, with `changes` to its
    `config.json`; or `refused`, the reason."""

    words: str
    model: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""


def _longer(positions: int) -> Mapping[str, Any]:
    return {"max_position_embeddings": positions}


RULES: Final = (
    *(
        Rule(f"qwen3-{size}-{date}", f"Qwen/Qwen3-{size.upper()}", _longer(262_144))
        for size in ("4b", "30b-a3b", "235b-a22b")
        for date in ("2507", "thinking-2507")
    ),
    Rule("qwen3-coder-30b-a3b", "Qwen/Qwen3-30B-A3B", _longer(262_144)),
    Rule("qwen3-vl-235b-a22b", "Qwen/Qwen3-235B-A22B", _longer(262_144)),
    Rule("qwen3-embedding-*", "Qwen/Qwen3-*"),
    Rule("qwen3-reranker-*", "Qwen/Qwen3-*"),
    Rule("qwq-32b", "Qwen/Qwen2.5-32B", _longer(40_960)),
    *(Rule(f"qwen2.5-{kind}-*", "Qwen/Qwen2.5-*") for kind in ("coder", "math")),
    *(
        Rule(f"qwen2.5-vl-{size}", f"Qwen/Qwen2.5-{size.upper()}", _longer(128_000))
        for size in ("3b", "7b", "32b", "72b")
    ),
    Rule("qwen2.5-omni-7b", "Qwen/Qwen2.5-7B"),
    Rule("qwen2-0.5b", "Qwen/Qwen2.5-0.5B"),
    Rule("qwen2-1.5b", "Qwen/Qwen2.5-1.5B"),
    Rule("qwen2-7b", "Qwen/Qwen2.5-7B"),
    Rule("qwen2-72b", "Qwen/Qwen2.5-72B"),
    Rule("deepseek-r1-distill-llama-8b", "meta-llama/Llama-3.1-8B"),
    Rule("deepseek-r1-distill-llama-70b", "meta-llama/Llama-3.3-70B"),
    *(
        Rule(f"deepseek-r1-distill-qwen-{size}", f"Qwen/Qwen2.5-{size.upper()}", _longer(131_072))
        for size in ("1.5b", "7b", "14b", "32b")
    ),
    Rule("deepseek-r1-*-qwen3-8b", "Qwen/Qwen3-8B", _longer(131_072)),
    Rule("deepseek-v3.1", "deepseek-ai/DeepSeek-V3"),
    Rule("deepseek-v3.1-terminus", "deepseek-ai/DeepSeek-V3"),
    Rule("deepseek-v3.2-exp", "deepseek-ai/DeepSeek-V3.2"),
    Rule("deepseek-coder-v2-lite", "deepseek-ai/DeepSeek-V2-Lite"),
    Rule("deepseek-v4", refused=SPARSE),
    Rule("deepseek-v4.1", refused=SPARSE),
    Rule("llama3.1-nemotron-70b", "meta-llama/Llama-3.1-70B"),
    Rule("llama3.1-nemotron-nano-8b", "meta-llama/Llama-3.1-8B"),
    Rule("llama3.1-nemotron-nano-4b", refused=MIXED),
    Rule("llama3.1-nemotron-ultra", refused=MIXED),
    Rule("llama3.3-nemotron-super", refused=MIXED),
    Rule("llama3.2-11b-vision", refused="its cross-attention is not simulated"),
    Rule("llama3.2-90b-vision", refused="its cross-attention is not simulated"),
    Rule("llama3-70b", "meta-llama/Llama-3.1-70B", _longer(8192)),
    Rule("llama4-scout", "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
    Rule("llama4-maverick", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"),
    *(Rule(f"codellama-{size}", f"meta-llama/Llama-2-{size}", _longer(16_384)) for size in ("7b", "13b")),
    *(Rule(f"vicuna-{size}", f"meta-llama/Llama-2-{size}") for size in ("7b", "13b")),
    Rule("mistral-7b-v0.2", "mistralai/Mistral-7B-v0.1", {"sliding_window": None}),
    Rule("mistral-7b", "mistralai/Mistral-7B-v0.3"),
    *(
        Rule(f"mistral-small{version}-24b", "mistralai/Mistral-Small-24B-Base-2501", _longer(131_072))
        for version in ("3.1", "3.2")
    ),
    Rule("mistral-small-24b", "mistralai/Mistral-Small-24B-Base-2501"),
    *(
        Rule(f"{name}-small", "mistralai/Mistral-Small-24B-Base-2501", _longer(131_072))
        for name in ("magistral", "devstral")
    ),
    Rule("mistral-nemo", "mistralai/Mistral-Nemo-12B-2407"),
    *(Rule(f"mistral-large-{date}", "mistralai/Mistral-Large-2411") for date in ("2407", "2411")),
    Rule("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
    Rule("mixtral-8x22b", "mistralai/Mixtral-8x22B-v0.1"),
    Rule("kimi-k2", "moonshotai/Kimi-K2-Instruct"),
    Rule("kimi-k2-0905", "moonshotai/Kimi-K2-Instruct", _longer(262_144)),
    Rule("kimi-k2-thinking", "moonshotai/Kimi-K2.5"),
    Rule("kimi-k2.6", "moonshotai/Kimi-K2.5"),
    Rule("kimi-k2.7-code", "moonshotai/Kimi-K2.5"),
    Rule("kimi-k3", refused=STATES),
    Rule("kimi-linear", refused=STATES),
    Rule("glm4.7", "zai-org/GLM-4.6"),
    Rule("glm5.1", "zai-org/GLM-5"),
    Rule("glm5.2", refused=SPARSE),
    Rule("glm5.3", refused=SPARSE),
    Rule("minimax-m2", "MiniMaxAI/MiniMax-M2.5"),
    Rule("minimax-m2.1", "MiniMaxAI/MiniMax-M2.5"),
    Rule("minimax-m2.7", "MiniMaxAI/MiniMax-M2.5"),
    Rule("minimax-m1", refused=STATES),
    Rule("minimax-m3", refused=SPARSE),
    Rule("minimax-text", refused=STATES),
    Rule("gpt-oss-safeguard-20b", "openai/gpt-oss-20b"),
    Rule("gpt-oss-safeguard-120b", "openai/gpt-oss-120b"),
    *(Rule(f"medgemma-{size}", f"google/gemma-3-{size}") for size in ("4b", "27b")),
    Rule("gemma-3n", refused=MIXED),
    Rule("gemma4", refused=MIXED),
    *(
        Rule(f"granite{version}-{size}", f"ibm-granite/granite-3.3-{size}")
        for version in ("3.0", "3.1", "3.2")
        for size in ("2b", "8b")
    ),
    Rule("granite4.0", refused=STATES),
    Rule("granite4.1", refused=STATES),
    Rule("mimo-7b", "XiaomiMiMo/MiMo-7B"),
    Rule("phi3-mini-128k", "microsoft/Phi-3-mini-4k-instruct", _longer(131_072)),
    Rule("phi3.5-mini", "microsoft/Phi-3-mini-4k-instruct", _longer(131_072)),
    Rule("phi4-reasoning", "microsoft/phi-4", _longer(32_768)),
    Rule("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    *(
        Rule(name, refused=STATES)
        for name in (
            "qwen3-next",
            "qwen3.5",
            "qwen3.6",
            "qwen3.8",
            "nemotron-h",
            "nemotron3",
            "nemotron3.5",
            "nemotron-nano-9b",
            "nemotron-nano-12b",
            "falcon-h1",
            "lfm2",
            "jamba",
            "zamba2",
            "bamba",
            "codestral-mamba",
            "falcon-mamba",
        )
    ),
    *(Rule(name, refused=MIXED) for name in ("step3.5", "step3.7", "mimo-v2", "openelm")),
)


@dataclass(frozen=True)
class Found:
    """`model` of the catalogue, what its name adds to that, and `rule`, in words. With `refused` no model is meant."""

    model: str
    rule: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    quantization: QuantizationName | None = None
    kv_cache_dtype: KvDtype = "auto"
    refused: str = ""


def words_of(name: str) -> tuple[str, ...]:
    """The words of the last part of a name or path that has any of a model's."""
    last = next((part for part in reversed(re.split(r"[/\\]", name)) if part), name)
    snapshot = re.search(r"models--[^/\\]+--([^/\\]+)", name)  # a folder of the hub's cache
    text = (snapshot.group(1) if snapshot else last).lower()
    text = re.sub(r"(?<=\d)_(?=\d)", ".", text)
    pieces = re.split(r"[^a-z0-9.]+|(?<!\d)\.|\.(?!\d)", text)
    words: list[str] = []
    for piece in filter(None, pieces):
        if words and _VERSION.match(piece) and words[-1].isalpha() and words[-1] not in _ALONE:
            words[-1] += piece
        else:
            words.append(piece)
    return tuple(word for word in words if word not in NOISE)


_ALONE: Final = NOISE | OTHER  # words that no version follows


def find_name(name: str, known: Iterable[str]) -> Found | None:
    """What a served name means, given the names of the catalogue; None where nothing fits."""
    words = words_of(name)
    catalogue = {model: words_of(model) for model in known}
    for model, its in catalogue.items():
        if its == words:
            same = model.lower() == name.lower()
            return Found(model, "" if same else f"{name} is {model}")
    found: list[tuple[int, int, Rule, tuple[str, ...]]] = []
    for rule in [*RULES, *(Rule("-".join(its), model) for model, its in catalogue.items())]:
        pattern = words_of(rule.words.replace("*", "any")) if "*" in rule.words else words_of(rule.words)
        at = _place(pattern, words)
        if at is not None:
            found.append((len(pattern), at, rule, words[:at] + words[at + len(pattern) :]))
    for length, at, rule, beside in sorted(found, key=lambda item: (-item[0], -item[1])):
        if rule.refused:
            return Found("", "", refused=rule.refused)
        quantization, rest = _quantization(beside)
        if any(word in OTHER or _SIZE.match(word) for word in rest):
            continue
        meant = _starred(rule, words[at : at + length], catalogue)
        if meant is None:
            continue
        by = name.split("/")[0].lower() if "/" in name else ""
        narrow = quantization in ("fp8", "nvfp4")
        wants_fp8_cache = (by == "nvidia" and narrow) or "fp8-kv" in "-".join(beside)
        told = [f"{name} is taken for {meant}, as its name has '{'-'.join(words[at : at + length])}'"]
        told += [f"quantization {quantization} from its name"] if quantization else []
        told += ["an 8-bit KV cache, as such checkpoints ask for"] if wants_fp8_cache else []
        return Found(
            meant,
            "; ".join(told),
            changes=rule.changes,
            quantization=quantization,
            kv_cache_dtype="fp8" if wants_fp8_cache else "auto",
        )
    return None


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names of the catalogue that are most alike."""
    own = "-".join(words_of(name))

    def likeness(model: str) -> float:
        its = "-".join(words_of(model))
        shared = len(set(words_of(name)) & set(words_of(model)))
        return shared + SequenceMatcher(None, own, its).ratio()

    return sorted(known, key=lambda model: (-likeness(model), model))[:count]


def _place(pattern: Sequence[str], words: Sequence[str]) -> int | None:
    """Where the pattern's words are in one piece, the last place; None where nowhere."""
    size = len(pattern)
    for at in range(len(words) - size, -1, -1):
        if size and all(p in ("any", w) for p, w in zip(pattern, words[at : at + size], strict=True)):
            return at
    return None


def _quantization(words: Sequence[str]) -> tuple[QuantizationName | None, list[str]]:
    """The quantization that words tell, and the other words."""
    joined = "-".join(words)
    found = next((kept for told, kept in _QUANTIZATIONS if re.search(rf"(^|-){told}($|-)", joined)), None)
    told = {word for name, _ in _QUANTIZATIONS for word in name.split("-")} | _OF_QUANTIZATION
    return found, [word for word in words if word not in told]


def _starred(rule: Rule, words: Sequence[str], catalogue: Mapping[str, tuple[str, ...]]) -> str | None:
    if "*" not in rule.model:
        return rule.model if rule.model in catalogue else None
    model = words_of(rule.model.replace("*", words[-1]))
    return next((name for name, its in catalogue.items() if its == model), None)
