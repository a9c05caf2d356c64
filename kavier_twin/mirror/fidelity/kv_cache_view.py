"""What an engine's KV-cache events say that its cache holds, and how much of it another cache holds as well."""

from __future__ import annotations

from collections import Counter
from copy import copy
from typing import Any, NamedTuple

import numpy as np

from kavier_twin.simulation.kernels.entries import chain_key
from kavier_twin.telemetry import KvBlocksRemoved, KvBlocksStored, KvEventBatch

START = 0  # the parent's key of a prompt's first block


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


class Link(NamedTuple):
    """A block as the simulation names it: its key and that of the block before it."""

    key: int
    parent: int


class KvCacheView:
    """The blocks cached by one engine, by hash.

    vLLM keeps several copies of a block where requests computed it at the same time, and tells the end of each copy
    (v1/core/block_pool.py): copies are counted, for each group of layers and each medium ("GPU", "CPU", ...).

    `exact` tells that the GPU's cache is known exactly: it was watched from the first batch, or since it was empty.
    Where batches were lost everything known until then is forgotten, since its end may have been among them; what is
    told afterwards is then some of the cache, never more.

    The simulation chains the hashes of the stream once more (`chain_key`). `links` holds its names for the blocks in
    the GPU's first group, in the order in which they were last stored; a block whose beginning was not told has none.
    """

    def __init__(self) -> None:
        self.exact = False
        self.links: dict[int, Link] = {}  # by hash
        self._copies: Counter[tuple[int, int, str]] = Counter()  # (hash, group, medium) -> copies
        self._reports = False  # whether a request asked for reports
        self._never_copies = False

    def apply(self, batch: KvEventBatch) -> None:
        """Take in a batch of this engine; batches come in the order of the source."""
        if not batch.continues:
            self._copies.clear()
            self.links.clear()
            self.exact = batch.sequence == 0
        for event in batch.events:
            if isinstance(event, KvBlocksStored):
                self._link(event)
                reported = self._never_copies or self._is_a_report(event)
                for block in event.block_hashes:
                    key = (block, event.group, event.medium)
                    self._copies[key] = 1 if reported else self._copies[key] + 1
            elif isinstance(event, KvBlocksRemoved):
                for block in event.block_hashes:
                    self._remove((block, event.group, event.medium))
            else:  # comes from the GPU's block pool and says nothing of other media
                self._copies = Counter({key: n for key, n in self._copies.items() if key[2] != "GPU"})
                self.links.clear()
                self.exact = True

    def bound(self, blocks: int) -> None:
        """Tell how many blocks the GPU has. If more are counted, stored blocks were reported again, not copied."""
        counted = sum(n for (_, group, medium), n in self._copies.items() if (group, medium) == (0, "GPU"))
        if counted > blocks:
            self._never_copies = True
            self._copies = Counter(dict.fromkeys(self._copies, 1))

    def fork(self) -> KvCacheView:
        """An independent copy."""
        twin = copy(self)
        twin.links, twin._copies = self.links.copy(), self._copies.copy()
        return twin

    def blocks(self, medium: str = "GPU", group: int = 0) -> frozenset[int]:
        """The hashes of the blocks cached on a medium for a group of layers."""
        return frozenset(
            block for block, its_group, its_medium in self._copies if (its_medium, its_group) == (medium, group)
        )

    def copies(self, medium: str = "GPU") -> int:
        """How many blocks of a medium hold something cached, copies and groups counted each."""
        return sum(copies for (_, _, its_medium), copies in self._copies.items() if its_medium == medium)

    def keys_by_use(self) -> list[int]:
        """The keys of `links` in the order in which they would be evicted, as far as events tell; a copy each.

        Hits are not told. But a request that stores a block holds all blocks before it, and frees them last.
        """
        place = {link.key: number for number, link in enumerate(self.links.values())}
        depth = {START: 0}
        for link in self.links.values():
            depth[link.key] = depth.get(link.parent, 0) + 1
        for link in reversed(self.links.values()):
            if link.parent in place:
                place[link.parent] = max(place[link.parent], place[link.key])
        ordered = sorted(self.links.items(), key=lambda entry: (place[entry[1].key], -depth[entry[1].key]))
        return [link.key for block, link in ordered for _ in range(self._copies[block, 0, "GPU"])]

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        copies = [[*key, count] for key, count in self._copies.items()]
        links = [[block, *link] for block, link in self.links.items()]
        return {"exact": self.exact, "copies": copies, "links": links, "reports": [self._reports, self._never_copies]}

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> KvCacheView:
        """What `save` gave."""
        view = cls()
        view.exact = saved["exact"]
        view._reports, view._never_copies = saved.get("reports", (False, False))
        view._copies = Counter({(block, group, medium): count for block, group, medium, count in saved["copies"]})
        view.links = {block: Link(key, parent) for block, key, parent in saved["links"]}
        return view

    def _is_a_report(self, event: KvBlocksStored) -> bool:
        """Whether nothing was stored: a request with `kv_cache_report_mode` "full" tells what it found in the cache.

        Such a report holds what was found from the prompt's first block on and nothing else (vLLM's
        v1/core/block_pool.py, `emit_cached_block_events`). Copies come in events of other forms: of the last block of a
        prompt that is cached whole, behind those before it, or of a prompt that is computed again and differs further
        on. Only a single block can be either, and is taken for a copy until a report of several was seen.
        """
        keys = [(block, event.group, event.medium) for block in event.block_hashes]
        if event.parent_hash is not None or not keys or not all(key in self._copies for key in keys):
            return False
        self._reports = self._reports or len(keys) > 1
        return self._reports

    def _link(self, event: KvBlocksStored) -> None:
        if (event.group, event.medium) != (0, "GPU"):
            return
        parent = START
        if event.parent_hash is not None:
            link = self.links.get(event.parent_hash)
            if link is None:
                return
            parent = link.key
        for block in event.block_hashes:
            key = int(chain_key(np.uint64(parent), np.uint64(block)))
            self.links.pop(block, None)  # to the end
            self.links[block] = Link(key, parent)
            parent = key

    def _remove(self, key: tuple[int, int, str]) -> None:
        if self._copies[key] > 1:
            self._copies[key] -= 1
        else:
            del self._copies[key]  # nothing happens where it is not there
            if key[1:] == (0, "GPU"):
                self.links.pop(key[0], None)
