"""Which data sets a folder holds, found by what is in the files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kavier_twin.errors import UserError
from kavier_twin.studies.accuracy import concurrency, single
from kavier_twin.studies.accuracy.concurrency import run_concurrency
from kavier_twin.studies.accuracy.requests import run_requests
from kavier_twin.studies.accuracy.result import SetResult
from kavier_twin.studies.accuracy.single import run_single
from kavier_twin.studies.accuracy.stages import run_stages

Run = Callable[[Path, str, Callable[[str], None]], SetResult]

_REQUESTS = ("requests.jsonl", "requests.jsonl.gz")
_NOTHING = "it contains no measured latencies with a description of the server"


class DataSet(NamedTuple):
    """Something measured, and what predicts it."""

    name: str
    path: Path
    run: Run


class Skipped(NamedTuple):
    name: str
    reason: str


def find(folder: Path) -> tuple[list[DataSet], list[Skipped]]:
    """The data sets in a folder (or the one that it is), and its entries that hold none. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with measured data sets")
    itself = _recognise(folder)
    if itself is not None:
        return [DataSet(folder.resolve().name, folder, itself)], []
    sets: list[DataSet] = []
    skipped: list[Skipped] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        found = list(_search(entry, folder))
        sets += found
        if not found and entry.is_dir():
            skipped.append(Skipped(entry.name, _NOTHING))
    return sets, skipped


def _search(path: Path, folder: Path) -> Iterator[DataSet]:
    run = _recognise(path)
    if run is not None:
        yield DataSet(str(path.relative_to(folder)), path, run)
    elif path.is_dir():
        for entry in sorted(path.iterdir()):
            yield from _search(entry, folder)


def _recognise(path: Path) -> Run | None:
    if path.is_dir():
        return run_requests if any((path / name).is_file() for name in _REQUESTS) else None
    if path.suffix == ".json":
        return run_stages if _has_runs(path) else None
    if path.suffix == ".csv":
        columns = _header(path)
        if columns >= concurrency.COLUMNS:
            return run_concurrency
        if columns >= single.COLUMNS:
            return run_single
    return None


def _has_runs(path: Path) -> bool:
    """Whether it is a file of load tests; a damaged one that begins like it is left to its reader to complain of."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return '"runs"' in text and '"stages"' in text
    return isinstance(content, dict) and "runs" in content


def _header(path: Path) -> frozenset[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return frozenset(name.strip() for name in next(csv.reader(file), []))
    except (OSError, UnicodeDecodeError, csv.Error):
        return frozenset()
