"""Which series of vLLM holds which field of an `EngineSample`, under the names that vLLM and what is between use.

Names as in vLLM 0.32's `v1/metrics/loggers.py`; for each field the newest name first. A Counter is exposed with the
suffix `_total`, a Histogram as `_bucket`, `_sum` and `_count`.

Collectors rename. The prefix is anything that ends in `vllm` (Ray Serve: `ray_vllm_`, KServe: `kserve_vllm:`,
OpenTelemetry: `vllm.`), or missing (NVIDIA NIM), or the source's `metric_prefix`. Counters come with and without
`_total`, and OpenTelemetry appends units to gauges. Where one engine has both spellings, vLLM's own counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
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
    "spec_decode_drafts": ("vllm:spec_decode_num_drafts",),
    "spec_decode_draft_tokens": ("vllm:spec_decode_num_draft_tokens",),
    "spec_decode_accepted_tokens": ("vllm:spec_decode_num_accepted_tokens",),
    "kv_offload_load_bytes": ("vllm:kv_offload_load_bytes",),
    "kv_offload_load_seconds": ("vllm:kv_offload_load_time",),
    "kv_offload_store_bytes": ("vllm:kv_offload_store_bytes",),
    "kv_offload_store_seconds": ("vllm:kv_offload_store_time",),
}
# Field -> the label that tells its entries apart, and the names.
LABELLED_GAUGES: Final = {
    "requests_waiting_by_reason": ("reason", ("vllm:num_requests_waiting_by_reason",)),
    "lora_requests": ("running_lora_adapters", ("vllm:lora_requests_info",)),
    "sleep_state": ("sleep_state", ("vllm:engine_sleep_state",)),
}
LABELLED_COUNTERS: Final = {
    "prompt_tokens_by_source": ("source", ("vllm:prompt_tokens_by_source",)),
    "requests_finished_by_reason": (
        "finished_reason",
        ("vllm:request_success", "vllm:request_finish"),
    ),  # the latter is NIM's
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
    "kv_block_lifetime_seconds": ("vllm:kv_block_lifetime_seconds",),
    "kv_block_idle_before_evict_seconds": ("vllm:kv_block_idle_before_evict_seconds",),
    "kv_block_reuse_gap_seconds": ("vllm:kv_block_reuse_gap_seconds",),
}
# When the process began. vLLM makes its counters at start, so their `_created` is as good as the process's own.
STARTED: Final = ("process_start_time_seconds", "vllm:prompt_tokens_created", "vllm:generation_tokens_created")
CACHE_CONFIG: Final = "vllm:cache_config_info"

# The gauges that vLLM gives no labels but the model's and the engine's: whatever else they bear tells servers apart.
PLAIN_GAUGES: Final = frozenset(GAUGES)
_UNITS: Final = ("", "_ratio", "_percent")  # that OpenTelemetry appends to a gauge's name

Part = Literal["value", "labelled", "bucket", "sum", "count", "started"]


class Place(NamedTuple):
    """Where a series belongs: the field, the part of it, how old the name is (0: today's), the telling label."""

    field: str
    part: Part
    age: int
    label: str = ""


def _gauges(field: str, part: Part, names: tuple[str, ...], label: str = "") -> dict[str, Place]:
    spelt = [f"{name}{unit}" for name in names for unit in _UNITS]
    return {name: Place(field, part, age, label) for age, name in enumerate(spelt)}


def _counters(field: str, part: Part, names: tuple[str, ...], label: str = "") -> dict[str, Place]:
    spelt = [f"{name}{suffix}" for name in names for suffix in ("_total", "")]
    return {name: Place(field, part, age, label) for age, name in enumerate(spelt)}


def _places() -> dict[str, Place]:
    found: dict[str, Place] = {}
    for field, names in GAUGES.items():
        found |= _gauges(field, "value", names)
    for field, names in COUNTERS.items():
        found |= _counters(field, "value", names)
    for field, (label, names) in LABELLED_GAUGES.items():
        found |= _gauges(field, "labelled", names, label)
    for field, (label, names) in LABELLED_COUNTERS.items():
        found |= _counters(field, "labelled", names, label)
    for field, names in HISTOGRAMS.items():
        spelt = dict.fromkeys(name for given in names for name in (given, given.removesuffix("_total")))
        for age, name in enumerate(spelt):
            found[f"{name}_bucket"] = Place(field, "bucket", age, "le")
            found[f"{name}_sum"] = Place(field, "sum", age)
            found[f"{name}_count"] = Place(field, "count", age)
    return found | {name: Place("started_seconds", "started", age) for age, name in enumerate(STARTED)}


PLACES: Final = _places()
"""By name as vLLM itself would write it."""


def series_of(field: str) -> str:
    """What vLLM calls the series of a field today."""
    name = next(name for name, place in PLACES.items() if place.field == field)
    return name.removesuffix("_bucket")


def place_of(name: str, prefix: str = "") -> Place | None:
    """Where a series belongs, or None. `prefix` is one more that stands for `vllm:`."""
    return PLACES.get(canonical(name, prefix))


@lru_cache(maxsize=10_000)
def canonical(name: str, prefix: str = "") -> str:
    """The name as vLLM itself writes it; other names as they are."""
    if name in STARTED:
        return name
    flat = re.sub(r"[^a-zA-Z0-9]", "_", name)
    if prefix and name.startswith(prefix):
        return f"vllm:{re.sub(r'[^a-zA-Z0-9]', '_', name.removeprefix(prefix))}"
    if "vllm_" in flat:
        return f"vllm:{flat.rpartition('vllm_')[2]}"
    return f"vllm:{name}" if f"vllm:{name}" in _KNOWN else name


def is_bare(name: str, prefix: str = "") -> bool:
    """Whether a name is vLLM's without any prefix, as NIM's are: then it may as well be something else's."""
    return canonical(name, prefix) == f"vllm:{name}"


_KNOWN: Final = frozenset(PLACES) | {CACHE_CONFIG}


def engine_selector(matchers: str = "", prefix: str = "") -> str:
    """A PromQL selector of every series that `place_of` knows of an engine, in every spelling.

    `process_start_time_seconds` is left out: a selector on vLLM's labels cannot tell whose it is.
    """
    return _selector((name for name in PLACES if name.startswith("vllm:")), matchers, prefix)


def cache_config_selector(matchers: str = "", prefix: str = "") -> str:
    """A PromQL selector of the series that tells how an engine's cache is set."""
    return _selector((CACHE_CONFIG,), matchers, prefix)


def running_selector(matchers: str = "", prefix: str = "") -> str:
    """A PromQL selector of the gauges by which an engine is found."""
    return _selector((name for name, place in PLACES.items() if place.field in PLAIN_GAUGES), matchers, prefix)


def _selector(names: Iterable[str], matchers: str, prefix: str) -> str:
    words = "|".join(sorted(name.removeprefix("vllm:") for name in names))
    own = f"|{re.escape(prefix)}" if prefix else ""
    return f"{{__name__=~{json.dumps(f'(.*vllm[:_.]{own})?({words})')}{matchers}}}"


# --- labels -------------------------------------------------------------------------------------------------------

_LEVELS: Final = ("exported_exported_", "exported_", "")
_MODEL: Final = ("model_name", "model")  # the latter is Triton's
_RAY: Final = ("ReplicaId", "WorkerId")
_POD: Final = ("pod", "pod_name", "kubernetes_pod_name", "k8s_pod_name")
_ADDRESS: Final = ("service_instance_id", "instance")
_NAMESPACE: Final = ("namespace", "pod_namespace", "kubernetes_namespace", "k8s_namespace_name")


def label(labels: Mapping[str, str], *names: str) -> str:
    """The value of the first of these labels that is there, as the collector nearest to the engine gave it.

    A Prometheus that scrapes another or a collector puts its own label in the place of one of the same name, and
    keeps that as `exported_<name>`.
    """
    return next((found for level in _LEVELS for name in names if (found := labels.get(level + name))), "")


def model_of(labels: Mapping[str, str]) -> str:
    """The model served."""
    return label(labels, *_MODEL)


def rank_of(labels: Mapping[str, str]) -> str:
    """The data-parallel rank."""
    return label(labels, "engine")


def ray_replica_of(labels: Mapping[str, str]) -> str:
    """Ray's replica; several can be behind one address."""
    return label(labels, *_RAY)


def kubernetes_pod_of(labels: Mapping[str, str]) -> str:
    """The pod; empty where a server nearer to the engine told no more than its address."""
    for level in _LEVELS:
        if found := next((labels[level + name] for name in _POD if labels.get(level + name)), ""):
            return found
        if any(labels.get(level + name) for name in _ADDRESS):
            return ""
    return ""


def address_of(labels: Mapping[str, str]) -> str:
    """The address that was scraped."""
    return label(labels, *_ADDRESS)


def namespace_of(labels: Mapping[str, str]) -> str:
    """The Kubernetes namespace."""
    return label(labels, *_NAMESPACE)


def flat_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Label names as Prometheus had them before it allowed dots: `k8s.pod.name` as `k8s_pod_name`."""
    return {name if name.isidentifier() else re.sub(r"\W", "_", name): value for name, value in labels.items()}
