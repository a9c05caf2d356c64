"""Copies of request bodies while they come, bounded each and all together."""

from __future__ import annotations

from typing import Final

MOST_BYTES: Final = 32 << 20  # of one request; a larger one passes, without a record
MOST_BYTES_TOGETHER: Final = 256 << 20


class Bodies:
    """How much is copied now."""

    def __init__(self) -> None:
        self.bytes = 0


class BodyCopy:
    """The copy of one body. `dropped` tells why there is none, if there is none."""

    def __init__(self, bodies: Bodies) -> None:
        self.dropped: str | None = None
        self._bodies = bodies
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        """The next piece."""
        if self.dropped is not None:
            return
        if len(self._data) + len(data) > MOST_BYTES:
            self.drop("body")
        elif self._bodies.bytes + len(data) > MOST_BYTES_TOGETHER:
            self.drop("too-busy")
        else:
            self._data += data
            self._bodies.bytes += len(data)

    def drop(self, reason: str) -> None:
        """Do without."""
        self.dropped = reason
        self.take()

    def take(self) -> bytes:
        """What came, which is forgotten here."""
        data, self._data = bytes(self._data), bytearray()
        self._bodies.bytes -= len(data)
        return data
