"""Golden runs: what vLLM's own scheduler decided under a virtual clock (`trace.jsonl` beside `scenario.json`).

Only the workload and the settings are read here; the decisions (`golden.jsonl`) are for whoever checks against them.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

from connectors.traces.base import (
    JsonReader,
    TraceError,
    hashes,
    label,
    request,
    required,
    setting_block_tokens,
    since_start,
)
from kavier_twin.telemetry import RequestRecord


class GoldenReader(JsonReader):
    """A request's id is its index in the trace, which is what golden.jsonl calls it."""

    name = "golden"
    expected = 'JSON lines {"arrival_seconds", "prompt_tokens", "output_tokens", "hash_ids"} beside a scenario.json'
    numbered = True
    marks = frozenset({"arrival_seconds", "prompt_tokens", "output_tokens"})
    trace_file = "trace.jsonl"
    settings_file = "scenario.json"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        scenario = path.parent / self.settings_file
        self.block_tokens = self.hash_block_tokens = setting_block_tokens(self.settings, "hash_block_tokens", scenario)
        cover = self.settings.get("hash_ids_cover")
        if cover not in ("prompt", "prompt+output"):
            raise TraceError(f'{scenario}: expected hash_ids_cover, "prompt" or "prompt+output"; set it')
        self.hashes_cover_output = cover == "prompt+output"

    def record(self, index: int, row: dict[str, Any]) -> RequestRecord:
        adapter = label(row.get("lora"), "lora")
        return request(
            id=str(index),
            time_seconds=since_start(required(row, "arrival_seconds"), "arrival_seconds"),
            session=label(row.get("session"), "session"),
            prompt_tokens=required(row, "prompt_tokens"),
            output_tokens=required(row, "output_tokens"),
            block_hashes=_separated(hashes(row.get("hash_ids")), adapter, label(row.get("cache_salt"), "cache_salt")),
            block_tokens=self.block_tokens,
            hashes_cover_output=self.hashes_cover_output,
            priority=row.get("priority", 0),
            adapter=adapter,
            skip_reading_prefix_cache=row.get("prompt_logprobs") is not None,
        )


def _separated(ids: tuple[Any, ...], adapter: str | None, salt: str | None) -> tuple[Any, ...]:
    """Hashes of the tokens, distinct by adapter and salt. Keys are chained, so the first hash carries both."""
    if not ids or (adapter is None and salt is None):
        return ids
    identity = repr((ids[0], adapter, salt)).encode()
    return (int.from_bytes(blake2b(identity, digest_size=8).digest()), *ids[1:])
