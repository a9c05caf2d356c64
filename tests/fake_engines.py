"""`/metrics` pages as vLLM servers of several versions, and what stands before them, would give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_server import Pages

GAUGES: Final = {"num_requests_running": 5.0, "num_requests_waiting": 1.0, "kv_cache_usage_perc": 0.25}
COUNTERS: Final = {
    "prefix_cache_queries": 8_000.0,
    "prefix_cache_hits": 2_000.0,
    "num_preemptions": 0.0,
    "prompt_tokens": 8_000.0,
    "generation_tokens": 800.0,
}
HISTOGRAMS: Final = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
)
OF_2024: Final = ("time_to_first_token_seconds", "time_per_output_token_seconds")
"""The histograms of vLLM 0.6."""


def engine_page(
    labels: Mapping[str, str] | None = None,
    *,
    prefix: str = "vllm:",
    totals: Iterable[str] = ("_total",),
    histograms: Iterable[str] = HISTOGRAMS,
    finished: bool = True,
    extra: Iterable[str] = (),
) -> str:
    """An engine with 5 requests running, 1 waiting and 8 finished. `totals`: the endings of counters' names."""
    own = {"engine": "0", "model_name": "m", **(labels or {})}
    lines = [f"{prefix}{name}{_written(own)} {value}" for name, value in GAUGES.items()]
    for ending in totals:
        lines += [f"{prefix}{name}{ending}{_written(own)} {value}" for name, value in COUNTERS.items()]
        if finished:
            lines.append(f"{prefix}request_success{ending}{_written({**own, 'finished_reason': 'stop'})} 8")
    for name in histograms:
        lines.append(f"{prefix}{name}_bucket{_written({**own, 'le': '1.0'})} 8")
        lines.append(f"{prefix}{name}_bucket{_written({**own, 'le': '+Inf'})} 8")
        lines += [f"{prefix}{name}_sum{_written(own)} 4", f"{prefix}{name}_count{_written(own)} 8"]
    return "\n".join([*lines, *extra, ""])


def serve_page(page: str, **others: str) -> Pages:
    """A server with the page at `/metrics`, and what else is asked for, as JSON, by path without its slash."""

    def answer(path: str, _: object) -> tuple[int, str, bytes]:
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4", page.encode()
        found = others.get(path.strip("/"))
        return (404, "text/plain", b"") if found is None else (200, "application/json", found.encode())

    return Pages(answer)


def _written(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
