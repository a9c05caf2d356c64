"""Metrics of KV caches: mirrored ones compared with real ones, what their size is worth, why they missed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from prometheus_client.metrics_core import Metric

from kavier_twin.reuse.curve import SHOWN_FACTORS
from kavier_twin.serve.metrics.families import add, counter, gauge
from kavier_twin.serve.models import CacheAgreement, PrefixCache

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


def prefix_cache_metrics(pool: str, cache: PrefixCache) -> Iterator[Metric]:
    """Of a pool whose requests tell their block hashes."""
    curve = gauge(
        "prefix_cache_capacity_hit_ratio",
        "Share of the prompt tokens of the last hour that a KV cache would have hit whose size is this multiple of "
        "the current one (LRU stack distances).",
        ["pool", "capacity"],
    )
    for point in cache.curve:
        if point.factor in SHOWN_FACTORS:
            add(curve, [pool, f"{point.factor:g}"], point.hit_ratio)
    yield curve
    yield counter(
        "missed_prompt_tokens",
        "Number of prompt tokens of finished requests that were not in the prefix cache, by reason: first_seen, "
        "evicted, other_replica, computing (by a request that was still running), partial_block, lost (in a "
        "restart), caching_off.",
        ["pool", "reason"],
        [([pool, reason], tokens) for reason, tokens in cache.missed_tokens.items()],
    )
