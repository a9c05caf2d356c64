"""Golden runs by feature: what `test_versions.py` compares and `docs/compatibility.md` tells.

Runs are named by their place in the shared data, those of `tiers/` by that in `tests/data`.
"""

from __future__ import annotations

from typing import NamedTuple

PLAIN = tuple(
    f"vllm_golden_033/r{number}"
    for number in (*range(9000, 9040, 2), 9500, *range(9504, 9519, 2), 9519, *range(9520, 9540, 2))
)
TIERS_033 = ("arc", "decode", "lru-small", "no-caching", "no-chunking", "pinned", "random-sync", "threshold", "tight")


class Exact(NamedTuple):
    """A feature whose golden runs are all equal, under every version that made them."""

    feature: str
    setting: str
    runs: tuple[str, ...]


class Inexact(NamedTuple):
    """A feature without equal golden runs."""

    feature: str
    says: str
    what_happens: str


_FEATURES = "vllm_golden_features/"
EXACT = (
    Exact(
        "Scheduler and prefix cache: fcfs and priority, asynchronous, chunked prefill, preemption", "`engine`", PLAIN
    ),
    Exact("Active requests below `max_num_seqs`", "`engine.max_num_active_seqs`", (f"{_FEATURES}misc/active8",)),
    Exact(
        "Scheduled tokens below the batch limit", "`engine.max_num_scheduled_tokens`", (f"{_FEATURES}misc/schedtok",)
    ),
    Exact(
        "Decode context parallelism",
        "`engine.block_size`: tokens of a block on all ranks",
        (f"{_FEATURES}misc/dcp2",),
    ),
    Exact("Cache salt", "block hashes with vLLM's keys", (f"{_FEATURES}lora/salt16",)),
    Exact("LoRA adapters, `--max-loras`", "`adapter` of a record, `engine.max_loras`", (f"{_FEATURES}lora/lora4of16",)),
    Exact("`prompt_logprobs`", "`skip_reading_prefix_cache` of a record", (f"{_FEATURES}misc/logprobs",)),
    Exact(
        "Windowed layers with `--disable-hybrid-kv-cache-manager`",
        "none needed",
        (f"{_FEATURES}hybrid/chat-gptoss-nohybrid",),
    ),
)
INEXACT = (
    Inexact("Disk tier", "approximated", "transfers take their time; no golden runs"),
    Inexact("Data parallel ranks", "approximated", "each rank is a replica; MoE waves are not modelled"),
    Inexact("Structured output", "approximated", "the wait for a grammar is left out"),
    Inexact("KV-cache groups (sliding window, chunked local attention, hybrid models)", "not modelled", ""),
    Inexact("State layers (Mamba, linear attention)", "not modelled", ""),
    Inexact("Speculative decoding", "not modelled", ""),
    Inexact("Prefill/decode disaggregation", "not modelled", ""),
    Inexact("Pipeline parallelism", "not modelled", ""),
    Inexact("`long_prefill_token_threshold_adaptive`, `prefill_schedule_interval`", "not modelled", ""),
    Inexact("LoRA adapters with `--max-loras` and a host tier", "not modelled", "refused"),
    Inexact("Multimodal encoder budget and cache", "not modelled", ""),
)
