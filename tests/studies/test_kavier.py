"""Kavier's model: the paper's figures, and its cache of prompts against one that looks at the tokens themselves."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kavier_twin.simulation.workload import Workload, make_workload
from kavier_twin.studies.kavier.model import (
    GPUS,
    PARAMETERS,
    PrefixPolicy,
    decode_seconds,
    kavier_times,
    prefill_seconds,
    prefix_hits,
    recompute_seconds,
    seen_before_tokens,
)

A10, LLAMA = GPUS["A10"], PARAMETERS["Llama-3-8B"]
BLOCK = 4

prompts = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), min_size=1, max_size=24)), min_size=1, max_size=40
)


def workload_of_tokens(rows: list[tuple[int, list[int]]]) -> Workload:
    """Each full block's hash is that of its tokens; the workload chains them."""
    blocks = [
        [hash(tuple(tokens[i : i + BLOCK])) for i in range(0, len(tokens) - BLOCK + 1, BLOCK)] for _, tokens in rows
    ]
    counts = [len(own) for own in blocks]
    return make_workload(
        np.arange(len(rows)),
        [len(tokens) for _, tokens in rows],
        1,
        chain=np.array([key & (2**64 - 1) for own in blocks for key in own], np.uint64),
        chain_starts=np.concatenate([[0], np.cumsum(counts)]),
        hash_tokens=BLOCK,
        covered=[count * BLOCK for count in counts],
        session=[session for session, _ in rows],
    )


@given(
    prompts,
    st.sampled_from([BLOCK, 2 * BLOCK, 3 * BLOCK]),
    st.integers(1, 5),
    st.sampled_from(["session", "global"]),
)
def test_the_cache_of_prompts_by_their_tokens(rows, min_tokens, entries, scope) -> None:
    kept: list[tuple] = []  # least recently used first
    expected = []
    for session, tokens in rows:
        key = (session if scope == "session" else None, tuple(tokens[:min_tokens]))
        looked_up = len(tokens) >= min_tokens
        expected.append(looked_up and key in kept)
        if looked_up:
            kept = [other for other in kept if other != key][-(entries - 1) :] if entries > 1 or key in kept else []
            kept = [*kept, key]
    policy = PrefixPolicy("prefill", min_tokens, entries, scope)
    assert prefix_hits(workload_of_tokens(rows), policy).tolist() == expected


@given(prompts)
def test_tokens_seen_before_by_the_tokens_themselves(rows) -> None:
    expected = []
    for number, (_, tokens) in enumerate(rows):
        shared = 0
        for _, earlier in rows[:number]:
            same = 0
            while same < min(len(tokens), len(earlier)) // BLOCK * BLOCK and tokens[same] == earlier[same]:
                same += 1
            shared = max(shared, same // BLOCK * BLOCK)
        expected.append(min(shared, len(tokens) - 1))
    assert seen_before_tokens(workload_of_tokens(rows)).tolist() == expected


def test_what_a_hit_skips() -> None:
    workload = workload_of_tokens([(0, [1] * 8), (0, [1] * 8), (1, [1] * 8)])
    for action, prefill, decode in (("none", 3, 3), ("prefill", 2, 3), ("full", 2, 2)):
        times = kavier_times(workload, LLAMA, A10, policy=PrefixPolicy(action, 8))
        assert times.hit.tolist() == [False, True, False]
        assert np.count_nonzero(times.prefill_seconds) == prefill
        assert np.count_nonzero(times.decode_seconds) == decode
    shared = kavier_times(workload, LLAMA, A10, policy=PrefixPolicy("prefill", 8, scope="global"))
    assert shared.hit.tolist() == [False, True, True]


def test_an_unknown_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of the trace's blocks of 4 tokens"):
        prefix_hits(workload_of_tokens([(0, [1] * 8)]), PrefixPolicy(min_tokens=6))


def test_a_decode_without_kv_cache() -> None:
    one = float(decode_seconds(1, LLAMA, A10))
    assert decode_seconds(100, LLAMA, A10, kv_cache=False) == pytest.approx(5050 * one)
    per_token = 2 * LLAMA / (0.30 * 125e12)
    prompt, output = np.array([10, 500, 0]), np.array([3, 200, 0])
    slow = [sum(max(one, (p + i) * per_token) for i in range(1, n + 1)) for p, n in zip(prompt, output, strict=True)]
    assert recompute_seconds(prompt, output, LLAMA, A10) == pytest.approx(slow)


def test_the_paper_s_predictions(shared_data: Path) -> None:
    """All 18 predicted figures, cut to milliseconds as in the paper; a decode includes a prompt of 7 tokens."""
    with (shared_data / "kavier" / "prefill_decode_accuracy.csv").open() as file:
        points = list(csv.DictReader(file))
    with (shared_data / "kavier" / "input_decode_accuracy.csv").open() as file:
        outputs = {row["session_id"]: int(row["num_output_tokens"]) for row in csv.DictReader(file)}
    assert len(points) == 9
    for point in points:
        prefill = prefill_seconds(int(point["prompt_size"]), LLAMA, A10)
        decode = prefill_seconds(7, LLAMA, A10) + decode_seconds(outputs[point["prompt_size"]], LLAMA, A10)
        for name, seconds in (("kavier_prefill", prefill), ("kavier_decode", decode)):
            assert int(seconds * 1000.0 + 1e-6) == round(float(point[name]) * 1000.0)
