"""A trace file followed as it grows."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from connectors.dead_letters import Letters
from connectors.traces import FORMATS, TraceError, find_reader, open_reader
from connectors.traces.base import Head, LineReader, Malformed, Reader, open_bytes
from kavier_twin.telemetry import TelemetryRecord

log = logging.getLogger(__name__)

SPARE_LINES = 10_000
"""Lines without a record that one poll goes through beyond the records asked for, so that it always comes back."""


class FollowFile:
    """The records of a line-based trace file: those there now, then those appended, like `tail -F`.

    A last line is left until its newline comes, and a file that is not there yet is waited for. When the file is
    replaced (rotation) or cut (truncation), reading goes on at the beginning of what is there then; request indices
    and relative times run on, and a last line that lost its end is rejected as "cut-line". A file cut and refilled
    beyond the reading position between two polls looks like one that grew: no follower can tell. Records come in the
    file's order and as they are: two with one id, or an arrival without its end, are for the reader to make sense of.

    With `follow=False` the file is read to its end, and the source is then exhausted; it may be gzip.
    Raises TraceError for a format unknown or not made of lines, and for missing settings beside the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        format: str | None = None,
        *,
        follow: bool = True,
        name: str | None = None,
        dead_letters: Letters | None = None,
    ) -> None:
        self.path = Path(path)
        self.last_record_seconds: float | None = None
        self.exhausted = False
        self._follow = follow
        self._dead_letters = dead_letters
        self._rejected: dict[str, int] = {}
        self._stream: BinaryIO | None = None
        self._lines: LineReader | None = None
        self._drained = False  # whether a replaced file was read once more after the replacement was noticed
        self.trouble = ""
        self._reader = self._known_reader(format)
        self.name = name or f"file:{self.path.name}"

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        """At most `max_records` of the records there now. Trouble with the file is logged, once for each kind."""
        records: list[TelemetryRecord] = []
        for _ in range(max_records + SPARE_LINES):
            if len(records) >= max_records or self.exhausted:
                break
            line = b""
            try:
                found = self._next_line()
                if found is None:
                    break
                line = found
                record = self._parse(line) if line.strip() else None
            except Malformed as what:
                self._reject(what, len(line))
                continue
            except OSError as error:
                self._report(error)
                break
            if record is not None:
                records.append(record)
                newest = self.last_record_seconds
                self.last_record_seconds = record.time_seconds if newest is None else max(newest, record.time_seconds)
        return records

    def rejected(self) -> Mapping[str, int]:
        return dict(self._rejected)

    def positions(self) -> dict[str, Any]:
        if self._stream is None or self._lines is None:
            return {}
        return {
            "offset_bytes": self._stream.tell() - self._lines.pending_bytes,
            "line": self._lines.line,
            "file": _identity(self._stream),
            "format": self._reader.name if self._reader else None,
            "reader": self._reader.save() if self._reader else None,
            "rejected": self._rejected,
            "last_record_seconds": self.last_record_seconds,
        }

    def seek(self, positions: dict[str, Any]) -> None:
        if not positions:
            return
        self._rejected = dict(positions["rejected"])
        self.last_record_seconds = positions["last_record_seconds"]
        try:
            stream = self.path.open("rb") if self._follow else open_bytes(self.path)
            there = stream.seek(0, os.SEEK_END) if self._follow else positions["offset_bytes"]
            if _identity(stream) != positions["file"] or there < positions["offset_bytes"]:
                stream.close()
                raise OSError("it was replaced or cut since the checkpoint; it is read from its beginning")
            stream.seek(positions["offset_bytes"])
        except OSError as error:
            self._report(error)
            return
        if positions["format"] is not None:
            self._reader = self._reader or FORMATS[positions["format"]](self.path)
            self._reader.restore(positions["reader"])
        self._stream, self._lines = stream, LineReader(stream, positions["line"])

    def close(self) -> None:
        self.exhausted = True
        self._close_stream()
        if self._dead_letters:
            self._dead_letters.close()

    def _known_reader(self, format: str | None) -> Reader | None:
        """The reader, as far as it can be told before the first line is there."""
        if self.path.is_dir() or not self._follow:
            try:
                reader = open_reader(self.path, format)
            except OSError as error:
                raise TraceError(f"{self.path}: cannot be read ({error.strerror}); check its permissions") from None
            self.path = reader.path
        elif format is None:
            return None
        elif format not in FORMATS:
            raise TraceError(f"{self.path}: there is no format {format!r}; the formats are {', '.join(FORMATS)}")
        else:
            reader = FORMATS[format](self.path)
        if not reader.by_lines:
            raise TraceError(f"{self.path}: {reader.name} is not made of lines and cannot be followed; read it whole")
        return reader

    def _parse(self, line: bytes) -> TelemetryRecord | None:
        if self._reader is None:
            reader = find_reader(Head.of(line[:4], [line]))
            if reader is None:
                raise Malformed("unknown-format", f"like none of the formats {', '.join(FORMATS)}")
            try:
                self._reader = reader(self.path)
            except TraceError as error:
                raise Malformed("unknown-format", str(error)) from None
        return self._reader.parse(line)

    def _next_line(self) -> bytes | None:
        """The next line, or None if there is none now. Raises Malformed, OSError."""
        while True:
            if self._stream is None or self._lines is None:
                if self.path.exists() and not self.path.is_file():
                    raise OSError(f"{self.path} is not a regular file")  # opening a pipe would wait
                self._stream = self.path.open("rb") if self._follow else open_bytes(self.path)
                self._lines = LineReader(self._stream)
                self.trouble = ""
            line = self._lines.next()
            if line is not None:
                return line
            if not self._follow:
                self.exhausted = True
                return self._lines.rest()
            if not self._begins_anew():
                return None

    def _begins_anew(self) -> bool:
        """At the end of what is there: whether to read on because the file was replaced or cut."""
        assert self._stream is not None
        assert self._lines is not None
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False  # moved away; its writer may still append to it until the new one is made
        here = os.fstat(self._stream.fileno())
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            if not self._drained:  # what was appended between the last read and the replacement
                self._drained = True
                return True
        elif here.st_size >= self._stream.tell():  # not cut
            return False
        self._close_stream()
        self._drained = False
        if self._reader:
            self._reader.restart()
        if self._lines.rest() is not None:
            raise Malformed("cut-line", "the file was replaced or cut before the end of the line came")
        return True

    def _reject(self, what: Malformed, length: int) -> None:
        self._rejected[what.reason] = self._rejected.get(what.reason, 0) + 1
        if self._dead_letters:
            line = self._lines.line if self._lines else 0
            self._dead_letters.write({"file": str(self.path), "line": line}, what, length)

    def _report(self, error: OSError) -> None:
        trouble = str(error)
        if trouble != self.trouble:
            log.warning("source %s: %s", self.name, trouble)
            self.trouble = trouble

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _identity(stream: BinaryIO) -> list[int]:
    """Which file it is, whatever it is called by now."""
    status = os.fstat(stream.fileno())
    return [status.st_dev, status.st_ino]
