"""Metrics of the engines as they tell of themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import InfoMetricFamily
from prometheus_client.metrics_core import Metric

from kavier_twin.serve.metrics.families import PREFIX, add, gauge
from kavier_twin.serve.models import Engine


def engine_metrics(pool: str, engines: Sequence[Engine]) -> Iterator[Metric]:
    """Of the engines whose metrics are read."""
    info = InfoMetricFamily(
        f"{PREFIX}_engine",
        "Engine seen in metrics, with its model and, if known, its vLLM version. Always 1.",
        labels=["pool", "pod", "engine"],
    )
    ages = gauge(
        "engine_kv_block_seconds",
        "Mean age of KV blocks in seconds since the engine started, from vLLM's --kv-cache-metrics: "
        "lifetime (until eviction), idle_before_evict, reuse_gap (between two hits).",
        ["pool", "pod", "engine", "age"],
    )
    for engine in engines:
        info.add_metric([pool, engine.pod, engine.engine], {"model": engine.model, "vllm_version": engine.vllm_version})
        for age, seconds in engine.kv_block_seconds.items():
            add(ages, [pool, engine.pod, engine.engine, age], seconds)
    yield from (info, ages)
