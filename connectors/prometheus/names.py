"""Which series of vLLM tells which field of an `EngineSample`, the names that vLLM gave up included.

Names as in vLLM 0.32's `v1/metrics/loggers.py`; for each field the newest name first. A Counter is exposed with the
suffix `_total`, a Histogram as `_bucket`, `_sum` and `_count`.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

GAUGES: Final = {
    "requests_running": ("vllm:num_requests_running",),
    "requests_waiting": ("vllm:num_requests_waiting",),
    "kv_cache_usage_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
}
COUNTERS: Final = {
    "prefix_cache_queries_tokens": ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries"),
    "prefix_cache_hits_tokens": ("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits"),
    "external_prefix_cache_queries_tokens": ("vllm:external_prefix_cache_queries",),
    "external_prefix_cache_hits_tokens": ("vllm:external_prefix_cache_hits",),
    "prompt_tokens": ("vllm:prompt_tokens",),
    "generation_tokens": ("vllm:generation_tokens",),
    "preemptions": ("vllm:num_preemptions",),
}
# Field -> the label that tells its entries apart, and the names.
LABELLED_GAUGES: Final = {"requests_waiting_by_reason": ("reason", ("vllm:num_requests_waiting_by_reason",))}
LABELLED_COUNTERS: Final = {
    "prompt_tokens_by_source": ("source", ("vllm:prompt_tokens_by_source",)),
    "requests_finished_by_reason": ("finished_reason", ("vllm:request_success",)),
    "requests_rejected_by_reason": ("reason", ("vllm:admission_rejections",)),
}
HISTOGRAMS: Final = {
    "ttft_seconds": ("vllm:time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "e2e_seconds": ("vllm:e2e_request_latency_seconds",),
    "queue_seconds": ("vllm:request_queue_time_seconds",),
    "prefill_seconds": ("vllm:request_prefill_time_seconds",),
    "decode_seconds": ("vllm:request_decode_time_seconds",),
    "request_prompt_tokens": ("vllm:request_prompt_tokens",),
    "request_generation_tokens": ("vllm:request_generation_tokens",),
    "step_tokens": ("vllm:iteration_tokens_total",),
}
# When the process began. vLLM makes its counters at start, so their `_created` is as good as the process's own.
STARTED: Final = ("process_start_time_seconds", "vllm:prompt_tokens_created", "vllm:generation_tokens_created")
CACHE_CONFIG: Final = "vllm:cache_config_info"

Part = Literal["value", "labelled", "bucket", "sum", "count", "started"]


class Place(NamedTuple):
    """Where a series belongs: the field, the part of it, how old the name is (0: today's), the telling label."""

    field: str
    part: Part
    age: int
    label: str = ""


def _places() -> dict[str, Place]:
    found: dict[str, Place] = {}
    for field, names in GAUGES.items():
        found |= {name: Place(field, "value", age) for age, name in enumerate(names)}
    for field, names in COUNTERS.items():
        found |= {f"{name}_total": Place(field, "value", age) for age, name in enumerate(names)}
    for field, (label, names) in LABELLED_GAUGES.items():
        found |= {name: Place(field, "labelled", age, label) for age, name in enumerate(names)}
    for field, (label, names) in LABELLED_COUNTERS.items():
        found |= {f"{name}_total": Place(field, "labelled", age, label) for age, name in enumerate(names)}
    for field, names in HISTOGRAMS.items():
        for age, name in enumerate(names):
            found[f"{name}_bucket"] = Place(field, "bucket", age, "le")
            found[f"{name}_sum"] = Place(field, "sum", age)
            found[f"{name}_count"] = Place(field, "count", age)
    return found | {name: Place("started_seconds", "started", age) for age, name in enumerate(STARTED)}


PLACES: Final = _places()


def place_of(name: str) -> Place | None:
    """Where a series belongs, or None. Ray Serve writes `vllm_` for `vllm:` (vLLM's `v1/metrics/ray_wrappers.py`)."""
    return PLACES.get(canonical(name))


def canonical(name: str) -> str:
    """The name as vLLM itself writes it."""
    return f"vllm:{name.removeprefix('vllm_')}" if name.startswith("vllm_") else name


def engine_selector(matchers: str = "") -> str:
    """A PromQL selector of every series that `place_of` knows of an engine, in both spellings.

    `process_start_time_seconds` is left out: a selector on vLLM's labels cannot tell whose it is.
    """
    names = sorted(name.removeprefix("vllm:") for name in PLACES if name.startswith("vllm:"))
    return f'{{__name__=~"vllm[:_]({"|".join(names)})"{matchers}}}'
