"""What a recording's server said of itself, as rows to calibrate on: its log of steps, and its counters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from connectors.traces.recording import read_metrics, read_steps
from kavier_twin.errors import UserError
from kavier_twin.mirror.calibration.steps import Counted, StepLog
from kavier_twin.simulation.settings import EngineSettings

_LOCAL = {"source": "local_compute"}
_SERIES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "steps": ("vllm:iteration_tokens_total_count", {}),
    "prefill_tokens": ("vllm:prompt_tokens_by_source_total", _LOCAL),
    "decode_tokens": ("vllm:inter_token_latency_seconds_count", {}),
    "latency_seconds": ("vllm:inter_token_latency_seconds_sum", {}),
    "usage": ("vllm:kv_cache_usage_perc", {}),
}


def logged_steps(directory: Path, engine: EngineSettings, share: float) -> StepLog:
    """The first share of the logged steps. Raises UserError, TraceError."""
    rows = read_steps(directory)
    rows = rows[: round(share * len(rows))]
    columns = ("prefill_requests", "prefill_tokens", "decode_requests", "kv_usage_percent", "elapsed_ms")
    try:
        values = np.array([[float(row[name]) for name in columns] for row in rows]).reshape(-1, len(columns)).T
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: the step log lacks a number in {error}; expected {', '.join(columns)}") from None
    requests, prefill, decode, usage, milliseconds = values
    return StepLog(requests, prefill, decode, usage / 100.0 * _capacity_tokens(engine), milliseconds / 1000.0)


def counted(directory: Path, engine: EngineSettings, share: float) -> Counted:
    """Differences between successive scrapes of the first share of the time. Raises UserError, TraceError."""
    scrapes = read_metrics(directory)
    if scrapes:
        begin, end = scrapes[0][0], scrapes[-1][0]
        scrapes = [scrape for scrape in scrapes if scrape[0] <= begin + share * (end - begin)]
    values = np.array([[found.get(name, np.nan) for name in _SERIES] for found in map(_sums, (t for _, t in scrapes))])
    if values.size and not np.isfinite(values).any(axis=0).all():
        missing = [
            series
            for (series, _), known in zip(_SERIES.values(), np.isfinite(values).any(axis=0), strict=True)
            if not known
        ]
        raise UserError(f"{directory}: the scrapes lack {', '.join(missing)}; calibrate from requests or steps")
    difference = np.diff(values.reshape(-1, len(_SERIES)), axis=0)
    usage = values.reshape(-1, len(_SERIES))[:, -1]
    rising = (difference[:, :4] >= 0.0).all(axis=1)  # a counter that falls was reset: that window tells nothing
    steps, prefill, decode, latency, _ = difference[rising].T
    context = 0.5 * (usage[1:] + usage[:-1])[rising] * _capacity_tokens(engine)
    return Counted(steps, prefill, decode, context, latency)


def _sums(text: str) -> dict[str, float]:
    """The series wanted, summed over engines (usage: their mean)."""
    found: dict[str, list[float]] = {}
    wanted: dict[str, Any] = {series: (name, labels) for name, (series, labels) in _SERIES.items()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in wanted:
                name, labels = wanted[sample.name]
                if all(sample.labels.get(key) == value for key, value in labels.items()):
                    found.setdefault(name, []).append(sample.value)
    return {name: float(np.mean(values) if name == "usage" else np.sum(values)) for name, values in found.items()}


def _capacity_tokens(engine: EngineSettings) -> int:
    return (engine.num_gpu_blocks - 1) * engine.block_size
