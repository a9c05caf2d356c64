"""LLMServingSim's benchmark of a real vLLM: `requests.jsonl` beside `meta.json`.

`queued_ts`, `scheduled_ts`, `first_token_ts` and `last_token_ts` are seconds of vLLM's monotonic clock; the arrival is
`queued_ts`, because `arrival_time` is another clock's. Prompt content is not told: no request shares anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from connectors.traces.base import JsonReader, finite, label, request, required
from kavier_twin.telemetry import RequestRecord

# Where meta.json tells what the engine was configured to do, the best source last. Any of it may be missing or null.
_ENGINE_SECTIONS = (
    ("engine_kwargs",),
    ("resolved_config", "cache_config"),
    ("resolved_config", "scheduler_config"),
    ("kv_cache",),
)
_ENGINE_FIELDS = {
    "model": "model",
    "tensor_parallel_size": "tensor_parallel_size",
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_model_len": "max_model_len",
    "kv_cache_dtype": "kv_cache_dtype",
    "block_size": "block_size",
    "num_gpu_blocks": "num_gpu_blocks",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "enable_prefix_caching": "prefix_caching",
    "async_scheduling": "async_scheduling",
    "enable_chunked_prefill": "enable_chunked_prefill",
    "long_prefill_token_threshold": "long_prefill_token_threshold",
    "policy": "scheduling_policy",
    "scheduler_reserve_full_isl": "scheduler_reserve_full_isl",
}


class LlmServingSimReader(JsonReader):
    """Times count from the first request.

    `settings["engine"]` has what meta.json tells of the engine, by vLLM's names as in a recording, and the model and
    the GPU (`gpu`) where it names them.
    """

    name = "llmservingsim"
    expected = 'JSON lines {"request_id", "input_toks", "output_toks", "queued_ts", ...} beside a meta.json'
    marks = frozenset({"input_toks", "output_toks", "queued_ts", "first_token_ts", "last_token_ts"})
    trace_file = "requests.jsonl"
    settings_file = "meta.json"
    relative_times = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.settings = {**self.settings, "engine": _engine(self.settings)}

    def record(self, index: int, row: dict[str, Any]) -> RequestRecord:
        queued, first, last = (
            finite(required(row, name), name) for name in ("queued_ts", "first_token_ts", "last_token_ts")
        )
        scheduled = row.get("scheduled_ts")
        return request(
            id=label(row.get("request_id"), "request_id") or str(index),
            time_seconds=queued,
            prompt_tokens=required(row, "input_toks"),
            output_tokens=required(row, "output_toks"),
            ttft_seconds=first - queued,
            e2e_seconds=last - queued,
            queue_seconds=None if scheduled is None else finite(scheduled, "scheduled_ts") - queued,
        )


def _engine(meta: Mapping[str, Any]) -> dict[str, Any]:
    engine: dict[str, Any] = {}
    for path in _ENGINE_SECTIONS:
        section: Any = meta
        for name in path:
            section = section.get(name) if isinstance(section, Mapping) else None
        if isinstance(section, Mapping):
            told = {ours: section.get(name) for name, ours in _ENGINE_FIELDS.items()}
            engine |= {name: value for name, value in told.items() if value is not None}
    engine.setdefault("model", meta.get("model"))
    hardware = meta.get("hardware")
    engine["gpu"] = hardware.get("device_name") if isinstance(hardware, Mapping) else None
    return {name: value for name, value in engine.items() if value is not None}
