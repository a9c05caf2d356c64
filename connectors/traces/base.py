"""What all trace readers share: lines, what is wrong with them, and the interface of a reader."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar, cast

from pydantic import ValidationError

from connectors.traces.table import RequestTable
from kavier_twin.errors import refusal
from kavier_twin.telemetry import RequestRecord, RequestSeen, TelemetryRecord

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is malformed: no request needs it, and one endless line must not fill the memory."""

MAX_REJECTED_EXAMPLES = 1000
GZIP_MAGIC = b"\x1f\x8b"

Arrival = TypeVar("Arrival", bound=RequestSeen)


class TraceError(ValueError):
    """A trace that cannot be read at all. The message names the file, what was expected and the way out."""


class Malformed(ValueError):
    """One line that is not what its format says.

    `reason` is a short category to count by. `detail` says more but never quotes the line: it could hold a prompt.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """A line that made no record. `line` counts from 1 (in Parquet it is the row)."""

    file: Path
    line: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests of one file, by arrival (`time_seconds`, seconds since the start of the trace).

    Requests that arrive together keep the order of the file. Where the format has no ids, a request's id is its
    index in the file, from 0, malformed lines counted. `rejected` holds the first malformed lines only;
    `rejected_count` and `rejected_by_reason` count all. `settings` is what the file beside the trace says (golden:
    scenario.json, recording: meta.json). `hash_block_tokens` is None where the trace has no hashes, or not one size.
    """

    path: Path
    format: str
    records: RequestTable
    rejected: list[RejectedLine]
    rejected_count: int
    rejected_by_reason: dict[str, int]
    settings: dict[str, Any]
    hash_block_tokens: int | None
    hashes_cover_output: bool


@dataclass(slots=True)
class Rejections:
    """Counts every malformed line and keeps the first few."""

    file: Path
    examples: list[RejectedLine] = field(default_factory=list)
    by_reason: dict[str, int] = field(default_factory=dict)

    def add(self, line: int, what: Malformed) -> None:
        self.by_reason[what.reason] = self.by_reason.get(what.reason, 0) + 1
        if len(self.examples) < MAX_REJECTED_EXAMPLES:
            self.examples.append(RejectedLine(self.file, line, what.reason, what.detail))

    @property
    def count(self) -> int:
        return sum(self.by_reason.values())


# --- lines --------------------------------------------------------------------------------------------------------


class LineReader:
    """Hands out the complete lines of a byte stream, also of one that still grows."""

    def __init__(self, stream: BinaryIO, line: int = 0) -> None:
        self.line = line  # number of the line handed out last, from 1
        self._stream = stream
        self._tail = bytearray()
        self._too_long = False
        self._damaged = False

    def next(self) -> bytes | None:
        """The next complete line, or None where there is none (yet). Raises Malformed and can go on after it."""
        while not self._damaged:
            try:
                piece = self._stream.readline(MAX_LINE_BYTES)
            except (EOFError, zlib.error, gzip.BadGzipFile):
                self._damaged = True
                self._tail.clear()
                self.line += 1
                raise Malformed("damaged-gzip", "the compressed data is cut short or corrupt from here on") from None
            if not piece:
                break
            self._tail += piece
            if len(self._tail) > MAX_LINE_BYTES:
                self._too_long = True
                self._tail.clear()
            if piece.endswith(b"\n"):
                return self._take()
        return None

    @property
    def pending_bytes(self) -> int:
        """Read already, of a line that is not complete."""
        return len(self._tail)

    def rest(self) -> bytes | None:
        """What stands after the last newline, taken as a line, or None if nothing does."""
        return self._take() if self._tail or self._too_long else None

    def _take(self) -> bytes:
        line, too_long = bytes(self._tail), self._too_long
        self._tail.clear()
        self._too_long = False
        self.line += 1
        if too_long:
            raise Malformed("too-long", f"more than {MAX_LINE_BYTES} bytes")
        return line


class _Unpacked(gzip.GzipFile):
    """Unpacks a stream, and closes it in the end."""

    def __init__(self, packed: BinaryIO) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self._packed = packed

    def close(self) -> None:
        super().close()
        self._packed.close()


def open_bytes(path: Path) -> BinaryIO:
    """Open for reading, unpacking gzip by its first bytes, whatever the name, also twice. Raises OSError."""
    stream = path.open("rb")
    for _ in range(2):
        try:
            packed = stream.peek(2)[:2] == GZIP_MAGIC
        except (EOFError, zlib.error, gzip.BadGzipFile):  # whoever reads finds the damage, too
            break
        if packed:
            stream = cast(BufferedReader, _Unpacked(stream))
    return stream


def each_line(path: Path, take: Callable[[int, bytes], None], reject: Callable[[int, Malformed], None]) -> None:
    """Give every non-empty line with its number to `take`; what that or the reading finds malformed to `reject`."""
    with open_bytes(path) as stream:
        lines = LineReader(stream)
        ended = False
        while not ended:
            try:
                line = lines.next()
                if line is None:
                    ended = True
                    line = lines.rest()
                if line is not None and line.strip():
                    take(lines.line, line)
            except Malformed as what:
                reject(lines.line, what)


# --- values -------------------------------------------------------------------------------------------------------


def decode(line: bytes) -> str:
    """The text of a line, without its end and a byte order mark."""
    try:
        return line.rstrip(b"\r\n").decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise Malformed("not-utf8", f"byte {error.start}") from None


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that a line holds."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise Malformed("not-json", f"{error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, nesting of thousands of levels
        raise Malformed("not-json", type(error).__name__) from None
    if not isinstance(value, dict):
        raise Malformed("not-an-object", f"expected a JSON object, found {type(value).__name__}")
    return value


def required(row: Mapping[str, Any], name: str) -> Any:
    """A field that must be there and not null."""
    value = row.get(name)
    if value is None:
        raise Malformed("missing-field", name)
    return value


def finite(value: object, name: str) -> float:
    """A number that is one (bool is none) and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed("bad-value", f"{name} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Malformed("bad-value", f"{name} is not finite")
    return number


def since_start(value: object, name: str) -> float:
    """A time that counts from the start of the trace: finite, not negative."""
    number = finite(value, name)
    if number < 0.0:
        raise Malformed("bad-value", f"{name} is negative")
    return number


def parse_whole(text: str, name: str) -> int:
    """A non-negative whole number from text. Stricter than int(): no sign, no underscores, no other digits."""
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise Malformed("bad-value", f"{name} is not a non-negative whole number")
    return int(text)


def parse_decimal(text: str, name: str) -> float:
    """A finite number from text."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if "_" in text or not math.isfinite(number):
        raise Malformed("bad-value", f"{name} is not a finite number")
    return number


def label(value: object, name: str) -> str | None:
    """An optional name (empty text is none), which some writers give as a number."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**64:
        raise Malformed("bad-value", f"{name} is neither text nor a whole number of 64 bits")
    return str(value)


def hashes(value: object, name: str = "hash_ids") -> tuple[Any, ...]:
    """A list of block hashes as a tuple; absent is none. Its elements are checked with the record."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Malformed("bad-value", f"{name} is not a list")
    return tuple(value)


REASONS = {
    "json_invalid": "not-json",
    "missing": "missing-field",
    "dict_type": "not-an-object",
    "union_tag_invalid": "unknown-kind",
    "union_tag_not_found": "missing-field",
}
"""Pydantic's error types that are more than a bad value."""


def describe(error: ValidationError) -> Malformed:
    """The first thing that a record's validation found, without the value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    code = REASONS.get(first["type"], "bad-value")
    if code == "unknown-kind":  # the message would quote the value
        return Malformed(code, "kind names no record")
    return Malformed(code, f"{where}: {refusal(first)}" if where else refusal(first))


def request(**fields: Any) -> RequestRecord:
    """A validated record. Strict: no text for a number, no bool."""
    try:
        return covered(RequestRecord.model_validate(fields, strict=True))
    except ValidationError as error:
        raise describe(error) from None


def covered(record: Arrival) -> Arrival:
    """The record, if it has no more hashes than it has tokens for: full blocks only, or a last one in part."""
    size = record.block_tokens or 1
    if isinstance(record, RequestRecord) and record.hashes_cover_output:
        most = (record.prompt_tokens + record.output_tokens) // size
    else:
        most = -(-record.prompt_tokens // size)
    if len(record.block_hashes) > most:
        raise Malformed("hash-coverage", f"{len(record.block_hashes)} hashes of {size} tokens where {most} fit")
    return record


# --- readers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a file, to recognise its format by."""

    start: bytes
    header: frozenset[str]
    objects: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, start: bytes, lines: Iterable[bytes]) -> Head:
        header: frozenset[str] = frozenset()
        objects: list[dict[str, Any]] = []
        for number, line in enumerate(lines):
            with suppress(Malformed):
                text = decode(line)
                if number == 0 and not text.lstrip().startswith("{"):
                    header = frozenset(columns(text))
                else:
                    objects.append(json_object(text))
        return cls(start, header, objects)


class Reader(ABC):
    """Turns the lines of one trace into records.

    A reader knows the file's settings and what earlier lines taught it (a CSV header, the first timestamp), so one
    reader serves one trace, from its first line on.
    """

    name: ClassVar[str]
    expected: ClassVar[str]
    """The format in a few words, for error messages."""
    trace_file: ClassVar[str | None] = None
    """Where the trace is a directory: its file of requests, and the file of settings that must lie beside it."""
    settings_file: ClassVar[str | None] = None
    by_lines: ClassVar[bool] = True
    numbered: ClassVar[bool] = False
    """Whether a request's id is its index in the file: no two can be the same."""
    relative_times: ClassVar[bool] = False
    """Whether times count from the first request (the source has a calendar's time, or starts anywhere)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self.hash_block_tokens: int | None = None
        self.hashes_cover_output = False
        self._index = -1
        if self.settings_file:
            self.settings = read_settings(path.parent / self.settings_file)

    @classmethod
    @abstractmethod
    def recognises(cls, head: Head) -> bool:
        """Whether the file looks like this format."""

    def each_row(self, take: Callable[[int, Any], None], reject: Callable[[int, Malformed], None]) -> None:
        """Give every row of the whole file to `take`. Raises OSError, TraceError."""
        each_line(self.path, take, reject)

    @abstractmethod
    def parse(self, row: Any) -> TelemetryRecord | None:
        """The record of one row, or None for a row that is not meant to have one. Raises Malformed."""

    def restart(self) -> None:  # noqa: B027 (most formats say nothing at the beginning)
        """The file begins anew (it was rotated or cut): what only its beginning says is to be read again."""

    def save(self) -> dict[str, Any]:
        """What earlier lines taught, as JSON types."""
        return {"index": self._index}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """What `save` gave."""
        self._index = saved["index"]

    def next_index(self) -> int:
        """The index of this row, from 0."""
        self._index += 1
        return self._index


class JsonReader(Reader):
    """A format with one JSON object a line, recognised by the fields in `marks`."""

    marks: ClassVar[frozenset[str]]

    @classmethod
    def recognises(cls, head: Head) -> bool:
        return any(cls.marks <= row.keys() for row in head.objects)

    def parse(self, row: bytes) -> TelemetryRecord | None:
        index = self.next_index()
        return self.record(index, json_object(decode(row)))

    @abstractmethod
    def record(self, index: int, row: dict[str, Any]) -> TelemetryRecord:
        """The record of one object. Raises Malformed."""


class CsvReader(Reader):
    """A format with a header and comma-separated lines, recognised by its `needed` columns (lower case)."""

    needed: ClassVar[frozenset[str]]

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._columns: list[str] | None = None

    @classmethod
    def recognises(cls, head: Head) -> bool:
        return cls.needed <= head.header

    def restart(self) -> None:
        self._columns = None

    def save(self) -> dict[str, Any]:
        return {**super().save(), "columns": self._columns}

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self._columns = saved["columns"]

    def parse(self, row: bytes) -> TelemetryRecord | None:
        if self._columns is None:
            found = columns(decode(row))
            if missing := self.needed.difference(found):
                raise Malformed("no-header", f"columns not found: {', '.join(sorted(missing))}")
            self._columns = found
            return None
        index = self.next_index()
        values = cells(decode(row))
        if len(values) < len(self._columns) or any(values[len(self._columns) :]):
            raise Malformed("columns", f"{len(values)} columns, the header has {len(self._columns)}")
        return self.record(index, dict(zip(self._columns, values, strict=False)))

    @abstractmethod
    def record(self, index: int, row: dict[str, str]) -> TelemetryRecord:
        """The record of one line, given by column. Raises Malformed."""


def cells(text: str) -> list[str]:
    """The values of a CSV line. Raises Malformed."""
    try:
        return next(csv.reader([text]), [])
    except csv.Error as error:
        raise Malformed("not-csv", str(error)) from None


def columns(text: str) -> list[str]:
    """The names in a header, lower case. A nameless last column, as a trailing comma makes it, is none."""
    names = [name.strip().casefold() for name in cells(text)]
    while names and not names[-1]:
        names.pop()
    return names


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file beside a trace. Raises TraceError."""
    try:
        return json_object(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise TraceError(f"{path} is missing: the trace needs it; put it next to the trace") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path}: expected a JSON object, found bytes that are not UTF-8; write it again") from None
    except Malformed as error:
        raise TraceError(f"{path}: expected a JSON object ({error}); write it again") from None


def setting_block_tokens(settings: Mapping[str, Any], name: str, path: Path) -> int:
    """The tokens under one hash, from the settings read from `path`. Raises TraceError."""
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1_048_576:
        raise TraceError(f"{path}: expected {name}, a whole number from 1 (the tokens under one hash id); add it")
    return value
