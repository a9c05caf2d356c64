"""How an engine is configured, from what it says of itself; and where its words contradict each other or ours.

Four places tell: the metric `vllm:cache_config_info`, `/v1/models`, `/version`, and `/server_info?config_format=json`,
which exists only on servers in development mode. The scheduler's limits are told by the last alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, Final, NamedTuple

log = logging.getLogger(__name__)

TWIN: Final = "the twin's settings"
MAX_PLACES: Final = 1_000
_ROUNDING: Final = 0.02  # of kv_cache_max_concurrency, which is rounded
_ROUNDED_DOWN: Final = (
    0.9  # a capacity in whole requests is at most so much smaller than in blocks, unless those are few
)


@dataclass(frozen=True)
class EngineConfig:
    """One engine's settings, under vLLM's names or, where the twin has the setting, the twin's. None: not told."""

    block_size: int | None = None  # tokens
    num_gpu_blocks: int | None = None
    prefix_caching: bool | None = None
    kv_cache_dtype: str | None = None
    max_model_len: int | None = None  # tokens
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool | None = None
    async_scheduling: bool | None = None
    scheduling_policy: str | None = None
    long_prefill_token_threshold: int | None = None  # tokens
    scheduler_reserve_full_isl: bool | None = None
    watermark: float | None = None
    gpu_memory_utilization: float | None = None
    prefix_caching_hash_algo: str | None = None
    sliding_window: int | None = None  # tokens
    mamba_block_size: int | None = None  # tokens
    effective_attention_block_size: int | None = None  # tokens
    tensor_parallel_size: int | None = None
    data_parallel_size: int | None = None
    dtype: str | None = None
    vllm_version: str | None = None
    capacity_note: str = ""  # why `num_gpu_blocks` is not what the engine calls so

    def told(self) -> dict[str, object]:
        """What is known."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        del told["capacity_note"]
        return told


def from_cache_config(series: Iterable[Mapping[str, str]]) -> dict[str, EngineConfig]:
    """By data-parallel rank, from the labels of all `vllm:cache_config_info` series of one server.

    The values are Python's `str()`. With several engines `num_gpu_blocks` is the sum over them, so one's own follows
    from its `kv_cache_size_tokens`, which is not summed, or else from an equal share (vLLM's v1/engine/core_client.py
    adds up what the engines report).
    """
    found = {labels.get("engine", ""): labels for labels in series}
    return {rank: _cache_config(labels, len(found)) for rank, labels in found.items()}


def _cache_config(labels: Mapping[str, str], engines: int) -> EngineConfig:
    block_size = _whole(labels.get("block_size"))
    blocks = _whole(labels.get("num_gpu_blocks"))
    tokens = _whole(labels.get("kv_cache_size_tokens"))
    if blocks is not None and engines > 1:
        share = blocks // engines
        own = tokens // block_size if tokens and block_size else share
        # The tokens are rounded down by vLLM: within a block of an equal share they tell the same.
        blocks = share if abs(own - share) <= 1 else own
    capacity = _capacity(labels, block_size, blocks, tokens)
    return EngineConfig(
        block_size=capacity.block_size,
        num_gpu_blocks=capacity.blocks,
        prefix_caching=_truth(labels.get("enable_prefix_caching")),
        kv_cache_dtype=_cache_dtype(labels.get("cache_dtype")),
        gpu_memory_utilization=_number(labels.get("gpu_memory_utilization")),
        prefix_caching_hash_algo=_text(labels.get("prefix_caching_hash_algo")),
        sliding_window=_whole(labels.get("sliding_window")),
        mamba_block_size=_whole(labels.get("mamba_block_size")),
        effective_attention_block_size=_whole(labels.get("effective_attention_block_size")),
        capacity_note=capacity.note,
    )


class _Capacity(NamedTuple):
    """A KV cache in blocks of so many tokens, which may differ from what the engine calls a block."""

    block_size: int | None
    blocks: int | None
    note: str = ""


def _capacity(labels: Mapping[str, Any], block_size: int | None, blocks: int | None, tokens: int | None) -> _Capacity:
    """What an engine's cache holds.

    `kv_cache_size_tokens` says it (vLLM's v1/core/kv_cache_utils.py: requests of `max_model_len` that fit at once,
    times that length). `num_gpu_blocks` times `block_size` is the same only where all layers share one kind of block:
    in hybrid and sliding-window models the size is the smallest of several, and a block holds a few of the layers.
    """
    if not block_size or not blocks:
        return _Capacity(block_size, blocks)
    if not tokens:
        if _whole(labels.get("mamba_block_size")):
            return _Capacity(
                block_size,
                None,
                f"the capacity of a hybrid model is unknown; it is not num_gpu_blocks {blocks} times block_size "
                f"{block_size}; set fleet.engine.num_gpu_blocks",
            )
        return _Capacity(block_size, blocks)
    for size in (
        block_size,
        _whole(labels.get("effective_attention_block_size")),
    ):  # the latter: of context parallelism
        if size and _fits(blocks, size, tokens, _longest(labels, tokens)):
            return _Capacity(size, blocks)
    return _Capacity(
        block_size,
        max(2, tokens // block_size),
        f"num_gpu_blocks {blocks} times block_size {block_size} is not kv_cache_size_tokens {tokens}, as in a model "
        f"with several kinds of layers: taken for {tokens} tokens; if that is wrong, set fleet.engine.num_gpu_blocks "
        "and block_size",
    )


def _longest(labels: Mapping[str, Any], tokens: int) -> int | None:
    """The `max_model_len` that a capacity was counted with, to about a per cent."""
    concurrency = _number(labels.get("kv_cache_max_concurrency"))
    return round(tokens / concurrency) if concurrency else None


def _fits(blocks: int, size: int, tokens: int, longest: int | None) -> bool:
    """Whether a cache of equal blocks would be counted as so many tokens: the last block of a request is not full."""
    if longest:
        per_request = -(-longest // size)
        return any(
            abs(blocks * longest / count - tokens) <= max(size, _ROUNDING * tokens)
            for count in (per_request - 1, per_request, per_request + 1)
            if count > 0
        )
    return _ROUNDED_DOWN * blocks * size <= tokens <= blocks * size + size


def from_models(answer: Any) -> EngineConfig:
    """From the answer of `/v1/models`."""
    models = answer.get("data") if isinstance(answer, Mapping) else None
    lengths = [model.get("max_model_len") for model in models or () if isinstance(model, Mapping)]
    return EngineConfig(max_model_len=next((length for length in map(_whole, lengths) if length), None))


def from_server_info(answer: Any) -> EngineConfig:
    """From the answer of `/server_info?config_format=json` (a dump of vLLM's `VllmConfig`)."""
    config = answer.get("vllm_config") if isinstance(answer, Mapping) else None
    cache, scheduler = _part(config, "cache_config"), _part(config, "scheduler_config")
    model, parallel = _part(config, "model_config"), _part(config, "parallel_config")
    ranks = _whole(parallel.get("data_parallel_size"))
    blocks = _whole(cache.get("num_gpu_blocks")) if ranks in (None, 1) else None  # a sum otherwise
    capacity = _capacity(cache, _whole(cache.get("block_size")), blocks, _whole(cache.get("kv_cache_size_tokens")))
    return EngineConfig(
        block_size=capacity.block_size,
        num_gpu_blocks=capacity.blocks,
        prefix_caching=_truth(cache.get("enable_prefix_caching")),
        kv_cache_dtype=_cache_dtype(cache.get("cache_dtype")),
        max_model_len=_whole(model.get("max_model_len")),
        max_num_seqs=_whole(scheduler.get("max_num_seqs")),
        max_num_batched_tokens=_whole(scheduler.get("max_num_batched_tokens")),
        enable_chunked_prefill=_truth(scheduler.get("enable_chunked_prefill")),
        async_scheduling=_truth(scheduler.get("async_scheduling")),
        scheduling_policy=_text(scheduler.get("policy")),
        long_prefill_token_threshold=_whole(scheduler.get("long_prefill_token_threshold")),
        scheduler_reserve_full_isl=_truth(scheduler.get("scheduler_reserve_full_isl")),
        watermark=_number(scheduler.get("watermark")),
        gpu_memory_utilization=_number(cache.get("gpu_memory_utilization")),
        prefix_caching_hash_algo=_text(cache.get("prefix_caching_hash_algo")),
        sliding_window=_whole(cache.get("sliding_window")),
        mamba_block_size=_whole(cache.get("mamba_block_size")),
        effective_attention_block_size=_whole(cache.get("effective_attention_block_size")),
        tensor_parallel_size=_whole(parallel.get("tensor_parallel_size")),
        data_parallel_size=ranks,
        dtype=_text(model.get("dtype")),
        capacity_note=capacity.note,
    )


class EngineConfigs:
    """What is known of the configuration of every engine of a pool, which is meant to be the same for all.

    `configured` is what the twin's settings say (names of EngineConfig); it comes first, then whoever spoke first.
    Any thread may call.
    """

    def __init__(self, configured: Mapping[str, object]) -> None:
        self._said: dict[str, dict[str, object]] = {TWIN: dict(configured)}
        self._notes: dict[str, str] = {}
        self._told: frozenset[str] = frozenset()
        self._lock = Lock()

    def learn(self, where: str, config: EngineConfig) -> None:
        """Take in what is said in one place, such as "pod vllm-0, /v1/models"; replaces what was said there before.

        A contradiction not seen before is logged.
        """
        with self._lock:
            if config.capacity_note and self._notes.get(where) != config.capacity_note:
                log.warning("engine configuration: %s: %s", where, config.capacity_note)
            self._notes[where] = config.capacity_note
            if self._said.get(where) == config.told():
                return
            self._said.pop(where, None)
            if len(self._said) > MAX_PLACES:  # pods come and go for months
                gone = next(place for place in self._said if place != TWIN)
                self._notes.pop(gone, None)
                self._said.pop(gone)
            self._said[where] = config.told()
            contradictions = self._contradictions()
            for contradiction in contradictions:
                if contradiction not in self._told:
                    log.warning("engine configuration: %s", contradiction)
            self._told = frozenset(contradictions)

    def discovered(self) -> EngineConfig:
        """What the engines say, the twin's settings left aside; of contradicting words the first."""
        found: dict[str, Any] = {}
        with self._lock:
            places = list(self._said.items())
        for where, said in places:
            if where != TWIN:
                found = {**said, **found}
        return EngineConfig(**found)

    def notes(self) -> list[str]:
        """What is peculiar about the engines' capacity, each once, with the places that it is true of."""
        with self._lock:
            places: dict[str, list[str]] = {}
            for where, note in self._notes.items():
                if note:
                    places.setdefault(note, []).append(where)
        return [f"{where[0]}{f' and {len(where) - 1} more' if where[1:] else ''}: {n}" for n, where in places.items()]

    def contradictions(self) -> list[str]:
        """One line for each setting and place that differs from the first that told the setting."""
        with self._lock:
            return self._contradictions()

    def _contradictions(self) -> list[str]:
        found: list[str] = []
        first: dict[str, tuple[str, object]] = {}
        for where, said in self._said.items():
            for name, value in said.items():
                place, expected = first.setdefault(name, (where, value))
                if value != expected:
                    found.append(f"{name} is {value} ({where}) but {expected} ({place})")
        return found


def _part(config: Any, name: str) -> Mapping[str, Any]:
    part = config.get(name) if isinstance(config, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _text(value: object) -> str | None:
    return None if value is None or str(value) in ("", "None") else str(value)


def _whole(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if abs(number) < 2**63 else None


def _truth(value: object) -> bool | None:
    return {"true": True, "false": False}.get(str(value).lower())


def _cache_dtype(value: object) -> str | None:
    """Every 8-bit float is "fp8" to the twin. "auto" means the model's own, which the metric does not tell."""
    text = _text(value)
    return "fp8" if text is not None and text.startswith("fp8") else text
