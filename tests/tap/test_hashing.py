"""The hash chain against values that vLLM 0.32 computed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kavier_twin.tap.hashing import Adapter, BlockHasher, ExtraKeys
from real_parts import require

tokens = st.lists(st.integers(0, 200_000), max_size=40)


def test_sha256_gives_vllms_values() -> None:
    hasher = BlockHasher("sha256", 16)
    assert hasher.root.hex() == "066b1e8987e027138e98701c46128929378935f9b6cd1549105ae6b4f0d71198"
    (first,) = hasher.digests(range(16))
    assert first.hex().startswith("fe8fa5dd")
    assert first.hex().endswith("434798")
    assert hasher.hashes(range(16)) == (int.from_bytes(first[24:], "big"),)


ADAPTER = Adapter("sql", "/adapters/sql")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (ExtraKeys(), "fe8fa5dda321 8be7aaa33831 9d537f74907f 1cbbd5870784"),
        (ExtraKeys(ADAPTER), "334fcc5b0f92 c2b90ec806da 7429d1533405 0b70e24e6c8b"),
        (ExtraKeys(salt="tenant-1"), "e7fef1307521 9e60a2a19858 8e8371fc522e 47adbdbf1481"),
        (ExtraKeys(ADAPTER, "tenant-1"), "a60b8b520ed2 322dd3b7b5e7 5ccada14a322 97ff73cf2e07"),
    ],
)
def test_adapters_and_salts_give_vllms_values(extra: ExtraKeys, expected: str) -> None:
    """Computed by `generate_block_hash_extra_keys` and `hash_block_tokens` of vLLM 0.32."""
    digests = BlockHasher("sha256", 16).digests(range(64), extra)
    assert " ".join(digest.hex()[:12] for digest in digests) == expected


def test_sha256_cbor_gives_vllms_root() -> None:
    pytest.importorskip("cbor2")
    root = BlockHasher("sha256_cbor", 16).root.hex()
    assert root.startswith("9bd96a48")
    assert root.endswith("81eef0")


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
@given(first=tokens, second=tokens, block_tokens=st.integers(1, 5))
def test_equal_hashes_mean_equal_prefixes(
    algorithm: str, first: list[int], second: list[int], block_tokens: int
) -> None:
    hasher = BlockHasher(algorithm, block_tokens, "0")
    one, two = hasher.hashes(first), hasher.hashes(second)
    assert len(one) == len(first) // block_tokens
    assert len(set(one)) == len(one)
    for block in range(min(len(one), len(two))):
        end = (block + 1) * block_tokens
        assert (one[block] == two[block]) == (first[:end] == second[:end])


def test_the_seed_of_python_changes_the_root_and_xxhash_needs_one() -> None:
    require("xxhash", bool(pytest.importorskip("xxhash")), "pip install xxhash")
    assert BlockHasher("sha256", 16, "0").root != BlockHasher("sha256", 16).root
    with pytest.raises(ValueError, match="PYTHONHASHSEED"):
        BlockHasher("xxhash", 16)
