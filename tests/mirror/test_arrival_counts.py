from __future__ import annotations

import json

import numpy as np
import pytest

from kavier_twin.mirror.arrival_counts import COARSE_BUCKETS, FINE_BUCKETS, RateHistory
from kavier_twin.mirror.checkpoint_file import Saved
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.mirror.mirror_state import restore, save
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import RequestSeen


def history(times: list[float]) -> RateHistory:
    found = RateHistory()
    for time in times:
        found.add(time)
    return found


@pytest.mark.parametrize("start", [0.0, 1.8e9])
def test_counts_are_those_of_whole_buckets_since_the_first_arrival(start: float) -> None:
    times = start + np.sort(np.random.default_rng(1).uniform(3.0, 3_600.0, 20_000))
    counts = history(times.tolist()).until(start + 3_605.0)
    fine, _ = np.histogram(times, np.arange(start + 10.0, start + 3_601.0, 10.0))
    coarse, _ = np.histogram(times, np.arange(start + 60.0, start + 3_601.0, 60.0))
    assert counts.fine.tolist() == fine.tolist()
    assert counts.coarse.tolist() == coarse.tolist()


def test_silence_is_counted_as_well() -> None:
    assert history([5.0, 12.0, 13.0]).until(70.0).fine.tolist() == [2, 0, 0, 0, 0, 0]


def test_the_order_of_arrivals_changes_nothing() -> None:
    times = np.random.default_rng(2).uniform(0.0, 1e5, 500).tolist()
    one, other = history(times).until(1e5), history(sorted(times, reverse=True)).until(1e5)
    assert np.array_equal(one.fine, other.fine)
    assert np.array_equal(one.coarse, other.coarse)


def test_memory_is_bounded_and_what_is_old_is_forgotten() -> None:
    found = history(np.arange(0.0, 40 * 86_400.0, 50.0).tolist())
    counts = found.until(40 * 86_400.0)
    assert counts.fine.size == FINE_BUCKETS - 1
    assert counts.fine.sum() == pytest.approx(FINE_BUCKETS / 5, abs=1)
    assert counts.coarse.size == COARSE_BUCKETS - 1
    assert counts.coarse.sum() == pytest.approx(1.2 * COARSE_BUCKETS, abs=2)
    found.add(5.0)  # too long ago to be counted
    assert np.array_equal(found.until(40 * 86_400.0).fine, counts.fine)
    assert found.until(80 * 86_400.0).coarse.sum() == 0


def test_nothing_seen() -> None:
    assert RateHistory().until(100.0).fine.size == 0


def test_a_copy_goes_its_own_way_and_a_saved_one_goes_on() -> None:
    found = history([1.0, 15.0, 400.0])
    copy, restored = found.fork(), RateHistory()
    restored.restore(json.loads(json.dumps(found.save())))
    for other in (copy, restored):
        other.add(415.0)
        assert other.until(420.0).fine.sum() == found.until(420.0).fine.sum() + 1
    restored = RateHistory()
    restored.restore(json.loads(json.dumps(RateHistory().save())))
    assert restored.until(100.0).fine.size == 0


# --- in the mirror ------------------------------------------------------------------------------------------------


FLEET = FleetSettings(engine=EngineSettings(num_gpu_blocks=1_000), step_time=StepTime(fixed=0.1))


def mirror_of(events: list[RequestSeen]) -> Mirror:
    mirror = Mirror(MirrorSettings(ordering_seconds=0.0), FLEET)
    for event in events:
        mirror.ingest(event)
    mirror.advance(100.0)
    return mirror


EVENTS = [
    RequestSeen(id="1", time_seconds=5.0, prompt_tokens=10, session="s"),
    RequestSeen(id="2", time_seconds=12.0, prompt_tokens=10),
    RequestSeen(id="3", time_seconds=25.0, prompt_tokens=10, session="s"),
]


def test_the_mirror_counts_arrivals_in_event_time_and_forks_apart() -> None:
    mirror = mirror_of(EVENTS)
    snapshot = mirror.snapshot()
    assert snapshot is not None
    assert snapshot.arrivals.fine.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    mirror.fork().fold.arrivals.add(99.0)
    later = mirror.snapshot()
    assert later is not None
    assert later.arrivals.fine.tolist() == snapshot.arrivals.fine.tolist()
    saved = save(mirror)
    restored = restore(Saved(json.loads(json.dumps(saved.document)), saved.arrays), mirror.settings, FLEET)
    again = restored.snapshot()
    assert again is not None
    assert again.arrivals.fine.tolist() == snapshot.arrivals.fine.tolist()


def test_sessions_have_one_number_in_the_fleet_and_in_what_is_forecast_from() -> None:
    """Or a router would send a session's next turn, drawn, elsewhere than where its cache is."""
    mirror = mirror_of(EVENTS)
    snapshot = mirror.snapshot()
    assert snapshot is not None
    live = {int(mirror.fleet.state.requests["session"][one.replica, one.slot]) for one in mirror.fleet.live()}
    labelled = set(snapshot.recent.session[snapshot.recent.session >= 0].tolist())
    assert len(labelled) == 1
    assert labelled <= live
