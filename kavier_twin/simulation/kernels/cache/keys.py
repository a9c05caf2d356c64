"""Keys of blocks: 64 bits that name a block's content and all content before it."""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel, small_kernel

_SUB_BITS = np.uint64(10)  # low bits of a key: which block under one hash of the trace
_SUB_MASK = np.uint64(1023)
_TOP_BIT = np.uint64(1 << 63)  # keeps keys apart from UNHASHED and PRIVATE
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


@small_kernel
def mix(value):
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out."""
    value = value + _GOLDEN
    value = (value ^ (value >> _S30)) * _MIX_1
    value = (value ^ (value >> _S27)) * _MIX_2
    return value ^ (value >> _S31)


@small_kernel
def chain_key(parent, content):
    """Key of a hash block with this content behind that parent (0 for the first): vLLM chains hashes the same way."""
    return (mix(parent ^ mix(content)) & ~_SUB_MASK) | _TOP_BIT


@kernel
def chain_keys(hashes, starts):
    """Turn the content hashes of many requests, `hashes[starts[i]:starts[i + 1]]`, into chained keys in place."""
    for request in range(starts.size - 1):
        parent = np.uint64(0)
        for link in range(starts[request], starts[request + 1]):
            parent = chain_key(parent, hashes[link])
            hashes[link] = parent


@small_kernel
def key_of(chain, start, hash_tokens, block, block_size):
    """Key of block number `block` of a request whose chain of hashes, `hash_tokens` tokens each, begins at `start`."""
    last = (block + 1) * block_size - 1
    return chain[start + last // hash_tokens] + np.uint64(last % hash_tokens // block_size)


@small_kernel
def private_key(uid, block):
    """Key of block number `block` of request `uid` where no hash of the trace identifies its content."""
    return mix(mix(np.uint64(uid)) + np.uint64(block)) | _TOP_BIT


@small_kernel
def spread(key):
    """A number whose low bits tell keys apart, which are well mixed: successive ones for the blocks under one hash."""
    return (key >> _SUB_BITS) + (key & _SUB_MASK)
