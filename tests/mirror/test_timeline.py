"""State is a function of the set of events: late ones take their place, and phantoms give way to records."""

from __future__ import annotations

import math
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kavier_twin.mirror import mirror_state
from kavier_twin.mirror.checkpoint_file import Saved
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.mirror.phantoms import is_phantom
from kavier_twin.recordings.recording import read_recording
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import EngineSample, RequestFinished, RequestSeen, TelemetryRecord

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"
ENGINE = EngineSettings(block_size=32, num_gpu_blocks=400, max_num_seqs=16, max_num_batched_tokens=1024)
FLEET = FleetSettings(engine=ENGINE, step_time=StepTime(fixed=0.015))
SETTINGS = MirrorSettings(calibrate_after_requests=60, recalibrate_every_requests=60)
LATEST_SECONDS = 600.0
BACK_EVERY_SECONDS = 30.0  # less often than a daemon, which has the time


@pytest.fixture(scope="module")
def events() -> list[TelemetryRecord]:
    """Requests and, every six seconds, what the engine said, on one clock that begins at 1,000 s."""
    trace, samples = read_recording(RECORDING)
    found: list[TelemetryRecord] = []
    for record in trace.records:
        moved = record.model_copy(update={"time_seconds": record.time_seconds + 1_000.0, "pod": "vllm-0"})
        found += [moved.seen(), *([finished] if (finished := moved.finished()) is not None else [])]
    for sample in samples[::3]:
        moved_to = {"time_seconds": sample.time_seconds + 1_000.0, "pod": "vllm-0", "namespace": ""}
        found.append(sample.model_copy(update=moved_to))
    return sorted(found, key=lambda event: event.time_seconds)


def mirrored(arrivals: list[tuple[float, TelemetryRecord]], until: float) -> Mirror:
    """What a mirror makes of records that arrive at these times, by a clock that goes on to `until`."""
    mirror = Mirror(SETTINGS, FLEET)
    back_at = -math.inf
    for at, record in sorted(arrivals, key=lambda arrival: arrival[0]):
        mirror.ingest(record)
        mirror.advance(at, go_back=at >= back_at)
        back_at = max(back_at, at + BACK_EVERY_SECONDS) if at >= back_at else back_at
    mirror.advance(until)
    mirror.advance(until)
    return mirror


def state(mirror: Mirror) -> tuple[object, ...]:
    fold = mirror.fold
    arrays = tuple(array.tobytes() for array in fold.fleet.state)
    return arrays, fold.finished, fold.running, fold.pods.save(), fold.calibration, fold.online.save(), fold.loads


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32), duplicates=st.integers(0, 30))
@example(seed=20093, duplicates=0)  # the fork before an event was dropped while the event waited to be folded
def test_any_delay_and_order_end_in_the_same_bytes(events: list[TelemetryRecord], seed: int, duplicates: int) -> None:
    rng = random.Random(seed)
    some = events[: len(events) // 4]
    until = some[-1].time_seconds + LATEST_SECONDS
    delayed = [(e.time_seconds + rng.choice([0.0, 0.1, 3.0, 60.0, LATEST_SECONDS]) * rng.random(), e) for e in some]
    delayed += [delayed[rng.randrange(len(delayed))] for _ in range(duplicates)]
    plain = mirrored([(event.time_seconds, event) for event in some], until)
    assert state(mirrored(delayed, until)) == state(plain)
    assert plain.finished > 0


def test_an_outage_of_the_stream_is_made_up_for_and_made_good(events: list[TelemetryRecord]) -> None:
    """While no record comes the mirror holds what the engine says; when they come it is as if they never were late."""
    begin, end = 1_080.0, 1_140.0
    until = events[-1].time_seconds + 30.0
    arrivals = []
    for event in events:
        away = begin < event.time_seconds < end and not isinstance(event, EngineSample)
        arrivals.append((end if away else event.time_seconds, event))
    mirror = Mirror(SETTINGS, FLEET)
    errors = []
    for at, record in sorted(arrivals, key=lambda arrival: arrival[0]):
        mirror.ingest(record)
        mirror.advance(at)
        if isinstance(record, EngineSample) and begin + 20.0 < at < end:
            assert record.requests_running is not None
            assert record.requests_waiting is not None
            running, waiting, _ = mirror.present(at).load()
            really = record.requests_running + record.requests_waiting
            errors.append(abs(running + waiting - really))
    assert len(errors) >= 5
    assert max(errors) <= 1.0
    mirror.advance(until)
    mirror.advance(until)
    plain = mirrored([(event.time_seconds, event) for event in events], until)
    assert state(mirror) == state(plain)
    assert not any(map(is_phantom, mirror.fold.running))


def test_a_full_stream_makes_no_phantoms(events: list[TelemetryRecord]) -> None:
    mirror = mirrored([(event.time_seconds, event) for event in events], events[-1].time_seconds + 5.0)
    requests = sum(isinstance(event, RequestSeen) for event in events)
    assert mirror.fold.next_index == requests


def test_half_a_stream_is_made_whole(events: list[TelemetryRecord]) -> None:
    """A tap on every second request: the mirror has as much to do as the engine."""
    kept = [
        event
        for number, event in enumerate(events)
        if isinstance(event, EngineSample) or zlib.crc32(event.id.encode()) % 2 == 0  # type: ignore[union-attr]
    ]
    errors = []
    mirror = Mirror(SETTINGS, FLEET)
    for event in kept:
        mirror.ingest(event)
        mirror.advance(event.time_seconds)
        if isinstance(event, EngineSample) and event.requests_running is not None:
            running, waiting, _ = mirror.present(event.time_seconds).load()
            errors.append(abs(running + waiting - event.requests_running - (event.requests_waiting or 0.0)))
    assert max(errors[3:]) <= 1.0


@settings(max_examples=20, deadline=None)
@given(
    levels=st.lists(st.tuples(st.integers(0, 16), st.integers(0, 40)), min_size=2, max_size=8),
    known=st.integers(0, 10),
)
def test_the_present_holds_what_the_newest_sample_counts(levels: list[tuple[int, int]], known: int) -> None:
    """Whatever a queue does between two scrapes, and before any event that waits in the ordering buffer is applied."""
    mirror = Mirror(SETTINGS, FLEET)
    for number in range(known):
        seen = RequestSeen(id=f"r{number}", time_seconds=1_000.0 + 0.01 * number, prompt_tokens=40, pod="vllm-0")
        mirror.ingest(seen)
    finished = 0.0
    for number, (running, waiting) in enumerate(levels):
        at = 1_005.0 + 5.0 * number
        finished += max(0, known - running - waiting) if number == 0 else 3.0
        sample = EngineSample(
            time_seconds=at,
            pod="vllm-0",
            requests_running=running,
            requests_waiting=waiting,
            requests_finished_by_reason={"stop": finished},
        )
        mirror.ingest(sample)
        mirror.advance(at)
        if number > 0:
            held = sum(mirror.present(at).load()[:2])
            assert held >= running + waiting
            assert held <= max(running + waiting, known)  # a request with a record ends by its record


@pytest.mark.parametrize("most_events", [20_000, 100])
def test_a_restart_in_between_leaves_no_trace(
    events: list[TelemetryRecord], most_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint keeps what late records need, whichever fork it holds."""
    monkeypatch.setattr(mirror_state, "MOST_EVENTS", most_events)
    if most_events < 20_000:  # phantoms, and no event that is older than the fork
        events = [event for event in events if not isinstance(event, RequestSeen) or zlib.crc32(event.id.encode()) % 2]
    delay = 40.0 if most_events == 20_000 else 0.0
    late = [(e.time_seconds + (delay if isinstance(e, RequestSeen) else 0.0), e) for e in events]
    late.sort(key=lambda arrival: arrival[0])
    until = events[-1].time_seconds + 60.0
    mirror = Mirror(SETTINGS, FLEET)
    for number, (at, record) in enumerate(late):
        mirror.ingest(record)
        mirror.advance(at, go_back=number % 20 == 0)
        if number in (150, 305, 306):
            saved = mirror_state.save(mirror)
            arrays = {name: array.copy() for name, array in saved.arrays.items()}
            mirror = mirror_state.restore(Saved(saved.document, arrays), SETTINGS, FLEET)
    mirror.advance(until)
    mirror.advance(until)
    assert state(mirror) == state(mirrored(late, until))
    assert mirror.ingested["late"] == 0


def test_what_was_predicted_first_is_scored_once(events: list[TelemetryRecord]) -> None:
    rng = random.Random(5)
    late = [(event.time_seconds + 30.0 * rng.random(), event) for event in events]
    mirror = mirrored(late, events[-1].time_seconds + 60.0)
    ends = sum(isinstance(event, RequestFinished) and event.e2e_seconds is not None for event in events)
    [scored] = [
        score.observations
        for score in mirror.windows.scores(mirror.time_seconds)
        if (score.kpi, score.statistic, score.window) == ("e2e_seconds", "mean", "1h")
    ]
    assert 0.95 * ends <= scored <= ends
    assert mirror.folded_again >= 5


def test_a_fuller_record_takes_the_place_of_the_first(events: list[TelemetryRecord]) -> None:
    """An arrival that comes at once, without hashes, and again when its prompt is tokenised."""
    some = events[: len(events) // 4]
    arrivals: list[tuple[float, TelemetryRecord]] = []
    for event in some:
        if isinstance(event, RequestSeen):
            short = {"prompt_tokens": 7, "prompt_tokens_from": "estimate", "block_hashes": (), "block_tokens": None}
            arrivals.append((event.time_seconds, event.model_copy(update=short)))
            arrivals.append((event.time_seconds + 4.0, event))
        else:
            arrivals.append((event.time_seconds, event))
    until = some[-1].time_seconds + 60.0
    mirror, plain = mirrored(arrivals, until), mirrored([(event.time_seconds, event) for event in some], until)
    assert state(mirror) == state(plain)
    assert mirror.ingested["completed"] == sum(isinstance(event, RequestSeen) for event in some)


@settings(max_examples=5, deadline=None)
@given(delay=st.floats(0.0, 120.0), took=st.sampled_from([0.01, 3.0, 30.0]), tokens=st.sampled_from([0, 3]))
def test_a_refused_request_never_was_in_the_fleet(
    events: list[TelemetryRecord], delay: float, took: float, tokens: int
) -> None:
    """Whenever the record of the refusal comes. An error that took long, or that had tokens, was in an engine."""
    some = [event for event in events[: len(events) // 4] if not isinstance(event, EngineSample)]
    at, until = some[len(some) // 2].time_seconds, some[-1].time_seconds + 200.0
    seen = RequestSeen(id="refused", time_seconds=at, prompt_tokens=2_000, pod="vllm-0")
    end = RequestFinished(
        id="refused", time_seconds=at + took, output_tokens=tokens, e2e_seconds=took, finish_reason="error"
    )
    arrivals: list[tuple[float, TelemetryRecord]] = [(event.time_seconds, event) for event in [*some, seen]]
    mirror = mirrored([*arrivals, (end.time_seconds + delay, end)], until)
    assert state(mirror) == state(mirrored([*arrivals, (end.time_seconds, end)], until))
    without = mirrored([(event.time_seconds, event) for event in some], until)
    was_inside = took > 5.0 or tokens > 0
    assert mirror.fold.next_index - without.fold.next_index == was_inside
    assert mirror.ingested["refused"] == (not was_inside)
    assert mirror.finished - without.finished == was_inside
