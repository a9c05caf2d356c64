"""The payload of vLLM's KV-cache events (vLLM's `distributed/kv_events.py`).

A batch is a msgpack array [time, events, data-parallel rank]. An event is a map with its name under "type", or, from
engines older than 0.20 or so, an array of the name and the fields in the order of STORED and REMOVED, of which the
last may be missing. Keys and fields unknown here are passed over. Token ids are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from kavier_twin.telemetry import KvBlocksRemoved, KvBlocksStored, KvCacheCleared, KvEvent

STORED: Final = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
)
REMOVED: Final = ("block_hashes", "medium", "group_idx")


class WireError(ValueError):
    """A payload is not what vLLM sends."""


class Batch(NamedTuple):
    """A decoded payload. `unknown` counts events of a kind not known here."""

    time_seconds: float
    rank: int
    events: tuple[KvEvent, ...]
    unknown: int


def decode_batch(payload: bytes) -> Batch:
    """Raises WireError."""
    import msgpack  # an extra

    try:
        batch = msgpack.unpackb(payload, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise WireError(f"not msgpack: {error}") from None
    return batch_of(batch)


def batch_of(batch: Any) -> Batch:
    """A batch as unpacked, or as read from JSON. Raises WireError."""
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise WireError("expected [time, events, rank]")
    time, rank = batch[0], batch[2] if len(batch) > 2 else None
    if not isinstance(time, int | float) or not math.isfinite(time):
        raise WireError(f"the time is {time!r}")
    if rank is not None and not isinstance(rank, int):
        raise WireError(f"the rank is {rank!r}")
    events = [_event(event) for event in batch[1]]
    known = tuple(event for event in events if event is not None)
    return Batch(float(time), rank or 0, known, len(events) - len(known))


def _event(event: Any) -> KvEvent | None:
    """None for a kind not known here."""
    if isinstance(event, Mapping):
        kind, fields = event.get("type"), event
    elif isinstance(event, Sequence) and event and not isinstance(event, str | bytes):
        kind = event[0]
        fields = dict(zip(STORED if kind == "BlockStored" else REMOVED, event[1:], strict=False))
    else:
        raise WireError(f"an event is a {type(event).__name__}")
    if kind == "AllBlocksCleared":
        return KvCacheCleared()
    if kind not in ("BlockStored", "BlockRemoved"):
        return None
    hashes = fields.get("block_hashes")
    if not isinstance(hashes, list):
        raise WireError(f"{kind} without block_hashes")
    medium, group = fields.get("medium") or "GPU", fields.get("group_idx") or 0
    if not isinstance(medium, str) or not isinstance(group, int):
        raise WireError(f"medium {medium!r}, group {group!r}")
    block_hashes = tuple(map(_hash, hashes))
    if kind == "BlockRemoved":
        return KvBlocksRemoved(block_hashes=block_hashes, medium=medium, group=group)
    parent, block_tokens = fields.get("parent_block_hash"), fields.get("block_size") or 0
    if not isinstance(block_tokens, int) or block_tokens < 0:
        raise WireError(f"block_size {block_tokens!r}")
    kind_of_layers = fields.get("kv_cache_spec_kind")
    return KvBlocksStored(
        block_hashes=block_hashes,
        parent_hash=None if parent is None else _hash(parent),
        block_tokens=block_tokens,
        medium=medium,
        group=group,
        spec_kind=kind_of_layers if isinstance(kind_of_layers, str) else "",
    )


def _hash(value: Any) -> int:
    """As vLLM publishes it by default: the last 8 bytes, big-endian, unsigned."""
    if isinstance(value, bytes) and value:
        return int.from_bytes(value[-8:], "big")
    if isinstance(value, int) and not isinstance(value, bool):
        return value % 2**64
    raise WireError(f"a block hash is a {type(value).__name__}")
