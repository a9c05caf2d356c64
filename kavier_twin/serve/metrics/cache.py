"""Mirrored KV caches compared with real ones, as metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from prometheus_client.metrics_core import Metric

from kavier_twin.serve.metrics.families import gauge
from kavier_twin.serve.models import CacheAgreement

_LABELS: Final = ["pool", "pod", "engine"]


def cache_metrics(pool: str, caches: tuple[CacheAgreement, ...]) -> Iterator[Metric]:
    """Of each engine whose KV events are read."""
    agreement = gauge(
        "kv_cache_agreement_ratio",
        "Blocks in both the real and the mirrored cache divided by blocks in either, according to KV "
        "events. Changes within the last 0.25 s are tolerated. No sample if the stream's block hashes "
        "are not vLLM's.",
        _LABELS,
    )
    blocks = gauge(
        "kv_cache_blocks",
        "Number of cached blocks by where they are cached: both, only_mirrored, only_real.",
        [*_LABELS, "where"],
    )
    filled = gauge(
        "kv_cache_filled_blocks",
        "Number of blocks that the mirrored cache took over from the real one at the start.",
        _LABELS,
    )
    for cache in caches:
        labels = [pool, cache.pod, cache.engine]
        if math.isfinite(cache.agreement_ratio):
            agreement.add_metric(labels, cache.agreement_ratio)
            for where in ("both", "only_mirrored", "only_real"):
                blocks.add_metric([*labels, where], getattr(cache, where))
        if cache.filled is not None:
            filled.add_metric(labels, cache.filled)
    yield from (agreement, blocks, filled)
