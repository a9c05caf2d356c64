"""Trace files as telemetry: `read_trace` reads any of `FORMATS`, found by content or named."""

from __future__ import annotations

import os
from pathlib import Path

from connectors.traces.azure import AzureReader
from connectors.traces.base import Head, LineReader, Malformed, Reader, RejectedLine, Rejections, Trace, TraceError
from connectors.traces.base import open_bytes as _open_bytes
from connectors.traces.burstgpt import BurstGptReader
from connectors.traces.golden import GoldenReader
from connectors.traces.kavier import KavierParquetReader, KavierReader
from connectors.traces.llmservingsim import LlmServingSimReader
from connectors.traces.mooncake import MooncakeReader
from connectors.traces.recording import RecordingReader
from connectors.traces.table import RequestTable
from connectors.traces.telemetry import TelemetryReader
from kavier_twin.telemetry import RequestRecord, TelemetryRecord

__all__ = ["FORMATS", "RejectedLine", "Trace", "TraceError", "find_reader", "open_reader", "read_trace"]

FORMATS: dict[str, type[Reader]] = {
    reader.name: reader
    for reader in (
        TelemetryReader,
        MooncakeReader,
        GoldenReader,
        RecordingReader,
        LlmServingSimReader,
        AzureReader,
        BurstGptReader,
        KavierReader,
        KavierParquetReader,
    )
}
"""Every format by name, in the order in which they are tried."""

HEAD_LINES = 20
HEAD_BYTES = 2**20


def read_trace(path: str | os.PathLike[str], format: str | None = None) -> Trace:
    """Read a whole trace: a file (plain or gzip), or the directory of a golden run or a recording.

    Malformed lines are counted and told in the result. Raises TraceError if the format is unknown, the file cannot
    be read, or no line of it is valid.
    """
    try:
        reader = open_reader(Path(path), format)
        rejections = Rejections(reader.path)
        records = _read(reader, rejections)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror or error}); check the file and its disk") from None
    rejected = sorted(rejections.examples, key=lambda example: example.line)
    if not records:
        first = rejected[0] if rejected else None
        what = f"the first problem: line {first.line}, {first.reason}: {first.detail}" if first else "none in it"
        raise TraceError(
            f"{reader.path}: no request found as {reader.name} ({what}); expected {reader.expected}; "
            "correct the file, or name its format"
        )
    # The first in the file may not be the first to arrive.
    records.by_arrival(from_zero=reader.relative_times)
    return Trace(
        path=reader.path,
        format=reader.name,
        records=records,
        rejected=rejected,
        rejected_count=rejections.count,
        rejected_by_reason=rejections.by_reason,
        settings=reader.settings,
        hash_block_tokens=reader.hash_block_tokens,
        hashes_cover_output=reader.hashes_cover_output,
    )


def _read(reader: Reader, rejections: Rejections) -> RequestTable:
    """Every request of a file, each id once, in the order of the file."""
    records = RequestTable()
    if isinstance(reader, TelemetryReader):  # a request may be told by two lines, in any order
        rows: list[tuple[int, TelemetryRecord]] = []

        def keep(line: int, row: bytes) -> None:
            rows.append((line, reader.parse(row)))

        reader.each_row(keep, rejections.add)
        for record in reader.requests(rows, rejections.add):
            records.append(record)
        return records
    seen: set[str] = set()

    def take(line: int, row: object) -> None:
        record = reader.parse(row)
        if not isinstance(record, RequestRecord):
            return
        if not reader.numbered:
            if record.id in seen:
                raise Malformed("duplicate-id", "an earlier line has the same id")
            seen.add(record.id)
        records.append(record)

    reader.each_row(take, rejections.add)
    return records


def open_reader(path: Path, format: str | None = None) -> Reader:
    """The reader for a file or directory, by its content or by the format named. Raises TraceError, OSError."""
    if format is not None and format not in FORMATS:
        raise TraceError(f"{path}: there is no format {format!r}; the formats are {', '.join(FORMATS)}")
    named = FORMATS[format] if format is not None else None
    if path.is_dir():
        return _open_directory(path, named)
    if not path.exists():
        raise TraceError(f"{path}: no such file or directory; give the path of a trace")
    if not path.is_file():
        raise TraceError(f"{path}: not a regular file; copy its content into one")
    if path.stat().st_size == 0:
        raise TraceError(f"{path}: the file is empty; expected a trace in one of the formats {', '.join(FORMATS)}")
    found = named or find_reader(_head(path))
    if found is None:
        known = "; ".join(f"{name}: {reader.expected}" for name, reader in FORMATS.items())
        raise TraceError(f"{path}: unknown format; name the format if its first lines are damaged. Known are {known}")
    return found(path)


def find_reader(head: Head) -> type[Reader] | None:
    """The format that the beginning of a file looks like, or None."""
    return next((reader for reader in FORMATS.values() if reader.recognises(head)), None)


def _open_directory(path: Path, named: type[Reader] | None) -> Reader:
    readers = [named] if named else list(FORMATS.values())
    wanted, found = [], []
    for reader in readers:
        if reader.trace_file is None or reader.settings_file is None:
            continue
        wanted.append(f"{reader.name}: {reader.trace_file} (or .gz) and {reader.settings_file}")
        for name in (reader.trace_file, f"{reader.trace_file}.gz", f"{reader.trace_file}.gz.gz"):
            if (path / name).is_file() and (path / reader.settings_file).is_file():
                found.append((reader, path / name))
    if found:  # formats that name their files alike are told apart by content; damaged content is the first one's
        reader, file = next((pair for pair in found if pair[0].recognises(_head(pair[1]))), found[0])
        return reader(file)
    if not wanted:
        raise TraceError(f"{path}: a directory, but the format {readers[0].name} is a file; give the file's path")
    raise TraceError(f"{path}: a directory without the files of a trace; expected {'; '.join(wanted)}")


def _head(path: Path) -> Head:
    with _open_bytes(path) as stream:
        lines = LineReader(stream)
        found: list[bytes] = []
        size = 0
        ended = False
        while not ended and len(found) < HEAD_LINES and size < HEAD_BYTES:
            try:
                line = lines.next()
                if line is None:
                    ended = True
                    line = lines.rest() or b""
            except Malformed:
                continue
            size += len(line)
            if line.strip():
                found.append(line)
    with path.open("rb") as raw:
        return Head.of(raw.read(4), found)
