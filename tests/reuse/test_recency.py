"""The recency stack and the hit curve, beside a plain LRU cache of each size."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kavier_twin.reuse.curve import FACTORS
from kavier_twin.reuse.recency import RecencyStack
from kavier_twin.reuse.watch import Content, ReuseWatch
from kavier_twin.simulation.workload import make_workload

BLOCK = 4


class PlainLru:
    """Free blocks of one cache in the order of eviction, as vLLM frees them; one request runs at a time."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.cached: OrderedDict[int | str, None] = OrderedDict()

    def serve(self, keys: list[int], most: int, private: list[str]) -> int:
        hits = 0
        while hits < min(most, len(keys)) and keys[hits] in self.cached:
            hits += 1
        named: list[int | str] = [*keys, *private]
        for key in reversed(named):
            self.cached.pop(key, None)
            self.cached[key] = None
        while len(self.cached) > self.blocks:
            self.cached.popitem(last=False)
        return hits


def requests(most: int = 40) -> st.SearchStrategy[list[tuple[list[int], int, int]]]:
    """Contents, tokens beyond the last full block of the prompt, and output tokens."""
    request = st.tuples(
        st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, BLOCK - 1), st.integers(1, 9)
    )
    return st.lists(request, min_size=1, max_size=most)


def chained(contents: list[int]) -> np.ndarray:
    return make_workload([0.0], 1, 1, chain=contents, chain_starts=[0, len(contents)]).chain


@settings(deadline=None)
@given(requests(), st.integers(6, 30))
def test_one_pass_gives_the_hits_of_a_plain_lru_cache_of_every_size(
    served: list[tuple[list[int], int, int]], capacity: int
) -> None:
    watch = ReuseWatch(BLOCK, capacity + 1, window_seconds=math.inf)
    caches = [PlainLru(int(blocks)) for blocks in watch.curve.capacities]
    hits, prompts = [0] * len(caches), 0
    for number, (contents, rest, output) in enumerate(served):
        chain = chained(contents)
        prompt = len(contents) * BLOCK + rest
        content = Content(chain, BLOCK, len(contents) * BLOCK)
        watch.admitted(number, 2.0 * number, 0, prompt, content, output)
        watch.ended(number, 2.0 * number + 1.0, 0, output, content)
        prompts += prompt
        private = (prompt + output - 1) // BLOCK - len(contents)
        for at, cache in enumerate(caches):
            names = [f"{number}/{block}" for block in range(private)]
            hits[at] += BLOCK * cache.serve(chain.tolist(), (prompt - 1) // BLOCK, names)
    # Caches too small for a whole request serve none in reality.
    big = watch.curve.capacities >= 8
    np.testing.assert_allclose(watch.hit_ratios()[big], (np.array(hits) / prompts)[big], atol=1e-12)


@settings(deadline=None)
@given(requests(), st.integers(8, 20))
def test_a_bounded_stack_is_the_top_of_an_unbounded_one(served: list[tuple[list[int], int, int]], most: int) -> None:
    bounded, whole = RecencyStack(most), RecencyStack(10**9)
    for number, (contents, _, private) in enumerate(served):
        keys = chained(contents).tolist()
        ones = [1] * len(keys)
        expected = [run for run in whole.look_up(keys, ones) if run.frame and run.depth + run.blocks <= most]
        found = [run for run in bounded.look_up(keys, ones) if run.frame]
        assert [(run.keys, run.depth) for run in found[: len(expected)]] == [(run.keys, run.depth) for run in expected]
        for stack in (bounded, whole):
            stack.end(stack.admit(keys, ones, private), float(number), keys, ones, private)
        assert bounded.held_blocks == whole.held_blocks == 0
        assert bounded.free_blocks < most + 5 + 9  # the oldest frame may reach below


def test_a_pass_that_tracks_few_keys_is_near_one_that_tracks_all() -> None:
    rng = np.random.default_rng(1)
    exact = ReuseWatch(16, 2_001, window_seconds=math.inf)
    sampled = ReuseWatch(16, 2_001, window_seconds=math.inf, most_keys=1_000)
    for number in range(4_000):
        group, blocks = int(rng.zipf(1.2)) % 500, int(rng.integers(20, 60))
        chain = chained([group * 1_000 + block for block in range(blocks)])
        content = Content(chain, 16, 16 * blocks)
        for watch in (exact, sampled):
            watch.admitted(number, float(number), 0, 16 * blocks + 1, content, 1)
            watch.ended(number, number + 0.5, 0, 1, content)
    assert sampled.sampled >= 4
    np.testing.assert_allclose(sampled.hit_ratios(), exact.hit_ratios(), atol=0.03)
    assert np.ptp(exact.hit_ratios()) > 0.1


def test_what_running_requests_hold_is_above_all_that_is_free() -> None:
    watch = ReuseWatch(BLOCK, 11, window_seconds=math.inf)
    first, second = (Content(chained([name] * 4), BLOCK, 16) for name in (1, 2))
    watch.admitted("a", 0.0, 0, 17, first, 1)
    watch.ended("a", 1.0, 0, 1, first)
    watch.admitted("b", 2.0, 0, 33, second, 0)  # holds 9 blocks from here on
    watch.admitted("again", 3.0, 0, 17, first, 1)
    blocks = watch.hit_ratios() * watch.curve.prompt_tokens / BLOCK
    np.testing.assert_allclose(blocks, np.clip(watch.curve.capacities - 9, 0, 4))
    assert blocks[FACTORS == 1.0] == 1


def test_a_window_forgets_what_is_older() -> None:
    watch = ReuseWatch(BLOCK, 101, window_seconds=60.0)
    content = Content(chained([1, 2, 3]), BLOCK, 12)
    for number, time in enumerate((0.0, 1.0, 1_000.0)):
        watch.admitted(number, time, 0, 13, content, 1)
        watch.ended(number, time + 0.5, 0, 1, content)
    assert watch.curve.prompt_tokens == 13
    np.testing.assert_allclose(watch.hit_ratios(), 12 / 13)


@settings(deadline=None)
@given(st.integers(1, 40), st.sampled_from([4, 8, 12, 16]), st.integers(0, 3), st.integers(1, 3))
def test_coarse_and_fine_hashes_of_one_prompt_hit_alike(blocks: int, coarse: int, rest: int, times: int) -> None:
    """The hits of a prompt that comes again do not depend on how many tokens a hash stands for."""
    prompt = blocks * BLOCK + rest
    for tokens in (2, BLOCK, coarse):
        watch = ReuseWatch(BLOCK, 10_001, window_seconds=math.inf)
        chain = chained(list(range(-(-prompt // tokens))))
        content = Content(chain, tokens, prompt)
        for number in range(1 + times):
            watch.admitted(number, 2.0 * number, 0, prompt, content, 1)
            watch.ended(number, 2.0 * number + 1.0, 0, 1, content)
        assert watch.points()[-1].hit_ratio * watch.curve.prompt_tokens == pytest.approx(
            times * BLOCK * ((prompt - 1) // BLOCK)
        )
