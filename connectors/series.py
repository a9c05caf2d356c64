"""A quantity over time from a file: carbon intensity as grid operators publish it, watts as DCGM reports them.

CSV with a header that names the column `time` and that of the quantity (others are passed over), or a JSON list of
objects with these keys. A time is ISO 8601 with its offset (`2026-01-31T23:00:00Z`, `...+01:00`) or unix seconds.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

TIME = "time"
CARBON_COLUMN, HIGHEST_CARBON = "gco2_per_kwh", 10_000.0  # coal emits a tenth of it
WATTS_COLUMN, HIGHEST_WATTS = "watts", 100_000.0
_TOLD = 5


class SeriesError(ValueError):
    """A file that is no such series; says where and why."""


def read_series(path: Path, column: str, highest: float) -> tuple[tuple[float, float], ...]:
    """The series in a file: (unix seconds, value from 0 to `highest`), times increasing, at least one.

    Raises SeriesError that tells the first problems, each with its line (CSV) or entry (JSON).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SeriesError(f"{path}: cannot be read ({error.strerror}); correct the path") from None
    except UnicodeDecodeError:
        raise SeriesError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    is_json = text.lstrip().startswith(("[", "{"))
    rows = _json_rows(path, text, column) if is_json else _csv_rows(path, text, column)
    points: list[tuple[float, float]] = []
    problems: list[str] = []
    for where, time, value in rows:
        try:
            point = (_unix(time), _within(value, column, highest))
            if points and point[0] <= points[-1][0]:
                raise ValueError(f"time {time} is not after the one before; sort the file, one value a time")
            points.append(point)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
        raise SeriesError(f"{path}: " + "; ".join([*problems[:_TOLD], *more]))
    if not points:
        raise SeriesError(f"{path}: no value in it; expected lines of {TIME},{column}")
    return tuple(points)


def _csv_rows(path: Path, text: str, column: str) -> Iterator[tuple[str, Any, Any]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    names = reader.fieldnames or []
    if not {TIME, column} <= set(names):
        raise SeriesError(f"{path}: expected a header with the columns {TIME} and {column}, found {','.join(names)}")
    try:
        for row in reader:
            yield f"line {reader.line_num}", row[TIME], row[column]
    except csv.Error as error:
        raise SeriesError(f"{path}: line {reader.line_num}: no CSV: {error}") from None


def _json_rows(path: Path, text: str, column: str) -> Iterator[tuple[str, Any, Any]]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise SeriesError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise SeriesError(f'{path}: expected a JSON list of {{"{TIME}": ..., "{column}": ...}}')
    for number, entry in enumerate(content):
        yield f"entry {number}", entry.get(TIME), entry.get(column)


def _unix(time: Any) -> float:
    number = _number(time)
    if number is not None:
        return number
    try:
        moment = datetime.fromisoformat(str(time).strip())
    except ValueError:
        raise ValueError(f"time {time!r}: expected ISO 8601 such as 2026-01-31T23:00:00Z, or unix seconds") from None
    if moment.tzinfo is None:
        raise ValueError(f"time {time!r} names no time zone; add Z for UTC, or its offset")
    return moment.timestamp()


def _within(value: Any, column: str, highest: float) -> float:
    number = _number(value)
    if number is None or not 0.0 <= number <= highest:
        raise ValueError(f"{column} {value!r}: expected a number from 0 to {highest:g}")
    return number


def _number(value: Any) -> float | None:
    """As a finite number; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
