"""Many requests in little memory: a sequence of records, kept as columns.

A record as an object takes two kilobytes. Here one takes some fifty bytes and eight a hash, and becomes an object when
somebody looks at it. Fields that hardly any trace has are kept by row.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from kavier_twin.telemetry import RequestRecord

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LATENCIES = ("ttft_seconds", "e2e_seconds", "queue_seconds")
_COLUMNS = frozenset(
    {
        "kind",
        "id",
        "time_seconds",
        "prompt_tokens",
        "output_tokens",
        "session",
        "block_hashes",
        "block_tokens",
        "hashes_cover_output",
        *_LATENCIES,
    }
)
_DEFAULTS = {name: info.default for name, info in RequestRecord.model_fields.items()}
_LARGEST_NUMBER = 2**63


class RequestTable(Sequence[RequestRecord]):
    """Append-only until `by_arrival`; then records in the order of their times."""

    def __init__(self) -> None:
        self._time = array("d")
        self._prompt = array("i")
        self._output = array("i")
        self._number = array("q")  # the id where it is a plain number, else -1
        self._session = array("i")  # place in `_sessions`, -1 = none
        self._block_tokens = array("i")  # 0 = no hashes
        self._covers_output = array("b")
        self._hash_starts = array("q", [0])
        self._hashes = array("Q")
        self._latencies: dict[str, array[float]] = {}  # once somebody has one
        self._sessions: dict[str, int] = {}
        self._session_names: list[str] = []
        self._rest: dict[int, dict[str, Any]] = {}  # other fields by row
        self._order: Ints | None = None
        self._shift_seconds = 0.0

    def append(self, record: RequestRecord) -> None:
        """Add a record."""
        row = len(self._time)
        self._time.append(record.time_seconds)
        self._prompt.append(record.prompt_tokens)
        self._output.append(record.output_tokens)
        number = int(record.id) if record.id.isascii() and record.id.isdigit() else -1
        plain = 0 <= number < _LARGEST_NUMBER and str(number) == record.id
        self._number.append(number if plain else -1)
        self._session.append(self._session_place(record.session))
        self._block_tokens.append(record.block_tokens or 0)
        self._covers_output.append(record.hashes_cover_output)
        self._hashes.extend(record.block_hashes)
        self._hash_starts.append(len(self._hashes))
        for name in _LATENCIES:
            value = getattr(record, name)
            if value is not None and name not in self._latencies:
                self._latencies[name] = array("d", [math.nan]) * row
            if name in self._latencies:
                self._latencies[name].append(math.nan if value is None else value)
        rest = {
            name: getattr(record, name)
            for name in record.model_fields_set - _COLUMNS
            if getattr(record, name) != _DEFAULTS[name]
        }
        if not plain:
            rest["id"] = record.id
        if rest:
            self._rest[row] = rest

    def by_arrival(self, *, from_zero: bool) -> None:
        """Order by time, those of one time as they were added; `from_zero`: let times count from the first."""
        times = np.frombuffer(self._time)
        if times.size and bool((np.diff(times) < 0.0).any()):
            self._order = np.argsort(times, kind="stable")
        if from_zero and times.size:
            self._shift_seconds = float(times.min())

    def _session_place(self, session: str | None) -> int:
        if session is None:
            return -1
        if session not in self._sessions:
            self._sessions[session] = len(self._session_names)
            self._session_names.append(session)
        return self._sessions[session]

    # --- as records -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._time)

    @overload
    def __getitem__(self, at: int) -> RequestRecord: ...
    @overload
    def __getitem__(self, at: slice) -> list[RequestRecord]: ...
    def __getitem__(self, at: int | slice) -> RequestRecord | list[RequestRecord]:
        if isinstance(at, slice):
            return [self._record(place) for place in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self._record(at % len(self))

    def __iter__(self) -> Iterator[RequestRecord]:
        return map(self._record, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # it can still grow

    def _record(self, place: int) -> RequestRecord:
        row = place if self._order is None else int(self._order[place])
        session, tokens = self._session[row], self._block_tokens[row]
        fields: dict[str, Any] = {
            "id": str(self._number[row]),
            "time_seconds": self._time[row] - self._shift_seconds,
            "prompt_tokens": self._prompt[row],
            "output_tokens": self._output[row],
            "session": None if session < 0 else self._session_names[session],
            "block_hashes": tuple(self._hashes[self._hash_starts[row] : self._hash_starts[row + 1]]),
            "block_tokens": tokens or None,
            "hashes_cover_output": bool(self._covers_output[row]),
            **self._rest.get(row, {}),
        }
        for name, column in self._latencies.items():
            fields[name] = None if math.isnan(column[row]) else column[row]
        return RequestRecord.model_construct(**fields)

    # --- as columns, by arrival -----------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int) -> Ints | slice:
        return slice(start, stop) if self._order is None else self._order[start:stop]

    def times(self, start: int, stop: int) -> Floats:
        """Arrivals of the requests [start, stop), seconds."""
        return np.frombuffer(self._time)[self._rows(start, stop)] - self._shift_seconds

    def column(self, name: str, start: int, stop: int) -> Ints:
        """prompt_tokens, output_tokens, block_tokens (0 = no hashes), session (-1 = none) or covers_output (0, 1)."""
        arrays = {
            "prompt_tokens": self._prompt,
            "output_tokens": self._output,
            "block_tokens": self._block_tokens,
            "session": self._session,
            "covers_output": self._covers_output,
        }
        return np.asarray(np.array(arrays[name], copy=False)[self._rows(start, stop)], np.int64)

    def latency(self, name: str, start: int, stop: int) -> Floats:
        """ttft_seconds, e2e_seconds or queue_seconds; NaN where it was not measured."""
        if name not in self._latencies:
            return np.full(stop - start, np.nan)
        return np.array(np.frombuffer(self._latencies[name])[self._rows(start, stop)])

    def rest(self, name: str, start: int, stop: int) -> list[Any]:
        """Any other field."""
        rows = range(start, stop) if self._order is None else self._order[start:stop].tolist()
        return [self._rest.get(row, {}).get(name, _DEFAULTS[name]) for row in rows]

    def hashes(self, start: int, stop: int) -> tuple[npt.NDArray[np.uint64], Ints]:
        """Block hashes of the requests, one after the other, and where each request's start (one more at the end)."""
        begins = np.frombuffer(self._hash_starts, np.int64)
        every = np.frombuffer(self._hashes, np.uint64) if len(self._hashes) else np.zeros(0, np.uint64)
        if self._order is None:
            return every[begins[start] : begins[stop]], begins[start : stop + 1] - begins[start]
        rows = self._order[start:stop]
        lengths = begins[rows + 1] - begins[rows]
        starts = np.zeros(rows.size + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        picks = np.repeat(begins[rows] - starts[:-1], lengths) + np.arange(int(starts[-1]))
        return every[picks], starts
