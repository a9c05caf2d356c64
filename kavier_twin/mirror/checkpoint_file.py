"""Checkpoints: a mirror's whole state in a file, so that a restart goes on from the log where the last one stood.

A file is a line that names the format, the SHA-256 of the rest, and the rest: a JSON document and the raw arrays it
lists. No code is ever loaded from it. It is written beside its name and renamed, so that a kill leaves the last good
one; several are kept, and a damaged one, or one of another version, is passed over for the next older.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.state import FleetState

VERSION: Final = 5
SUFFIX: Final = ".checkpoint"
_MAGIC: Final = b"kavier-twin checkpoint\n"


class CheckpointError(Exception):
    """A file that cannot be used, with the reason."""


class Saved(NamedTuple):
    """What a checkpoint holds."""

    document: dict[str, Any]  # JSON types
    arrays: dict[str, np.ndarray]


def layout_digest() -> str:
    """Identifies the fleet's record layouts: arrays of another layout cannot be read as these."""
    described = [(name, str(dtype.descr)) for name, dtype in sorted(_records().items())]
    return hashlib.sha256(repr((described, FleetState._fields)).encode()).hexdigest()[:16]


def write(directory: Path, sequence: int, saved: Saved, keep: int) -> Path:
    """Write the checkpoint with this number, and remove all but the newest `keep`. Raises OSError."""
    arrays = {name: np.ascontiguousarray(array) for name, array in saved.arrays.items()}
    head = {
        "version": VERSION,
        "layout": layout_digest(),
        "document": saved.document,
        "arrays": [[name, _dtype_name(array.dtype), list(array.shape)] for name, array in arrays.items()],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        digest.update(array.view(np.uint8).data if array.size else b"")
    path = directory / f"{sequence:012d}{SUFFIX}"
    with replacing(path) as file:
        file.write(_MAGIC + digest.digest() + len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            if array.size:
                file.write(array.view(np.uint8).data)
    for old in _files(directory)[keep:]:
        old.unlink(missing_ok=True)
    return path


def read(path: Path) -> Saved:
    """Raises CheckpointError, OSError."""
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise CheckpointError("not a checkpoint file")
    at = len(_MAGIC)
    digest, body = content[at : at + 32], memoryview(content)[at + 32 :]
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError("damaged: the checksum does not match")
    length = int.from_bytes(body[:8], "little")
    head = json.loads(bytes(body[8 : 8 + length]))
    if head["version"] != VERSION or head["layout"] != layout_digest():
        raise CheckpointError("written by another version of Kavier Twin")
    arrays = {}
    at = 8 + length
    for name, dtype_name, shape in head["arrays"]:
        dtype = _records().get(dtype_name) or np.dtype(dtype_name)
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(body, dtype, count, at).reshape(shape).copy()
        at += count * dtype.itemsize
    return Saved(head["document"], arrays)


def newest(directory: Path) -> tuple[Saved | None, int, list[str]]:
    """The newest good checkpoint, its number (0: there is none), and what was wrong with newer ones."""
    problems: list[str] = []
    for path in _files(directory):
        try:
            return read(path), int(path.name.removesuffix(SUFFIX)), problems
        except (CheckpointError, OSError) as error:
            problems.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}; not used")
    return None, 0, problems


def last_number(directory: Path) -> int:
    """Of all checkpoints there, good or not; 0: there is none."""
    return max((int(path.name.removesuffix(SUFFIX)) for path in _files(directory)), default=0)


def _files(directory: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in directory.glob(f"*{SUFFIX}") if path.name.removesuffix(SUFFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removesuffix(SUFFIX)), reverse=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path`, whole and on the disk, when the block ends well. Raises OSError.

    Only its owner can read it: it holds what users sent, as hashes.
    """
    temporary = path.with_suffix(".part")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb", opener=_for_the_owner) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync(directory: Path) -> None:
    """The rename itself must survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _records() -> dict[str, np.dtype[Any]]:
    """The record layouts of the fleet's state by name."""
    return {name: value for name, value in vars(layout).items() if isinstance(value, np.dtype) and value.names}


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return next((name for name, known in _records().items() if known == dtype), dtype.str)
