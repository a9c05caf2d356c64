"""What is said of engines whose metrics lack something or tell of what is not modelled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from connectors.prometheus.engines import engine_samples
from connectors.prometheus.readings import parse_exposition
from daemon.test_daemon import until
from fake_engines import OF_2024, engine_page, serve_page
from kavier_twin.daemon.config import read_settings
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.engine_notes import FORGET_SECONDS, EngineNotes, unmatched_caches
from kavier_twin.mirror.replicas import Replica
from kavier_twin.serve.models import CacheAgreement
from kavier_twin.telemetry import EngineSample
from prometheus_server import Pages


def notes_of(page: str, *, alone: bool = True, host_tier: bool = False) -> list[str]:
    notes = EngineNotes("chat", alone=alone, host_tier=host_tier)
    for sample in samples_of(page):
        notes.take(sample)
    return notes.notes()


def samples_of(page: str) -> list[EngineSample]:
    readings = parse_exposition(page)
    return engine_samples(readings, pytest.fail, time_seconds=5.0, pool="chat", namespace="", pod="vllm-0")


def test_of_an_engine_like_all_others_there_is_nothing_to_say() -> None:
    assert notes_of(engine_page()) == []


def test_series_without_which_nothing_can_be_made_up_are_named() -> None:
    page = engine_page(histograms=OF_2024, finished=False)
    needed, guessed = notes_of(page)
    assert needed.startswith(
        "vllm-0: no series vllm:request_success_total or vllm:e2e_request_latency_seconds. Without them requests cannot"
    )
    assert "vllm:request_prompt_tokens, vllm:request_generation_tokens, vllm:iteration_tokens_total" in guessed
    assert notes_of(page, alone=False) == []  # records tell of the requests


def test_an_engine_that_has_not_worked_yet_lacks_nothing() -> None:
    """Some exporters show a series only once it has a value."""
    assert notes_of('ray_vllm_num_requests_running{engine="0"} 0\n') == []


def test_two_models_in_a_pool_and_how_to_choose_one() -> None:
    (note,) = notes_of(engine_page({"model_name": "a"}) + engine_page({"model_name": "b"}))
    assert note.startswith("The pool's engines serve 2 models, a, b")
    assert "engines: {model_name: ...}" in note


@pytest.mark.parametrize(
    ("series", "words"),
    [
        (
            (
                'prompt_tokens_by_source_total{%s,source="local_compute"} 0',
                'prompt_tokens_by_source_total{%s,source="external_kv_transfer"} 8000',
            ),
            ("100%", "disaggregation", "not modelled"),
        ),
        (("external_prefix_cache_hits_total{%s} 4000",), ("50%", "not modelled")),
        (
            ("spec_decode_num_drafts_total{%s} 10", "spec_decode_num_accepted_tokens_total{%s} 16"),
            ("2.60 tokens a step",),
        ),
        (('engine_sleep_state{%s,sleep_state="discard_all"} 1',), ("sleeps", "not modelled")),
        (
            ("kv_offload_load_bytes_total{%s} 4e9", "kv_offload_load_time_total{%s} 0.5"),
            ("8.0 GB/s", "set fleet.engine.host_tier"),
        ),
    ],
)
def test_what_is_not_modelled_is_said(series: tuple[str, ...], words: tuple[str, ...]) -> None:
    extra = ["vllm:" + one.replace("%s", 'engine="0",model_name="m"') for one in series]
    (note,) = notes_of(engine_page(extra=extra), alone=False)
    assert note.startswith("vllm-0")
    assert all(word in note for word in words), note


def test_transfers_from_a_host_tier_that_the_fleet_has_are_modelled() -> None:
    extra = ['vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 4000']
    assert notes_of(engine_page(extra=extra), host_tier=True) == []


def test_another_version_is_logged_and_engines_that_are_gone_are_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    notes = EngineNotes("chat", alone=True)
    (sample,) = samples_of(engine_page())
    notes.take(sample.model_copy(update={"vllm_version": "0.32.0"}))
    notes.take(sample.model_copy(update={"vllm_version": None}))
    assert caplog.messages == []
    notes.take(sample.model_copy(update={"vllm_version": "0.32.0"}))
    notes.take(sample.model_copy(update={"vllm_version": "0.33.0"}))
    assert caplog.messages == ["pool chat: vllm-0 now runs vLLM 0.33.0 (was 0.32.0)"]
    assert [(engine.pod, engine.vllm_version) for engine in notes.engines()] == [("vllm-0", "0.33.0")]
    notes.take(sample.model_copy(update={"pod": "vllm-1", "time_seconds": 6.0 + FORGET_SECONDS}))
    assert [engine.pod for engine in notes.engines()] == ["vllm-1"]


def test_kv_events_that_fit_no_replica_are_told_of() -> None:
    def replica(number: int, pod: str) -> Replica:
        return Replica(number, pod, "serving", 0, 0, 0.0, 0.0, 0, 0, 0)

    caches = [CacheAgreement("10.42.0.7:8000", "0"), CacheAgreement("vllm-1", "0")]
    (note,) = unmatched_caches(caches, [replica(0, "vllm-0"), replica(1, "vllm-1")])
    assert note.startswith("KV events come from 10.42.0.7:8000, but the replicas are called vllm-0, vllm-1")
    assert "set pod on the kv_events source" in note
    assert unmatched_caches(caches, [replica(0, "vllm-0")]) == []  # the only one is taken for the engine's
    assert unmatched_caches(caches[1:], [replica(0, "vllm-0"), replica(1, "vllm-1")]) == []
    (note,) = unmatched_caches(caches, [replica(0, ""), replica(1, "")])
    assert "no record or metric says which replica is which pod" in note


@pytest.fixture
def hybrid() -> Iterator[Pages]:
    labels = 'block_size="8",num_gpu_blocks="320",kv_cache_size_tokens="463459",kv_cache_max_concurrency="1.77"'
    info = f'vllm:cache_config_info{{engine="0",mamba_block_size="16",enable_prefix_caching="True",{labels}}} 1'
    page = engine_page({"model_name": "a"}, extra=[info]) + engine_page({"model_name": "b"})
    server = serve_page(page, version='{"version": "0.32.0"}')
    yield server
    server.close()


def test_the_status_and_the_metrics_show_them(hybrid: Pages, tmp_path: Path) -> None:
    """A hybrid model's capacity is adopted in tokens, and the notes say why."""
    content: dict[str, Any] = {
        "pool": "p",
        "fleet": {"hardware": {"gpu": "H100 SXM 80GB", "model": "Llama-3.1-8B"}},
        "sources": [
            {"type": "vllm_metrics", "interval_seconds": 0.2, "engines": [{"url": hybrid.url, "pod": "vllm-0"}]}
        ],
        "http": {"port": 0},
    }
    path = tmp_path / "twin.yaml"
    path.write_text(yaml.safe_dump(content))
    daemon = Daemon.of(read_settings(path))
    daemon.start()
    try:
        until(lambda: len(daemon.view.notes) >= 3, "the notes are shown")
        capacity, unmodelled, models = daemon.view.notes[:3]
        assert unmodelled.startswith("Not modelled: layers that keep a state (mamba_block_size")
        assert not daemon.view.trust["prefix_cache_hit_ratio"].trusted
        assert [feature.name for feature in daemon.view.unmodelled] == ["state_layers"]
        assert "num_gpu_blocks 320 times block_size 8 is not kv_cache_size_tokens 463459" in capacity
        assert models.startswith("The pool's engines serve 2 models, a, b")
        engine = daemon.pools["p"].mirror.fleet.settings.engine
        assert engine.block_size * engine.num_gpu_blocks == pytest.approx(463_459, rel=1e-3)
        assert {seen.vllm_version for seen in daemon.view.engines} == {"0.32.0"}
    finally:
        daemon.stop()
