"""What an engine's KV-cache events say that its cache holds, and how much of it another cache holds as well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from typing import NamedTuple

from kavier_twin.telemetry import KvBlocksRemoved, KvBlocksStored, KvEventBatch


class CacheShare(NamedTuple):
    """Two sets of cached blocks side by side."""

    both: int
    only_mirrored: int
    only_real: int

    @property
    def ratio(self) -> float:
        """Blocks in both caches per block in either (Jaccard index); 1 where both are empty."""
        either = self.both + self.only_mirrored + self.only_real
        return self.both / either if either else 1.0


class KvCacheView:
    """The blocks cached by one engine, by hash.

    vLLM keeps several copies of a block where requests computed it at the same time, and tells the end of each copy
    (v1/core/block_pool.py): copies are counted, for each group of layers and each medium ("GPU", "CPU", ...).

    `exact` tells that the GPU's cache is known exactly: it was watched from the first batch, or since it was empty.
    Where batches were lost everything known until then is forgotten, since its end may have been among them; what is
    told afterwards is then some of the cache, never more.
    """

    def __init__(self) -> None:
        self.exact = False
        self._copies: Counter[tuple[int, int, str]] = Counter()  # (hash, group, medium) -> copies

    def apply(self, batch: KvEventBatch) -> None:
        """Take in a batch of this engine; batches come in the order of the source."""
        if not batch.continues:
            self._copies.clear()
            self.exact = batch.sequence == 0
        for event in batch.events:
            if isinstance(event, KvBlocksStored):
                for block in event.block_hashes:
                    self._copies[block, event.group, event.medium] += 1
            elif isinstance(event, KvBlocksRemoved):
                for block in event.block_hashes:
                    self._remove((block, event.group, event.medium))
            else:  # comes from the GPU's block pool and says nothing of other media
                self._copies = Counter({key: n for key, n in self._copies.items() if key[2] != "GPU"})
                self.exact = True

    def blocks(self, medium: str = "GPU", group: int = 0) -> frozenset[int]:
        """The hashes of the blocks cached on a medium for a group of layers."""
        return frozenset(
            block for block, its_group, its_medium in self._copies if (its_medium, its_group) == (medium, group)
        )

    def copies(self, medium: str = "GPU") -> int:
        """How many blocks of a medium hold something cached, copies and groups counted each."""
        return sum(copies for (_, _, its_medium), copies in self._copies.items() if its_medium == medium)

    def share(self, mirrored: Set[int], medium: str = "GPU", group: int = 0) -> CacheShare:
        """Beside the set of hashes that another cache holds, the mirror's for one."""
        real = self.blocks(medium, group)
        both = len(real & mirrored)
        return CacheShare(both, len(mirrored) - both, len(real) - both)

    def _remove(self, key: tuple[int, int, str]) -> None:
        if self._copies[key] > 1:
            self._copies[key] -= 1
        else:
            del self._copies[key]  # nothing happens where it is not there
