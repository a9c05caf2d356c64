"""What engines do that is not modelled is named, and the KPIs that it spoils lose trust."""

from __future__ import annotations

from dataclasses import replace

import pytest

from connectors.kv_events.wire import batch_of
from connectors.prometheus.engine_config import EngineConfig, from_cache_config
from connectors.prometheus.engines import engine_samples
from connectors.prometheus.readings import parse_exposition
from fake_engines import engine_page
from kavier_twin.catalog.models import find_model
from kavier_twin.daemon.unmodelled import FEATURES, UnmodelledFeatures, note_of
from kavier_twin.mirror.fidelity.trust import Trust
from kavier_twin.serve.assemble import spoiled
from kavier_twin.serve.metrics.exporter import registry_of
from kavier_twin.simulation.kpi_table import KPIS
from kavier_twin.telemetry import EngineSample, KvEventBatch
from serve.views import full_view

PLAIN = {"block_size": "16", "num_gpu_blocks": "1000", "sliding_window": "None", "mamba_block_size": "None"}


def samples_of(*series: str) -> list[EngineSample]:
    extra = ["vllm:" + one.replace("%s", 'engine="0",model_name="m"') for one in series]
    readings = parse_exposition(engine_page(extra=extra))
    return engine_samples(readings, pytest.fail, time_seconds=5.0, pool="chat", namespace="", pod="vllm-0")


def names_of(watch: UnmodelledFeatures, samples: list[EngineSample], *configs: EngineConfig) -> list[str]:
    return [feature.name for feature in watch.found(samples, configs)]


@pytest.mark.parametrize(
    ("series", "feature"),
    [
        ("spec_decode_num_drafts_total{%s} 10", "speculative_decoding"),
        ('lora_requests_info{max_lora="4",running_lora_adapters="a",waiting_lora_adapters=""} 1790000000', "lora"),
        ("external_prefix_cache_hits_total{%s} 400", "kv_transfer"),
        ('prompt_tokens_by_source_total{%s,source="external_kv_transfer"} 8000', "kv_transfer"),
    ],
)
def test_series_of_engines(series: str, feature: str) -> None:
    watch = UnmodelledFeatures(None, host_tier=False)
    assert names_of(watch, samples_of()) == []
    assert names_of(watch, samples_of(series)) == [feature]


def test_external_hits_are_modelled_where_the_fleet_has_a_tier() -> None:
    watch = UnmodelledFeatures(None, host_tier=True)
    assert names_of(watch, samples_of("external_prefix_cache_hits_total{%s} 400")) == []


@pytest.mark.parametrize(
    ("labels", "features"),
    [
        ({}, []),
        ({"sliding_window": "1024"}, ["sliding_window"]),
        ({"mamba_block_size": "528"}, ["state_layers"]),
        ({"effective_attention_block_size": "16"}, []),
        ({"effective_attention_block_size": "32", "kv_cache_size_tokens": "16000"}, ["context_parallel"]),
    ],
)
def test_settings_that_engines_tell(labels: dict[str, str], features: list[str]) -> None:
    (config,) = from_cache_config([PLAIN | labels]).values()
    assert names_of(UnmodelledFeatures(None, host_tier=False), [], config) == features


@pytest.mark.parametrize(
    ("version", "newer"),
    [("0.33.1", False), ("0.9.2", False), ("0.40.0rc1", True), ("1.0", True), ("dev", False)],
)
def test_a_version_after_the_newest_that_is_reproduced(version: str, newer: bool) -> None:
    watch = UnmodelledFeatures(None, host_tier=False)
    (sample,) = samples_of()
    expected = ["vllm_version"] if newer else []
    assert names_of(watch, [sample.model_copy(update={"vllm_version": version})]) == expected
    assert names_of(watch, [], EngineConfig(vllm_version=version)) == expected


@pytest.mark.parametrize(
    ("kind", "group", "features"),
    [
        ("full_attention", 0, []),
        ("mla_attention", 0, []),
        ("sliding_window", 1, ["sliding_window", "kv_cache_groups"]),
        ("chunked_local_attention", 0, ["sliding_window"]),
        ("mamba", 0, ["state_layers"]),
        ("sink_full_attention", 0, ["kv_cache_kind"]),
        (None, 2, ["kv_cache_groups"]),
    ],
)
def test_kinds_and_groups_of_kv_events(kind: str | None, group: int, features: list[str]) -> None:
    stored = {"type": "BlockStored", "block_hashes": [1], "block_size": 16, "group_idx": group}
    stored |= {} if kind is None else {"kv_cache_spec_kind": kind}
    batch = batch_of([5.0, [stored]])
    watch = UnmodelledFeatures(None, host_tier=False)
    watch.take(KvEventBatch(time_seconds=5.0, sequence=0, continues=True, events=batch.events))
    assert names_of(watch, []) == features


def test_the_model_of_the_settings() -> None:
    def of(model: str) -> list[str]:
        return names_of(UnmodelledFeatures(find_model(model), host_tier=False), [])

    assert of("openai/gpt-oss-20b") == of("google/gemma-3-27b") == ["sliding_window"]
    assert of("meta-llama/Llama-3.1-8B") == of("meta-llama/Llama-4-Scout-17B-16E-Instruct") == []


@pytest.mark.parametrize("name", FEATURES)
def test_what_a_feature_spoils_is_not_trusted_and_nothing_else_changes(name: str) -> None:
    what, _, spoils = FEATURES[name]
    assert set(spoils) <= KPIS.keys()
    view = replace(
        full_view(), trust={kpi: Trust(True) for kpi in KPIS}, trusted=True, untrusted_reasons=(), unmodelled=()
    )
    watch = UnmodelledFeatures(find_model("openai/gpt-oss-20b"), host_tier=False)
    (known,) = watch.found([], [])
    seen = spoiled(view, [replace(known, name=name, what=what, spoils=spoils)])
    untrusted = {kpi for kpi, trust in seen.trust.items() if not trust.trusted}
    assert untrusted >= set(spoils)
    observed = {entry.kpi for entry in view.errors}
    for kpi in untrusted:
        assert what in seen.trust[kpi].reason
        assert kpi in spoils or (kpi not in observed and KPIS[kpi].stand_in in untrusted)
    assert not (untrusted - set(spoils)) & observed
    assert not seen.trusted
    assert seen.untrusted_reasons == (f"not modelled: {what}",)
    assert seen.outlook is not None
    for policy in seen.outlook.policies:
        for horizon in policy.horizons:
            assert all(predicted.trusted == seen.trust[predicted.kpi].trusted for predicted in horizon.predicted)


def test_one_line_and_one_metric() -> None:
    watch = UnmodelledFeatures(find_model("openai/gpt-oss-20b"), host_tier=False)
    features = watch.found(samples_of("spec_decode_num_drafts_total{%s} 10"), [])
    (line,) = note_of(features)
    assert line.startswith("Not modelled: layers with a sliding window (")
    assert "speculative decoding (vllm:spec_decode_num_drafts_total)" in line
    view = replace(full_view(), unmodelled=features)
    registry = registry_of(lambda: {view.pool: view})
    for name in ("sliding_window", "speculative_decoding"):
        labels = {"pool": view.pool, "feature": name}
        assert registry.get_sample_value("kavier_twin_unmodelled_info", labels) == 1.0
    assert registry.get_sample_value("kavier_twin_unmodelled_info", {"pool": view.pool, "feature": "lora"}) is None
    assert note_of(()) == []
