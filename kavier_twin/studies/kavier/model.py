"""Kavier's own model of LLM inference, so that its experiments can be repeated. Nothing of the engine uses it.

One request at a time on one GPU: a prefill bound by compute, a decode bound by reading the weights, and a cache of
prompts rather than of blocks. Formulas, constants and the sizes of GPUs and models are those of Kavier
(arXiv 2605.25247; github.com/atlarge-research/Kavier, `src/kavier/sdk/inference/` and `src/kavier/sdk/io/constants.py`
at commit 033b892; the cache is `core/cache.py`), also where ours differ: a model is its rounded number of parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.workload import Workload

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

Scope = Literal["session", "global"]

COMPUTE_SHARE: Final = 0.30  # of the tensor cores' peak (Kavier: COMPUTE_EFFICIENCY)
MEMORY_SHARE: Final = 0.60  # of the memory bandwidth (Kavier: MEMORY_EFFICIENCY)
PREFILL_OVERHEAD_SECONDS: Final = 0.025
PARAMETER_BYTES: Final = 2


class Gpu(NamedTuple):
    """As Kavier's library has it."""

    flops_per_second: float
    bytes_per_second: float


# "A100" is the 80 GB PCIe card: of Kavier's entries only its 1,935 GB/s give the paper's hours.
GPUS: Final = {"A10": Gpu(125e12, 600e9), "A100": Gpu(312e12, 1935e9)}
PARAMETERS: Final = {"Llama-3-8B": 8e9, "Llama-2-13B": 13e9, "Granite-20B": 20e9, "MPT-30B": 30e9}


def prefill_seconds(prompt_tokens: npt.ArrayLike, parameters: float, gpu: Gpu) -> Floats:
    """A fixed overhead and 2 FLOP a parameter and token, at COMPUTE_SHARE of the peak; attention costs nothing."""
    per_token = 2.0 * parameters / (gpu.flops_per_second * COMPUTE_SHARE)
    return PREFILL_OVERHEAD_SECONDS + np.asarray(prompt_tokens, np.float64) * per_token


def decode_seconds(output_tokens: npt.ArrayLike, parameters: float, gpu: Gpu, *, kv_cache: bool = True) -> Floats:
    """Each token computes or reads all parameters, whichever takes longer; the KV cache costs nothing to read.

    Without a KV cache token i takes as long as i tokens: n (n + 1) / 2 for n of them. The prompt is not recomputed.
    """
    compute = 2.0 * parameters / (gpu.flops_per_second * COMPUTE_SHARE)
    memory = PARAMETER_BYTES * parameters / (gpu.bytes_per_second * MEMORY_SHARE)
    tokens = np.asarray(output_tokens, np.float64)
    passes = tokens if kv_cache else np.asarray(tokens * (tokens + 1.0) / 2.0)
    return passes * max(compute, memory)


def recompute_seconds(
    prompt_tokens: npt.ArrayLike, output_tokens: npt.ArrayLike, parameters: float, gpu: Gpu
) -> Floats:
    """Not Kavier's: a decode without a KV cache, each token being a forward pass over all tokens before it.

    Such a pass is a prefill, so its tokens cost what prefilled tokens cost, and reading the weights once is the least.
    """
    prompt, counts = np.asarray(prompt_tokens, np.float64), np.asarray(output_tokens, np.int64)
    per_token = 2.0 * parameters / (gpu.flops_per_second * COMPUTE_SHARE)
    least = PARAMETER_BYTES * parameters / (gpu.bytes_per_second * MEMORY_SHARE)
    passes = np.repeat(prompt, counts) + _one_to(counts)
    seconds = np.maximum(passes * per_token, least)
    total = np.zeros(seconds.size + 1)
    np.cumsum(seconds, out=total[1:])
    ends = np.cumsum(counts)
    return np.asarray(total[ends] - total[ends - counts])


def _one_to(counts: Ints) -> Floats:
    """1 .. n for each n, one after the other."""
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return (np.arange(before.size) - before + 1).astype(np.float64)


# --- the cache of prompts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefixPolicy:
    """Kavier's prefix cache: least recently used, keyed by a prompt's first `min_tokens` tokens.

    A prompt that short of them is not looked up. On a hit the whole prefill is skipped (`prefill`), or prefill and
    decode (`full`), however much longer the prompt is than what matched. `session`: the session is part of the key,
    while the entries are shared by all of them.
    """

    action: Literal["none", "prefill", "full"] = "prefill"
    min_tokens: int = 1024
    entries: int = 10_000
    scope: Scope = "session"


class Times(NamedTuple):
    """What Kavier's model says of a workload, by request."""

    prefill_seconds: Floats
    decode_seconds: Floats
    hit: Bools


def kavier_times(
    workload: Workload, parameters: float, gpu: Gpu, *, kv_cache: bool = True, policy: PrefixPolicy | None = None
) -> Times:
    """Kavier's model on a workload. Requests do not wait and do not slow each other down; arrivals play no part."""
    prefill = prefill_seconds(workload.prompt, parameters, gpu)
    decode = decode_seconds(workload.output, parameters, gpu, kv_cache=kv_cache)
    if policy is None:
        return Times(prefill, decode, np.zeros(prefill.size, bool))
    hit = prefix_hits(workload, policy)
    if policy.action in ("prefill", "full"):
        prefill = np.where(hit, 0.0, prefill)
    if policy.action == "full":
        decode = np.where(hit, 0.0, decode)
    return Times(prefill, decode, hit)


def prefix_hits(workload: Workload, policy: PrefixPolicy) -> Bools:
    """[n] which requests find their first `min_tokens` tokens, in order of arrival. Raises ValueError.

    A trace tells content by hashes of blocks; `min_tokens` must be a whole number of them. Without hashes none hits.
    """
    hashed = workload.hash_tokens > 0
    if (policy.min_tokens % workload.hash_tokens[hashed]).any():
        sizes = ", ".join(map(str, np.unique(workload.hash_tokens[hashed])))
        raise ValueError(f"{policy.min_tokens} tokens are no whole number of the trace's blocks of {sizes} tokens")
    known = hashed & (np.minimum(workload.covered, workload.prompt) >= policy.min_tokens)
    place = workload.chain_starts[:-1] + policy.min_tokens // np.maximum(workload.hash_tokens, 1) - 1
    hit = np.zeros(known.size, bool)
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    for row in np.flatnonzero(known):
        session = int(workload.session[row]) if policy.scope == "session" else 0
        key = (session, int(workload.chain[place[row]]))  # chained: it stands for all tokens up to here
        if key in cache:
            cache.move_to_end(key)
            hit[row] = True
            continue
        if len(cache) >= policy.entries:
            cache.popitem(last=False)
        cache[key] = None
    return hit


def seen_before_tokens(workload: Workload) -> Ints:
    """[n] leading prompt tokens, in whole blocks of the trace, that an earlier request had: the most to reuse."""
    seen: set[int] = set()
    tokens = np.zeros(workload.prompt.size, np.int64)
    known = np.minimum(workload.covered, workload.prompt) // np.maximum(workload.hash_tokens, 1)
    for row, start in enumerate(workload.chain_starts[:-1]):
        keys = workload.chain[start : start + known[row]].tolist()
        shared = 0
        while shared < len(keys) and keys[shared] in seen:
            shared += 1
        seen.update(keys[shared:])
        tokens[row] = shared * workload.hash_tokens[row]
    return np.minimum(tokens, np.maximum(workload.prompt - 1, 0))
