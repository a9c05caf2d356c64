"""LLMServingSim's benchmark of a real vLLM: `requests.jsonl` beside `meta.json`.

`queued_ts`, `scheduled_ts`, `first_token_ts` and `last_token_ts` are seconds of vLLM's monotonic clock; the arrival is
`queued_ts`, because `arrival_time` is another clock's. Prompt content is not told: no request shares anything.
"""

from __future__ import annotations

from typing import Any

from connectors.traces.base import JsonReader, finite, label, request, required
from kavier_twin.telemetry import RequestRecord


class LlmServingSimReader(JsonReader):
    """Times count from the first request."""

    name = "llmservingsim"
    expected = 'JSON lines {"request_id", "input_toks", "output_toks", "queued_ts", ...} beside a meta.json'
    marks = frozenset({"input_toks", "output_toks", "queued_ts", "first_token_ts", "last_token_ts"})
    trace_file = "requests.jsonl"
    settings_file = "meta.json"
    relative_times = True

    def record(self, index: int, row: dict[str, Any]) -> RequestRecord:
        queued, first, last = (
            finite(required(row, name), name) for name in ("queued_ts", "first_token_ts", "last_token_ts")
        )
        scheduled = row.get("scheduled_ts")
        return request(
            id=label(row.get("request_id"), "request_id") or str(index),
            time_seconds=queued,
            prompt_tokens=required(row, "input_toks"),
            output_tokens=required(row, "output_toks"),
            ttft_seconds=first - queued,
            e2e_seconds=last - queued,
            queue_seconds=None if scheduled is None else finite(scheduled, "scheduled_ts") - queued,
        )
