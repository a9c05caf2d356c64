"""Where notes of rejected input go, so that somebody can find it and mend what made it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Protocol

from connectors.traces.base import Malformed


class Letters(Protocol):
    """Takes a note of each piece of input that made no record. Never raises, never waits for long."""

    def write(self, where: Mapping[str, str | int], what: Malformed, length: int) -> None:
        """Note a rejected piece of `length` bytes. `where` is how to find it: file and line, or topic and offset."""

    def close(self) -> None:
        """Let go of files and connections."""


def letter(where: Mapping[str, str | int], what: Malformed, length: int) -> bytes:
    """A note as JSON: where, `reason`, `detail` and `length`. Never the rejected text: it could hold a prompt."""
    noted: dict[str, Any] = {**where, "reason": what.reason, "detail": what.detail, "length": length}
    return json.dumps(noted).encode()


class DeadLetters:
    """A file of what was rejected, bounded: JSON lines, see `letter`.

    Beyond `max_bytes` the file becomes `<path>.1`, in place of an older one, and a new one begins. A line that cannot
    be written is counted in `lost`. Any thread may write.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = 8 * 2**20) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        self.lost = 0
        self._stream: BinaryIO | None = None
        self._lock = Lock()

    def write(self, where: Mapping[str, str | int], what: Malformed, length: int) -> None:
        """Add a note. Never raises."""
        line = letter(where, what, length) + b"\n"
        with self._lock:
            try:
                self._open().write(line)
            except OSError:
                self.lost += 1

    def close(self) -> None:
        with self._lock:
            self._shut()

    def _open(self) -> BinaryIO:
        """The file, with room for one more line."""
        if self._stream is not None and self._stream.tell() >= self.max_bytes:
            self._shut()
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        if self._stream is None:
            self._stream = self.path.open("ab", buffering=0)
            if self._stream.tell() >= self.max_bytes:
                return self._open()
        return self._stream

    def _shut(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
