"""Kavier's traces, CSV or Parquet: `session_id,turn_id,ts,num_input_tokens,num_output_tokens`.

Kavier documents no unit for `ts` and does not use it. Its example (turns of a session at 0.0, 1.0, 2.0) reads as
seconds, and so it is taken here. The optional column `input_tokens` (a JSON list of token ids, or a list) tells which
prompts share a beginning: it is read as hashes of blocks of 16 tokens, vLLM's block size.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from connectors.traces.base import (
    CsvReader,
    Head,
    Malformed,
    Reader,
    TraceError,
    label,
    parse_decimal,
    parse_whole,
    request,
    required,
    since_start,
)
from kavier_twin.telemetry import RequestRecord

NEEDED = frozenset({"ts", "num_input_tokens", "num_output_tokens"})
BLOCK_TOKENS: Final = 16
_ROWS_WITH_TOKENS: Final = 256  # read at once: a row can hold 100,000 tokens

# A polynomial over the tokens of a block, modulo 2**64, in the multiplier of Knuth's MMIX generator.
_POWERS: Final = np.array([pow(6364136223846793005, place, 2**64) for place in range(BLOCK_TOKENS)], np.uint64)


def content(value: object, prompt_tokens: object) -> dict[str, Any]:
    """`block_hashes` and `block_tokens` from the prompt's token ids: a hash a full block. Raises Malformed."""
    if value is None or value == "" or not isinstance(prompt_tokens, int):
        return {}
    try:
        tokens = np.array(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, OverflowError):
        raise Malformed("bad-value", "input_tokens is not a list of whole numbers") from None
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise Malformed("bad-value", "input_tokens is not a list of whole numbers")
    blocks = max(min(tokens.size, prompt_tokens), 0) // BLOCK_TOKENS
    mixed = (tokens[: blocks * BLOCK_TOKENS].reshape(blocks, BLOCK_TOKENS).astype(np.uint64) + 1) * _POWERS
    sums = mixed.sum(axis=1, dtype=np.uint64)
    return {"block_hashes": tuple((sums ^ (sums >> np.uint64(32))).tolist()), "block_tokens": BLOCK_TOKENS}


class KavierReader(CsvReader):
    """The CSV form."""

    name = "kavier"
    expected = "CSV with the header session_id,turn_id,ts,num_input_tokens,num_output_tokens"
    numbered = True
    needed = NEEDED

    def record(self, index: int, row: dict[str, str]) -> RequestRecord:
        prompt = parse_whole(row["num_input_tokens"], "num_input_tokens")
        return request(
            id=str(index),
            time_seconds=since_start(parse_decimal(row["ts"], "ts"), "ts"),
            session=label(row.get("session_id", "").strip(), "session_id"),
            prompt_tokens=prompt,
            output_tokens=parse_whole(row["num_output_tokens"], "num_output_tokens"),
            **content(row.get("input_tokens", "").strip(), prompt),
        )


class KavierParquetReader(Reader):
    """The Parquet form. Needs pyarrow, which is loaded only here."""

    name = "kavier-parquet"
    expected = "Parquet with the columns session_id, turn_id, ts, num_input_tokens, num_output_tokens"
    numbered = True
    by_lines = False

    @classmethod
    def recognises(cls, head: Head) -> bool:
        return head.start == b"PAR1"

    def each_row(self, take: Callable[[int, Any], None], reject: Callable[[int, Malformed], None]) -> None:
        try:
            arrow = importlib.import_module("pyarrow")
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise TraceError(
                f"{self.path}: reading Parquet needs pyarrow; install it with: pip install 'kavier-twin[parquet]'"
            ) from None
        line = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                names = set(file.schema_arrow.names)
                if missing := NEEDED - names:
                    raise TraceError(
                        f"{self.path}: columns not found: {', '.join(sorted(missing))}; expected {self.expected}; "
                        "rename the columns"
                    )
                columns = sorted(names & (NEEDED | {"session_id", "input_tokens"}))
                for batch in file.iter_batches(batch_size=_ROWS_WITH_TOKENS, columns=columns):
                    for row in batch.to_pylist():
                        line += 1
                        try:
                            take(line, row)
                        except Malformed as what:
                            reject(line, what)
        except TraceError:
            raise
        except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
            if line == 0:
                raise TraceError(f"{self.path}: not a readable Parquet file; expected {self.expected}") from error
            reject(line + 1, Malformed("damaged-parquet", "the rows from here on cannot be read"))

    def parse(self, row: dict[str, Any]) -> RequestRecord:
        index = self.next_index()
        prompt = required(row, "num_input_tokens")
        return request(
            id=str(index),
            time_seconds=since_start(required(row, "ts"), "ts"),
            session=label(row.get("session_id"), "session_id"),
            prompt_tokens=prompt,
            output_tokens=required(row, "num_output_tokens"),
            **content(row.get("input_tokens"), prompt),
        )
