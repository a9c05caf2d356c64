"""Carbon intensity of electricity from a file, as grid operators and data services publish it.

CSV with a header that names the columns `time` and `gco2_per_kwh` (others are passed over), or a JSON list of objects
with these keys. A time is ISO 8601 with its offset (`2026-01-31T23:00:00Z`, `...+01:00`) or unix seconds.
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

TIME, VALUE = "time", "gco2_per_kwh"
HIGHEST = 10_000.0  # coal emits a tenth of it
_TOLD = 5


class CarbonFileError(ValueError):
    """A file that is no series of carbon intensity; says where and why."""


def read_carbon(path: Path) -> tuple[tuple[float, float], ...]:
    """The series in a file: (unix seconds, grams of CO2 per kilowatt-hour), times increasing, at least one.

    Raises CarbonFileError that tells the first problems, each with its line (CSV) or entry (JSON).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CarbonFileError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise CarbonFileError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    rows = _json_rows(path, text) if text.lstrip().startswith(("[", "{")) else _csv_rows(path, text)
    points: list[tuple[float, float]] = []
    problems: list[str] = []
    for where, time, value in rows:
        try:
            point = (_unix(time), _intensity(value))
            if points and point[0] <= points[-1][0]:
                raise ValueError(f"time {time} is not after the one before; sort the file, one value a time")
            points.append(point)
        except ValueError as error:
            problems.append(f"{path}: {where}: {error}")
    if problems:
        more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
        raise CarbonFileError("; ".join([*problems[:_TOLD], *more]))
    if not points:
        raise CarbonFileError(f"{path}: no value in it; expected {TIME},{VALUE} lines")
    return tuple(points)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Any, Any]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    names = reader.fieldnames or []
    if not {TIME, VALUE} <= set(names):
        raise CarbonFileError(f"{path}: expected a header with the columns {TIME} and {VALUE}, found {','.join(names)}")
    for row in reader:
        yield f"line {reader.line_num}", row[TIME], row[VALUE]


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any, Any]]:
    expected = f'a JSON list of {{"{TIME}": ..., "{VALUE}": ...}}'
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CarbonFileError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise CarbonFileError(f"{path}: expected {expected}")
    for number, entry in enumerate(content):
        yield f"entry {number}", entry.get(TIME), entry.get(VALUE)


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


def _intensity(value: Any) -> float:
    number = _number(value)
    if number is None or not 0.0 <= number <= HIGHEST:
        raise ValueError(f"{VALUE} {value!r}: expected a number from 0 to {HIGHEST:g}")
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
