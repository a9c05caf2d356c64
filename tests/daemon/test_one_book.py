"""Scores take what the mirror applied: the order in which records came, and ends that never came, do not show."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.traces import read_trace
from daemon.one_book import FLEET, KNOWN_ENGINE, Event, forecast_settings, served, stream_of, synthetic, without_ends
from forecast.forecasts import forecast_of, row
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.recordings.recording import recorded_engine, recorded_samples
from kavier_twin.simulation.settings import FleetSettings, StepTime
from kavier_twin.telemetry import EngineSample, GpuSample, RequestFinished, RequestSeen

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"
LATENESS_SECONDS = 2.0

Told = Event | GpuSample


def scores_of(stream: list[Told]) -> tuple[object, ...]:
    """All that a pool knows for its scores after this stream, and what it judged by it."""
    mirror = MirrorSettings(ordering_seconds=LATENESS_SECONDS, give_up_seconds=12.0)  # some end after all
    pool = PoolTwin(FLEET, mirror, forecast_settings((10.0,), 1))
    for second in range(0, 40, 5):
        today = row("today", 10.0, {0.05: 0.5, 0.5: 1.0, 0.95: 1.5}, 0.1)
        pool.scores.judge(forecast_of(float(second), today), "today")
    for record in stream:
        pool.ingest([record], more=False, ended=False)
    pool.ingest([], more=False, ended=True)
    assert set(pool.scores.save(1).document["reality"]["live"]) == set(pool.mirror.fold.running)
    pool.scores.judge(forecast_of(500.0, row("today", 10.0, {0.5: 1.0}, 0.1)), "today")
    saved = pool.scores.save(1)
    arrays = {name: array.tobytes() for name, array in saved.arrays.items()}
    return json.dumps(saved.document), arrays, pool.scores.scores


@st.composite
def streams(draw: st.DrawFn) -> list[Told]:
    """Requests, some of which never end, and samples of an engine and a GPU, in order of time."""
    stream: list[Told] = []
    for number in range(draw(st.integers(1, 25))):
        begin = draw(st.floats(0.0, 40.0))
        stream.append(RequestSeen(id=str(number), time_seconds=begin, prompt_tokens=draw(st.integers(1, 200))))
        seconds = draw(st.floats(0.01, 20.0))
        if draw(st.integers(0, 4)):
            told = {"ttft_seconds": 0.5 * seconds, "e2e_seconds": seconds} if draw(st.booleans()) else {}
            tokens = draw(st.integers(1, 300))
            end = RequestFinished(id=str(number), time_seconds=begin + seconds, output_tokens=tokens, **told)
            stream.append(end)
    for second in range(0, 40, 4):
        stream.append(EngineSample(time_seconds=float(second), pod="a", preemptions=float(second % 12)))
        stream.append(GpuSample(time_seconds=float(second), gpu="0", power_watts=float(second)))
    return sorted(stream, key=lambda record: record.time_seconds)


@given(streams(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_the_order_of_records_does_not_show(stream: list[Told], seed: int) -> None:
    """Each comes within the lateness, some twice, also an end before its arrival."""
    rng = random.Random(seed)
    arrivals = [(record.time_seconds + rng.uniform(0.0, LATENESS_SECONDS), record) for record in stream]
    arrivals += [(time + rng.uniform(0.0, 5.0), record) for time, record in arrivals if rng.random() < 0.3]
    shuffled = [record for _, record in sorted(arrivals, key=lambda arrival: arrival[0])]
    assert scores_of(shuffled) == scores_of(stream)


def test_a_fork_applies_nothing() -> None:
    mirror = Mirror(MirrorSettings(give_up_seconds=10.0), FLEET)
    mirror.ingest(RequestSeen(id="a", time_seconds=0.0, prompt_tokens=10))
    mirror.ingest(RequestSeen(id="b", time_seconds=9.0, prompt_tokens=10))
    mirror.advance()
    fork = mirror.fork()
    assert fork.advance(100.0) == []
    assert fork.load() == (0, 0, 0.0)
    applied = [type(event).__name__ for event in mirror.advance(100.0)]
    assert applied.count("Arrived") == 1  # the first has arrived before
    assert applied.count("GivenUp") == 2


def test_requests_made_up_from_metrics_are_scored_like_real_ones() -> None:
    trace = read_trace(RECORDING)
    fleet = FleetSettings(engine=recorded_engine(trace), step_time=StepTime(fixed=0.03))
    pool = PoolTwin(fleet, from_metrics=True)
    for sample in recorded_samples(trace):
        pool.ingest([sample], more=False, ended=False)
        assert set(pool.scores.save(1).document["reality"]["live"]) == set(pool.mirror.fold.running)
    assert pool.scores.save(1).arrays["requests"].shape[0] == pool.mirror.finished > 300


# What is served of these in the streams below is so little that a single request decides about it.
LEAST = {"requests_waiting": 0.05}


def check(lossless: dict, lossy: list[dict], step_seconds: float) -> None:
    """Every KPI served is within 5 % of that without loss (a ratio: 0.05), or within one step of the engine."""
    assert len(lossless) > 10
    for (horizon, metric), value in lossless.items():
        found = sum(one[horizon, metric] for one in lossy) / len(lossy)
        allowed = 0.05 if metric.endswith("_ratio") else 0.05 * abs(value)
        if metric.endswith("_seconds"):
            allowed = max(allowed, step_seconds)
        assert abs(found - value) <= max(allowed, LEAST.get(metric, 0.0)), (horizon, metric, value, found)


def served_of(stream: list[Event]) -> dict:
    pool = PoolTwin(FLEET, KNOWN_ENGINE, forecast_settings((60.0, 120.0), 6), calibrated=True)
    return served(stream, pool, first_seconds=300.0, every_seconds=20.0)


@pytest.fixture(scope="module")
def lossless() -> tuple[list[Event], dict]:
    stream = stream_of(synthetic(700.0, 5.0, 150.0))
    return stream, served_of(stream)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0025, 0.01, 0.05])
def test_ends_that_never_come_do_not_show_in_what_is_served(share: float, lossless: tuple[list[Event], dict]) -> None:
    stream, expected = lossless
    check(expected, [served_of(without_ends(stream, share, seed)) for seed in range(2)], FLEET.step_time.fixed)


@pytest.mark.slow
def test_nor_do_they_on_a_real_server() -> None:
    trace = read_trace(RECORDING)
    stream = stream_of(trace.records, recorded_samples(trace))
    # As fitted to all of it: how far a fit moves with a request more or less is another matter.
    step_time = StepTime(fixed=0.0133, per_prefill_token=0.0003, per_decode_sequence=0.00278, per_context_token=4e-7)
    fleet = FleetSettings(engine=recorded_engine(trace), step_time=step_time)

    def run(events: list[Event]) -> dict:
        pool = PoolTwin(fleet, KNOWN_ENGINE, forecast_settings((60.0,), 16), calibrated=True)
        return served(events, pool, first_seconds=100.0, every_seconds=10.0)

    lossy = [run(without_ends(stream, 0.05, seed)) for seed in range(3)]
    check(run(stream), lossy, 0.02)
