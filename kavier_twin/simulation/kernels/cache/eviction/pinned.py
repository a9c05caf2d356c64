"""Pinned prefixes: LRU that spares the shared beginnings of prompts (system prompts, tools) while it can.

The leading `eviction_pinned_tokens` of a chain are pinned once they were hit twice, at most `eviction_pinned_share` of
the pool at a time; pinned blocks go, in LRU order, only when nothing else can. A proposal, after the priorities by
token range that TensorRT-LLM takes by hand (`KvCacheRetentionConfig`).
"""

from kavier_twin.simulation.compiler.kernel import kernel
from kavier_twin.simulation.kernels.cache.eviction import lists

_PLAIN, _PINNED = 0, 1
_HITS = 2


@kernel
def hit(order, block):
    """Pin it if it is due."""
    node, engine = order.nodes[block], order.engine
    if (
        node.queue == _PLAIN
        and node.hits >= _HITS
        and node.depth < engine.eviction_pinned_blocks
        and order.eviction.counts[_PINNED] < engine.eviction_pinned_most
    ):
        lists.belong(order, block, _PINNED)


@kernel
def victim(order):
    """The least recently used that is not pinned, else the least recently used."""
    if lists.oldest(order.nodes, _PLAIN) != 0:
        return lists.take_oldest(order, _PLAIN)
    return lists.take_oldest(order, _PINNED)
