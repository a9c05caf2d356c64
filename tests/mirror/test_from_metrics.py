"""A request stream made up from metrics: beside the requests that really came, and what a mirror makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.prometheus.engines import engine_samples
from connectors.prometheus.readings import parse_exposition
from connectors.traces import read_trace
from connectors.traces.recording import read_metrics
from kavier_twin.mirror.fidelity.windows import find_score
from kavier_twin.mirror.from_metrics import Event, MetricsStream, mirror_settings
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import EngineSample, Histogram, RequestFinished, RequestSeen

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"
ENGINE = EngineSettings(
    block_size=32,
    num_gpu_blocks=400,
    max_num_seqs=16,
    max_num_batched_tokens=1024,
    max_model_len=4096,
    async_scheduling=False,
)


@pytest.fixture(scope="module")
def samples() -> list[EngineSample]:
    """One in fourteen seconds, about as often as Prometheus scrapes by default, and the last one."""
    scrapes = read_metrics(RECORDING)
    found = []
    for at, text in [*scrapes[::7], scrapes[-1]]:
        found += engine_samples(
            parse_exposition(text), lambda _: None, time_seconds=at, pool="chat", namespace="n", pod="vllm-0"
        )
    return found


def stream_of(samples: list[EngineSample]) -> list[Event]:
    stream, events = MetricsStream("chat", ENGINE), []
    for sample in samples:
        stream.take(sample)
        events += stream.due()
    return events


def test_is_like_the_requests_that_came(samples: list[EngineSample]) -> None:
    events, real = stream_of(samples), list(read_trace(RECORDING).records)
    seen = [event for event in events if isinstance(event, RequestSeen)]
    finished = [event for event in events if isinstance(event, RequestFinished)]
    assert [event.time_seconds for event in events] == sorted(event.time_seconds for event in events)
    assert len(seen) == pytest.approx(len(real), rel=0.02)
    assert {event.id for event in finished} <= {event.id for event in seen}
    assert len(finished) == pytest.approx(len(real), rel=0.02)
    prompt_tokens, real_tokens = (sum(entry.prompt_tokens for entry in entries) for entries in (seen, real))
    assert prompt_tokens == pytest.approx(real_tokens, rel=0.05)
    assert sum(event.output_tokens for event in finished) == pytest.approx(sum(r.output_tokens for r in real), rel=0.05)
    shared = sum(len(event.block_hashes) * (event.block_tokens or 0) for event in seen)
    assert shared / prompt_tokens == pytest.approx(sum(r.cached_tokens or 0 for r in real) / real_tokens, abs=0.01)
    mean = sum(event.e2e_seconds or 0.0 for event in finished) / len(finished)
    assert mean == pytest.approx(sum(r.e2e_seconds or 0.0 for r in real) / len(real), rel=0.05)


def test_a_mirror_follows_it(samples: list[EngineSample]) -> None:
    settings = FleetSettings(engine=ENGINE, step_time=StepTime(fixed=0.015))
    mirror, stream = Mirror(mirror_settings(MirrorSettings(pool="chat")), settings), MetricsStream("chat", ENGINE)
    for sample in samples:
        stream.take(sample)
        stream.lead(mirror)
        mirror.advance()
    scores = mirror.windows.scores(mirror.time_seconds)
    assert mirror.calibrated
    most = {("prefix_cache_hit_ratio", ""): 0.01, ("e2e_seconds", "mean"): 0.2, ("ttft_seconds", "mean"): 0.5}
    found = {key: score for key in most if (score := find_score(scores, *key)) is not None}
    assert found.keys() == most.keys()
    assert all(abs(found[key].error) < error for key, error in most.items()), found


def test_the_same_samples_make_the_same_stream_across_a_restart(samples: list[EngineSample]) -> None:
    first, events = MetricsStream("chat", ENGINE), []
    for sample in samples[:7]:
        first.take(sample)
    events += first.due()
    second = MetricsStream("chat", ENGINE)
    second.restore(json.loads(json.dumps(first.save())))
    for sample in samples[6:]:  # one of them again
        second.take(sample)
        events += second.due()
    assert events == stream_of(samples)


def counted(at: float, finished: int = 0, running: int = 0, waiting: int = 0, **more: Any) -> EngineSample:
    done = Histogram(buckets={100.0: finished}, sum=50.0 * finished, count=finished)
    seconds = Histogram(buckets={2.0: finished}, sum=1.0 * finished, count=finished)
    return EngineSample(
        time_seconds=at,
        pod=more.pop("pod", "vllm-0"),
        requests_finished_by_reason={"stop": finished},
        requests_running=running,
        requests_waiting=waiting,
        request_prompt_tokens=done,
        request_generation_tokens=done,
        e2e_seconds=seconds,
        **more,
    )


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_as_many_are_inside_as_the_engine_says(steps: list[tuple[int, int, int]]) -> None:
    """At each sample; whatever the gauges do, as long as requests are conserved."""
    stream, inside, ended, total = MetricsStream("p", ENGINE), set[str](), 0, 0
    for number, (came, left, waiting) in enumerate(steps):
        left = min(left, total + came)
        total += came - left
        ended += left
        stream.take(counted(10.0 * number, ended, total - min(waiting, total), min(waiting, total)))
        for event in stream.due():
            if isinstance(event, RequestSeen):
                assert event.id not in inside
                inside.add(event.id)
            else:
                inside.remove(event.id)
        assert len(inside) == total


def test_samples_close_together_tell_no_more_than_some_of_them() -> None:
    often = [counted(0.5 * number, number // 2, number % 3) for number in range(41)]
    assert stream_of(often) == stream_of(often[::10])


def test_a_restart_ends_what_was_inside() -> None:
    stream = MetricsStream("p", ENGINE)
    stream.take(counted(0.0, 100, 0, started_seconds=-1_000.0))
    stream.take(counted(10.0, 110, 5, started_seconds=-1_000.0))
    stream.take(counted(20.0, 3, 2, started_seconds=12.0))
    events = stream.due()
    aborted = [e for e in events if isinstance(e, RequestFinished) and e.finish_reason == "abort"]
    assert len(aborted) == 5
    assert {event.time_seconds for event in aborted} == {10.0}
    assert sum(isinstance(event, RequestSeen) for event in events) == 15 + 5


def test_an_engine_that_is_gone_takes_its_requests_along() -> None:
    """Pods come and go for months: nothing of them may stay."""
    stream = MetricsStream("p", ENGINE)
    for number in range(100):
        stream.take(counted(number * 1_000.0, running=3, pod=f"vllm-{number}"))
    events = stream.due()
    assert len(stream.save()["engines"]) == 1
    assert sum(isinstance(event, RequestSeen) for event in events) == 300
    assert sum(isinstance(event, RequestFinished) for event in events) == 297


def test_engines_scraped_at_other_times_are_waited_for_until_they_are_silent() -> None:
    stream = MetricsStream("p", ENGINE)
    for at in (0.0, 15.0):
        stream.take(counted(at, round(at), pod="a"))
        stream.take(counted(at + 7.0, round(at), pod="b"))
    assert max(event.time_seconds for event in stream.due()) <= 15.0
    stream.take(counted(30.0, 30, pod="a"))
    assert 15.0 < max(event.time_seconds for event in stream.due()) <= 22.0
    stream.take(counted(90.0, 90, pod="a"))
    assert max(event.time_seconds for event in stream.due()) > 80.0
