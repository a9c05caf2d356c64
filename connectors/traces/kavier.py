"""Kavier's traces, CSV or Parquet: `session_id,turn_id,ts,num_input_tokens,num_output_tokens`.

Kavier documents no unit for `ts` and does not use it. Its example (turns of a session at 0.0, 1.0, 2.0) reads as
seconds, and so it is taken here. Its optional lists of token ids are not read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

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


class KavierReader(CsvReader):
    """The CSV form."""

    name = "kavier"
    expected = "CSV with the header session_id,turn_id,ts,num_input_tokens,num_output_tokens"
    numbered = True
    needed = NEEDED

    def record(self, index: int, row: dict[str, str]) -> RequestRecord:
        return request(
            id=str(index),
            time_seconds=since_start(parse_decimal(row["ts"], "ts"), "ts"),
            session=label(row.get("session_id", "").strip(), "session_id"),
            prompt_tokens=parse_whole(row["num_input_tokens"], "num_input_tokens"),
            output_tokens=parse_whole(row["num_output_tokens"], "num_output_tokens"),
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
                for batch in file.iter_batches(columns=sorted(names & (NEEDED | {"session_id"}))):
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
        return request(
            id=str(index),
            time_seconds=since_start(required(row, "ts"), "ts"),
            session=label(row.get("session_id"), "session_id"),
            prompt_tokens=required(row, "num_input_tokens"),
            output_tokens=required(row, "num_output_tokens"),
        )
