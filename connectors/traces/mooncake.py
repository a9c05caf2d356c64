"""Mooncake's JSONL traces: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (512-token blocks)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from connectors.traces.base import JsonReader, hashes, request, required, since_start
from kavier_twin.telemetry import RequestRecord

BLOCK_TOKENS = 512


class MooncakeReader(JsonReader):
    """The hashes cover the prompt, the last one possibly in part; outputs are the requests' own."""

    name = "mooncake"
    expected = 'JSON lines {"timestamp": ms, "input_length", "output_length", "hash_ids"}'
    numbered = True
    marks = frozenset({"timestamp", "input_length", "output_length"})

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.hash_block_tokens = BLOCK_TOKENS

    def record(self, index: int, row: dict[str, Any]) -> RequestRecord:
        return request(
            id=str(index),
            time_seconds=since_start(required(row, "timestamp"), "timestamp") / 1000.0,
            prompt_tokens=required(row, "input_length"),
            output_tokens=required(row, "output_length"),
            block_hashes=hashes(row.get("hash_ids")),
            block_tokens=BLOCK_TOKENS,
        )
