"""The hash chain by which vLLM knows the blocks of a prompt.

As in vLLM 0.32, `v1/core/kv_cache_utils.py`: h_i = H((h_{i-1}, token ids of block i, extra keys)) over full blocks,
from the root NONE_HASH = H(seed). Of the extra keys those of adapters and cache salts are hashed here, those of images
are not.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

ALGORITHMS: Final = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")
_FIXED_SEED: Final = "vllm-none-hash"  # vLLM's own, of the sha256 family, without PYTHONHASHSEED


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, as `/v1/models` lists it."""

    name: str
    path: str


@dataclass(frozen=True)
class ExtraKeys:
    """What an engine hashes beside tokens: the adapter into every block, the cache salt into the first one."""

    adapter: Adapter | None = None
    salt: str | None = None

    def of_block(self, number: int) -> tuple[tuple[str, ...], ...] | None:
        """In vLLM's form and order."""
        # Made anew for each block: pickle writes an object that it has seen as a reference, and vLLM's are new.
        keys: list[tuple[str, ...]] = []
        if self.adapter is not None:
            keys.append(("lora", self.adapter.name, self.adapter.path))
        if self.salt is not None and number == 0:
            keys.append(("cache_salt", self.salt))
        return tuple(keys) or None


NO_EXTRA_KEYS: Final = ExtraKeys()


class BlockHasher:
    """Hashes prompts as an engine does that was started with `--prefix-caching-hash-algo` and PYTHONHASHSEED.

    Raises ValueError for xxhash without a seed: each engine then draws its own.
    """

    def __init__(self, algorithm: str, block_tokens: int, python_hash_seed: str | None = None) -> None:
        if python_hash_seed is None and algorithm.startswith("xxhash"):
            raise ValueError(f"{algorithm} needs the PYTHONHASHSEED of the engines: without it their hashes are random")
        self.block_tokens = block_tokens
        self._hash = _function(algorithm)
        self.root = self._hash(_FIXED_SEED if python_hash_seed is None else python_hash_seed)

    def digests(self, token_ids: Sequence[int], extra: ExtraKeys = NO_EXTRA_KEYS) -> list[bytes]:
        """The whole hash of each full block."""
        size = self.block_tokens
        chain: list[bytes] = []
        parent = self.root
        for number in range(len(token_ids) // size):
            block = tuple(token_ids[number * size : (number + 1) * size])
            parent = self._hash((parent, block, extra.of_block(number)))
            chain.append(parent)
        return chain

    def hashes(self, token_ids: Sequence[int], extra: ExtraKeys = NO_EXTRA_KEYS) -> tuple[int, ...]:
        """The hash of each full block as KV-cache events publish it: its last 8 bytes, big-endian."""
        return tuple(int.from_bytes(digest[-8:], "big") for digest in self.digests(token_ids, extra))


def _function(algorithm: str) -> Callable[[object], bytes]:
    serialise = _cbor() if algorithm.endswith("_cbor") else _pickle
    digest = _xxhash() if algorithm.startswith("xxhash") else _sha256
    return lambda value: digest(serialise(value))


def _pickle(value: object) -> bytes:
    return pickle.dumps(value, protocol=5)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _cbor() -> Callable[[object], bytes]:
    import cbor2  # an extra

    return lambda value: cbor2.dumps(value, canonical=True)


def _xxhash() -> Callable[[bytes], bytes]:
    import xxhash  # an extra

    xxh3: Any = xxhash.xxh3_128_digest
    return lambda data: bytes(xxh3(data))
