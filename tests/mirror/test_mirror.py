"""The mirror over a stream: event time, pinned ends, honest scores."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.traces import read_trace
from effort import examples
from kavier_twin.mirror.fidelity.windows import find_score
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.recordings.simulated_reality import simulated_reality
from kavier_twin.simulation.footprint import Footprint, PowerModel
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.state import state_bytes
from kavier_twin.telemetry import CarbonSample, RequestFinished, RequestRecord, RequestSeen

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"
FLEET = FleetSettings(
    engine=EngineSettings(
        block_size=32,
        num_gpu_blocks=400,
        max_num_seqs=16,
        max_num_batched_tokens=1024,
        max_model_len=4096,
        async_scheduling=False,
    ),
    step_time=StepTime(fixed=0.015),
)


def halves(records: list[RequestRecord]) -> list[RequestSeen | RequestFinished]:
    events: list[RequestSeen | RequestFinished] = [record.seen() for record in records]
    events += [finished for record in records if (finished := record.finished()) is not None]
    return sorted(events, key=lambda event: event.time_seconds)


@pytest.fixture(scope="module")
def records() -> list[RequestRecord]:
    return read_trace(RECORDING).records


def run(events: list[RequestSeen | RequestFinished], ordering_seconds: float = 2.0) -> Mirror:
    mirror = Mirror(MirrorSettings(ordering_seconds=ordering_seconds), FLEET)
    for event in events:
        mirror.ingest(event)
        mirror.advance()
    mirror.advance(max(event.time_seconds for event in events) + 60.0)
    return mirror


def error_of(mirror: Mirror, kpi: str, statistic: str) -> float:
    """Over the last hour."""
    found = [score for score in mirror.windows.scores(mirror.time_seconds) if score.window == "1h"]
    score = find_score(found, kpi, statistic)
    assert score is not None
    return score.error


def digest(mirror: Mirror) -> tuple[bytes, ...]:
    return tuple(array.tobytes() for array in mirror.fleet.state)


def test_follows_a_real_vllm(records: list[RequestRecord]) -> None:
    mirror = run(halves(records))
    assert mirror.finished == len(records)
    assert mirror.load() == (0, 0, 0.0)
    assert mirror.calibrated
    assert abs(error_of(mirror, "prefix_cache_hit_ratio", "")) < 0.005
    assert mirror.windows.exact_ratio("prefix_cache_hit_ratio", mirror.time_seconds) > 0.995
    assert abs(error_of(mirror, "e2e_seconds", "mean")) < 0.15


@examples(8)
@given(seed=st.integers(0, 2**32), duplicates=st.integers(0, 40))
def test_order_within_the_lateness_and_duplicates_change_nothing(seed: int, duplicates: int) -> None:
    events = halves(read_trace(RECORDING).records[:150])
    rng = random.Random(seed)
    shuffled = sorted(events, key=lambda event: event.time_seconds + rng.uniform(0.0, 1.9))
    for _ in range(duplicates):
        at = rng.randrange(len(shuffled))
        shuffled.insert(at + 1, shuffled[at])
    assert digest(run(shuffled)) == digest(run(events))


def test_what_became_of_every_record_is_counted(records: list[RequestRecord]) -> None:
    events = halves(records[:50])
    unknown = RequestFinished(id="nobody", time_seconds=events[-1].time_seconds, output_tokens=3)
    mirror = run([*events, unknown, events[-1]])
    assert mirror.ingested["accepted"] == len(events) + 1
    assert mirror.ingested["duplicate"] == 1
    assert mirror.ingested["unknown_request"] == 0  # its arrival may still come
    for later in range(0, 1_500, 100):
        mirror.advance(events[-1].time_seconds + later)
    mirror.ingest(events[0].model_copy(update={"id": "late"}))
    assert mirror.ingested["late"] == 1
    assert mirror.ingested["unknown_request"] == 1


def test_predictions_are_taken_before_the_record_corrects_them(records: list[RequestRecord]) -> None:
    """Had the record's own end entered the prediction, both would agree to the digit."""
    pairs: list[tuple[float, float]] = []
    mirror = Mirror(MirrorSettings(), FLEET)
    add = mirror.windows.add

    def watched(kpi: str, time_seconds: float, predicted: float, observed: float, weight: float = 1.0) -> None:
        if kpi == "e2e_seconds":
            pairs.append((predicted, observed))
        add(kpi, time_seconds, predicted, observed, weight)

    mirror.windows.add = watched  # type: ignore[method-assign]
    for event in halves(records[:100]):
        mirror.ingest(event)
        mirror.advance()
    mirror.advance(records[99].time_seconds + 60.0)
    assert len(pairs) > 90
    assert sum(math.isclose(predicted, observed, rel_tol=1e-3) for predicted, observed in pairs) < len(pairs) / 2


def test_a_request_that_never_ends_is_given_up() -> None:
    mirror = Mirror(MirrorSettings(give_up_seconds=100.0), FLEET)
    mirror.ingest(RequestSeen(id="lost", time_seconds=0.0, prompt_tokens=50))
    mirror.advance(10.0)
    assert mirror.load()[0] == 1
    mirror.advance(200.0)
    assert mirror.load()[0] == 0
    assert mirror.ingested["never_finished"] == 1


def test_a_late_end_still_ends_its_request(records: list[RequestRecord]) -> None:
    events = [e for e in halves(records[:50]) if not (isinstance(e, RequestFinished) and e.id == records[3].id)]
    last = records[3].finished()
    assert last is not None
    mirror = run([*events, last])
    assert mirror.ingested["late"] == 0
    assert mirror.finished == 50
    assert mirror.load()[0] == 0


def test_requests_whose_end_is_lost_do_not_fill_the_fleet(records: list[RequestRecord]) -> None:
    """One end of ten never comes: after hundreds of requests no more are held than are under way."""
    lost = {record.id for number, record in enumerate(records) if number % 10 == 5}
    mirror = run([e for e in halves(records) if isinstance(e, RequestSeen) or e.id not in lost])
    assert mirror.ingested["never_finished"] - mirror.ingested["ended_after_all"] > 0.8 * len(lost)
    assert mirror.load()[0] < 0.2 * len(lost)
    assert mirror.finished > 0.99 * (len(records) - len(lost))
    assert abs(error_of(mirror, "e2e_seconds", "mean")) < 0.15


def test_lengths_are_drawn_where_ends_come_late() -> None:
    """With every end 20 s later than the stream waits for, as many requests run in the mirror as really do."""
    mirror = Mirror(MirrorSettings(ordering_seconds=1.0), FLEET)
    rng = random.Random(1)
    told: list[tuple[float, int, RequestSeen | RequestFinished]] = []
    for number in range(300):
        seconds = rng.uniform(2.0, 4.0)
        finished = RequestFinished(
            id=str(number),
            time_seconds=number + seconds,
            output_tokens=int(seconds / 0.015),
            ttft_seconds=0.02,
            e2e_seconds=seconds,
        )
        told.append((float(number), number, RequestSeen(id=str(number), time_seconds=number, prompt_tokens=50)))
        told.append((number + seconds + 20.0, number, finished))
    running = []
    for time, _, event in sorted(told, key=lambda entry: entry[:2]):
        mirror.ingest(event)
        mirror.advance()
        if 150.0 < time < 300.0:
            running.append(mirror.load()[0])
    mirror.advance(400.0)
    assert mirror.finished == 300
    assert 2.0 < sum(running) / len(running) < 4.5  # 3 by Little's law; held until their records come: 22


def test_carbon_intensity_arrives_with_the_stream() -> None:
    power = PowerModel(idle_watts=70.0, max_watts=700.0)
    told = FLEET.model_copy(update={"footprint": Footprint(power=power)})
    mirror = Mirror(MirrorSettings(), told)
    mirror.ingest(RequestSeen(id="a", time_seconds=5.0, prompt_tokens=50))
    mirror.ingest(CarbonSample(time_seconds=5.0, gco2_per_kwh=300.0))
    mirror.advance(10.0)
    before = mirror.snapshot()
    mirror.ingest(CarbonSample(time_seconds=20.0, gco2_per_kwh=100.0))
    mirror.advance(25.0)
    after = mirror.snapshot()
    means = []
    for snapshot in (before, after):
        assert snapshot is not None
        assert snapshot.fleet.settings.footprint is not None
        means.append(snapshot.fleet.settings.footprint.carbon.mean_gco2_per_kwh(10.0, 30.0))
    assert means == [300.0, 200.0]
    without = Mirror(MirrorSettings(), FLEET)
    without.ingest(CarbonSample(time_seconds=5.0, gco2_per_kwh=300.0))
    assert without.ingested["accepted"] == 1


def test_a_snapshot_is_independent(records: list[RequestRecord]) -> None:
    events = halves(records)
    mirror = run(events[:600])
    snapshot = mirror.snapshot()
    assert snapshot is not None
    before = tuple(array.tobytes() for array in snapshot.fleet.state)
    for event in events[600:]:
        mirror.ingest(event)
    mirror.advance()
    assert tuple(array.tobytes() for array in snapshot.fleet.state) == before
    assert (snapshot.recent.output > 0).any()


def test_a_forecast_runs_at_the_coefficients_not_at_the_pace_of_the_last_seconds(records: list[RequestRecord]) -> None:
    mirror = run(halves(records)[:600])
    snapshot = mirror.snapshot()
    assert snapshot is not None
    assert mirror.calibrated
    assert mirror.pace != 1.0
    fixed = mirror.fleet.settings.step_time.fixed
    assert snapshot.fleet.state.engines["fixed"] == pytest.approx(fixed)
    assert mirror.fleet.state.engines["fixed"] == pytest.approx(mirror.pace * fixed)


def test_a_snapshot_tells_which_requests_are_live_and_when_the_others_ended(records: list[RequestRecord]) -> None:
    mirror = Mirror(MirrorSettings(), FLEET)
    for event in halves(records)[:600]:
        mirror.ingest(event)
    mirror.advance()
    snapshot = mirror.snapshot()
    assert snapshot is not None
    assert snapshot.ended_seconds is not None
    recent, live = snapshot.recent, {request.index for request in snapshot.fleet.live()}
    assert len(live) > 2
    assert set(recent.index[recent.index >= 0].tolist()) == live
    assert np.array_equal(np.isfinite(snapshot.ended_seconds), recent.output > 0)
    assert not np.isfinite(snapshot.ended_seconds[recent.index >= 0]).any()
    ends = {record.time_seconds: record.time_seconds + (record.e2e_seconds or 0.0) for record in records}
    for arrival, end in zip(recent.arrival.tolist(), snapshot.ended_seconds.tolist(), strict=True):
        assert math.isnan(end) or end == ends[arrival]


def test_memory_stays_bounded(records: list[RequestRecord]) -> None:
    """The same stream four times over takes the arrays no further than once."""
    mirror = run(halves(records))
    size = state_bytes(mirror.fleet.state)
    span = records[-1].time_seconds + 30.0
    for lap in range(1, 4):
        moved = [
            record.model_copy(update={"id": f"{lap}-{record.id}", "time_seconds": record.time_seconds + lap * span})
            for record in records
        ]
        for event in halves(moved):
            mirror.ingest(event)
            mirror.advance()
    assert state_bytes(mirror.fleet.state) <= 2 * size


def test_queue_times_leave_out_the_frontend_as_vllms_do(records: list[RequestRecord]) -> None:
    reality, _ = simulated_reality(records, FLEET, 0.25)
    settings = MirrorSettings(ordering_seconds=0.0, calibrate_after_requests=sys.maxsize)
    mirror = Mirror(settings, FLEET, calibrated=True, frontend_seconds=0.25)
    for event in halves(reality):
        mirror.ingest(event)
        mirror.advance()
    [queue] = [s for s in mirror.scores if (s.kpi, s.statistic, s.window) == ("queue_seconds", "mean", "1h")]
    assert queue.observations > 100
    assert queue.predicted == pytest.approx(queue.observed, abs=0.01)
