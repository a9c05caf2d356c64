"""A table of numbers that grows at its end and is cut at its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_FIRST_ROWS: Final = 64


class Rows:
    """Rows of so many numbers."""

    def __init__(self, width: int) -> None:
        self._table = np.zeros((_FIRST_ROWS, width))
        self._count = 0

    @classmethod
    def of(cls, values: npt.NDArray[np.float64]) -> Rows:
        """These rows."""
        found = cls(values.shape[1])
        found._table, found._count = values.copy(), values.shape[0]
        return found

    def __len__(self) -> int:
        return self._count

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """[rows, width]; not to be kept beyond the next change."""
        return self._table[: self._count]

    def append(self, row: Sequence[float]) -> None:
        """One more at the end."""
        if self._count == self._table.shape[0]:
            self._table = np.concatenate([self._table, np.zeros((self._count + _FIRST_ROWS, self._table.shape[1]))])
        self._table[self._count] = row
        self._count += 1

    def insert(self, place: int, row: Sequence[float]) -> None:
        """One more before the row at this place."""
        self.append(row)
        self._table[place + 1 : self._count] = self._table[place : self._count - 1].copy()
        self._table[place] = row

    def keep(self, kept: npt.NDArray[np.bool_]) -> None:
        """Only those rows."""
        if kept.all():
            return
        found = self.values[kept]
        spare = np.zeros((max(_FIRST_ROWS, found.shape[0] // 4), found.shape[1]))
        self._table, self._count = np.concatenate([found, spare]), found.shape[0]
