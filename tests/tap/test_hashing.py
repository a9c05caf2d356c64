"""The hash chain against values that vLLM 0.32 computed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kavier_twin.tap.hashing import BlockHasher
from real_parts import require

tokens = st.lists(st.integers(0, 200_000), max_size=40)


def test_sha256_gives_vllms_values() -> None:
    hasher = BlockHasher("sha256", 16)
    assert hasher.root.hex() == "066b1e8987e027138e98701c46128929378935f9b6cd1549105ae6b4f0d71198"
    (first,) = hasher.digests(range(16))
    assert first.hex().startswith("fe8fa5dd")
    assert first.hex().endswith("434798")
    assert hasher.hashes(range(16)) == (int.from_bytes(first[24:], "big"),)


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
