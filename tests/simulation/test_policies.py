"""What is deployable, and what is told about the rest."""

from __future__ import annotations

import pytest

from kavier_twin.simulation.policies import Override, apply_overrides, hypothetical_reasons, vllm_flags
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime

BASE = FleetSettings(engine=EngineSettings(num_gpu_blocks=1000), step_time=StepTime(fixed=0.01, per_context_token=1e-6))


@pytest.mark.parametrize(
    ("overrides", "flags"),
    [
        ({}, []),
        ({"max_num_seqs": 8, "prefix_caching": False}, ["--max-num-seqs 8", "--no-enable-prefix-caching"]),
        ({"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype fp8"]),  # and with it the step time, by itself
        ({"kv_cache_dtype": "fp8", "num_gpu_blocks": 1500}, ["--num-gpu-blocks-override 1500", "--kv-cache-dtype fp8"]),
        ({"eviction_ttl_seconds": 5.0}, []),  # says nothing under LRU
    ],
)
def test_deployable(overrides: dict[str, Override], flags: list[str]) -> None:
    changed = apply_overrides(BASE, overrides)
    assert hypothetical_reasons(BASE, changed) == []
    assert vllm_flags(BASE, changed) == flags


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"eviction": "arc", "max_num_seqs": 8}, "eviction=arc: vLLM's GPU tier has LRU only"),
        ({"router": "round_robin"}, "router=round_robin: "),
        ({"replicas": "3x"}, "replicas=3: "),
        ({"step_time.fixed": "0.5x"}, "step_time.fixed=0.005: "),
    ],
)
def test_hypothetical(overrides: dict[str, Override], reason: str) -> None:
    (told,) = hypothetical_reasons(BASE, apply_overrides(BASE, overrides))
    assert told.startswith(reason)
