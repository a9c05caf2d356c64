"""What engines do that the twin does not model: how it is seen, and which KPIs it spoils.

`FEATURES` is the table. A feature that is seen is named in one note of the status and by the metric
`kavier_twin_unmodelled_info`, and the KPIs that it spoils are not trusted, however well they did lately: their errors
may come back with the next change of load. What becomes modelled leaves the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from connectors.prometheus.engine_config import EngineConfig
from kavier_twin.catalog.model import ModelShape
from kavier_twin.serve.models import Unmodelled
from kavier_twin.simulation.kpi_table import GAUGES, LATENCIES, RATES
from kavier_twin.simulation.versions import NEWEST, is_newer
from kavier_twin.telemetry import EngineSample, KvBlocksStored, KvEventBatch, TelemetryRecord

_CACHE: Final = (*GAUGES, "prefix_cache_hit_ratio", "preemptions")
_ALL: Final = (*LATENCIES, *_CACHE, *RATES)

# By name: what it is, how it is seen, and the KPIs that it spoils. Errors of mirrors that left each out were measured
# against vLLM's own scheduler.
FEATURES: Final[Mapping[str, tuple[str, str, tuple[str, ...]]]] = {
    "sliding_window": (
        "layers with a sliding window",
        "sliding_window of vllm:cache_config_info, kv_cache_spec_kind of KV events, or the model of fleet.hardware",
        _ALL,
    ),
    "state_layers": (
        "layers that keep a state",
        "mamba_block_size of vllm:cache_config_info, or kv_cache_spec_kind of KV events",
        _ALL,
    ),
    "kv_cache_groups": ("several KV cache groups", "group_idx of KV events", _ALL),
    "kv_cache_kind": (
        "a KV cache of a kind that is not known",
        "kv_cache_spec_kind of KV events",
        _ALL,
    ),
    "context_parallel": (
        "blocks of attention that differ from the cache's",
        "effective_attention_block_size of vllm:cache_config_info",
        (*_CACHE, *LATENCIES),
    ),
    "speculative_decoding": (
        "speculative decoding",
        "vllm:spec_decode_num_drafts_total",
        _ALL,
    ),
    "lora": (
        "LoRA adapters",
        "vllm:lora_requests_info",
        (*_CACHE, *LATENCIES),
    ),
    "kv_transfer": (
        "KV blocks from outside without a tier in the settings",
        "vllm:external_prefix_cache_hits_total, or vllm:prompt_tokens_by_source_total",
        _ALL,
    ),
    "vllm_version": (
        f"a version of vLLM after {NEWEST}",
        "/version",
        _CACHE,
    ),
}

# kv_cache_spec_kind of events (vLLM's v1/kv_cache_interface.py), by what it tells.
_PLAIN_KINDS: Final = frozenset({"full_attention", "mla_attention"})


class UnmodelledFeatures:
    """Follows what the engines of one pool tell. `shape`: of the pool's model, where it is known."""

    def __init__(self, shape: ModelShape | None, *, host_tier: bool) -> None:
        self._host_tier = host_tier
        self._of_events: set[str] = set()
        # Llama 4's chunked layers are simulated as vLLM runs them by default: all in one group.
        has_windows = shape is not None and shape.sliding_layers > 0 and shape.architecture != "llama4"
        self._of_model = {"sliding_window"} if has_windows else set()

    def take(self, record: TelemetryRecord) -> None:
        """Look at a record."""
        if isinstance(record, KvEventBatch):
            for event in record.events:
                if isinstance(event, KvBlocksStored):
                    self._of_events |= _of_kind(event.spec_kind) | ({"kv_cache_groups"} if event.group else set())

    def found(self, samples: Iterable[EngineSample], configs: Iterable[EngineConfig]) -> tuple[Unmodelled, ...]:
        """The features that are seen, by the newest sample of each engine and what is known of their settings."""
        names = self._of_model | self._of_events
        for sample in samples:
            names |= _of_sample(sample, host_tier=self._host_tier)
        for config in configs:
            names |= _of_config(config)
        return tuple(
            Unmodelled(name, what, seen, spoils) for name, (what, seen, spoils) in FEATURES.items() if name in names
        )


def note_of(features: Iterable[Unmodelled]) -> list[str]:
    """The one line of the status; none where nothing is seen."""
    found = [f"{feature.what} ({feature.seen_by})" for feature in features]
    if not found:
        return []
    kpis = dict.fromkeys(kpi for feature in features for kpi in feature.spoils)
    return [f"Not modelled: {'; '.join(found)}. Not trusted for that: {', '.join(kpis)}."]


def _of_kind(kind: str) -> set[str]:
    if not kind or kind in _PLAIN_KINDS:
        return set()
    if "sliding" in kind or "chunked" in kind:
        return {"sliding_window"}
    if "mamba" in kind or "linear" in kind or "state" in kind:
        return {"state_layers"}
    return {"kv_cache_kind"}


def _of_sample(sample: EngineSample, *, host_tier: bool) -> set[str]:
    found = set()
    if sample.spec_decode_drafts:
        found.add("speculative_decoding")
    if sample.lora_requests:
        found.add("lora")
    external = sample.prompt_tokens_by_source.get("external_kv_transfer", 0.0)
    if not host_tier and (external or sample.external_prefix_cache_hits_tokens):
        found.add("kv_transfer")
    return found | _of_version(sample.vllm_version)


def _of_config(config: EngineConfig) -> set[str]:
    found = _of_version(config.vllm_version)
    if config.sliding_window:
        found.add("sliding_window")
    if config.mamba_block_size:
        found.add("state_layers")
    effective = config.effective_attention_block_size
    if effective and config.block_size and effective != config.block_size:
        found.add("context_parallel")
    return found


def _of_version(version: str | None) -> set[str]:
    return {"vllm_version"} if is_newer(version) else set()
