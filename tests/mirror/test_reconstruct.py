"""The workload behind counters, for counters whose workload is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kavier_twin.mirror.reconstruct import reconstruct
from kavier_twin.telemetry import EngineSample, Histogram


def sample(at: float, finished: float = 0, running: float = 0, **more: Any) -> EngineSample:
    return EngineSample(
        time_seconds=at,
        requests_finished_by_reason={"stop": finished},
        requests_running=running,
        requests_waiting=more.pop("waiting", 0),
        **more,
    )


def histogram(*values: float, limits: tuple[float, ...] = (10, 100)) -> Histogram:
    buckets = {limit: float(sum(value <= limit for value in values)) for limit in limits}
    return Histogram(buckets=buckets, sum=sum(values), count=len(values))


def test_arrivals_are_those_who_left_and_those_who_stay() -> None:
    samples = [sample(0, 5, 1, waiting=1), sample(10, 8, 2, waiting=4), sample(20, 14, 0)]
    first, second = reconstruct(samples, [0, 10, 20])
    assert (first.arrivals, first.finished, first.rate_per_second) == (7, 3, 0.7)
    assert (second.arrivals, second.finished) == (0, 6)


def test_a_window_between_samples_takes_its_share() -> None:
    windows = reconstruct([sample(0), sample(10, 10)], [0, 2.5, 10])
    assert [window.arrivals for window in windows] == [2.5, 7.5]


def test_lengths_and_hits() -> None:
    before = sample(
        0,
        prompt_tokens=1_000,
        ttft_seconds=histogram(1, 1),
        request_prompt_tokens=histogram(500, 500),
        request_generation_tokens=histogram(5, 50),
        prefix_cache_queries_tokens=1_000,
        prefix_cache_hits_tokens=100,
    )
    after = sample(
        10,
        finished=2,
        prompt_tokens=1_900,
        ttft_seconds=histogram(1, 1, 1, 1, 1),
        request_prompt_tokens=histogram(500, 500, 7, 90),
        request_generation_tokens=histogram(5, 50, 60, 200),
        prefix_cache_queries_tokens=2_000,
        prefix_cache_hits_tokens=850,
    )
    (window,) = reconstruct([before, after], [0, 10])
    assert (window.prompt_tokens_mean, window.output_tokens_mean, window.hit_ratio) == (300, 130, 0.75)
    assert window.first_tokens == 3
    assert window.prompt_tokens == {(0, 10): 1, (10, 100): 1, (100, math.inf): 0}
    assert window.output_tokens == {(0, 10): 0, (10, 100): 1, (100, math.inf): 1}


def test_what_is_not_reported_is_not_known() -> None:
    bare = [EngineSample(time_seconds=at, generation_tokens=at) for at in (0, 10)]
    (window,) = reconstruct(bare, [0, 10])
    assert (window.arrivals, window.finished) == (0, 0)
    assert all(map(math.isnan, (window.prompt_tokens_mean, window.output_tokens_mean, window.hit_ratio)))
    assert window.prompt_tokens == {}


def test_a_restart_told_by_the_start_time() -> None:
    """Also where the new process has counted more than the old one. Requests that died had come."""
    samples = [
        sample(0, 10, 2, started_seconds=-100.0),
        sample(10, 12, 3, started_seconds=-100.0),
        sample(20, 15, 1, started_seconds=15.0),
    ]
    first, second = reconstruct(samples, [0, 10, 20])
    assert (first.arrivals, second.arrivals, second.finished) == (3, 16, 15)


def test_a_restart_told_by_a_counter_alone() -> None:
    samples = [sample(0, 10, prompt_tokens=500), sample(10, 12, prompt_tokens=100)]
    (window,) = reconstruct(samples, [0, 10])
    assert (window.arrivals, window.finished) == (12, 12)


def test_engines_are_added_and_each_counts_from_its_first_sample() -> None:
    samples = [
        sample(0, 0, pod="a"),
        sample(20, 20, pod="a"),
        sample(10, 1_000, pod="b"),  # joins, with a past
        sample(20, 1_005, pod="b"),
        sample(10, 500, pod="b", engine="1"),
        sample(20, 501, pod="b", engine="1"),
    ]
    windows = reconstruct(reversed(samples), [0, 10, 20])
    assert [window.arrivals for window in windows] == [10, 16]


def test_engines_with_other_buckets_are_added_by_interval() -> None:
    samples = [
        sample(at, pod=pod, request_prompt_tokens=histogram(*values, limits=limits))
        for pod, limits in (("a", (10.0, 100.0)), ("b", (10.0, 50.0)))
        for at, values in ((0, ()), (10, (5.0, 20.0)))
    ]
    (window,) = reconstruct(samples, [0, 10])
    assert window.prompt_tokens == {
        (0, 10): 2,
        (10, 100): 1,
        (100, math.inf): 0,
        (10, 50): 1,
        (50, math.inf): 0,
    }


@pytest.mark.parametrize("edges", [[], [1.0], [1.0, 1.0], [2.0, 1.0]])
def test_edges_must_rise(edges: list[float]) -> None:
    with pytest.raises(ValueError, match="two edges"):
        reconstruct([], edges)


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans(), st.integers(-2, 2)), min_size=2, max_size=40
    ),
    told=st.booleans(),
    data=st.data(),
)
def test_no_request_is_lost_or_invented(steps: list[tuple[int, int, bool, int]], told: bool, data: Any) -> None:
    """Whatever came between samples: arrivals add up, up to what a process counted after its last sample, and up to
    gauges read a little before or after the counter.
    """
    came = inside = finished = 0
    started, samples = 0.0, []
    for at, (arriving, leaving, restart, noise) in enumerate(steps):
        if restart and finished:
            inside = finished = 0
            started = float(at)
        inside += arriving
        came += arriving
        left = min(leaving, inside)
        inside -= left
        finished += left
        gauge = max(0, inside + noise)
        start = {"started_seconds": started} if told else {}
        tokens = float(10 * finished)
        samples.append(sample(at, finished, gauge, generation_tokens=tokens, **start))
    first = samples[0].requests_finished_by_reason["stop"] + (samples[0].requests_running or 0)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(steps) - 1), max_size=5)) | {0, len(steps)})
    windows = reconstruct(samples, cuts)
    assert all(window.arrivals >= 0 for window in windows)
    total = sum(window.arrivals for window in windows)
    if told:
        restarts = len({one.started_seconds for one in samples})
        assert abs(total - (came - first)) <= 4 * restarts
    whole = reconstruct(samples, [0, len(steps)])[0]
    assert total == pytest.approx(whole.arrivals)
