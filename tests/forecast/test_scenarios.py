from __future__ import annotations

import numpy as np
import pytest

from forecast.streams import (
    HASH_TOKENS,
    between,
    chat_stream,
    empty_snapshot,
    fleet_settings,
    hit_ratio,
    snapshot_at,
    state_bytes,
)
from kavier_twin.forecast.load import arrival_rate
from kavier_twin.forecast.recent import read_stream
from kavier_twin.forecast.scenarios import assumed_output, draw_scenario, draw_scenarios, settle_lengths
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.state import FREE
from kavier_twin.simulation.workload import Workload, make_workload, take_rows


def same(a: Workload, b: Workload) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def with_recent(snapshot: Snapshot, recent: Workload) -> Snapshot:
    return Snapshot(
        snapshot.pool,
        snapshot.time_seconds,
        snapshot.fleet,
        recent,
        snapshot.recent_seconds,
        snapshot.frontend_seconds,
        snapshot.calibrated,
    )


@pytest.fixture(scope="module")
def stream() -> Workload:
    return chat_stream(1, 400.0)


@pytest.fixture(scope="module")
def snapshot(stream: Workload) -> Snapshot:
    return snapshot_at(stream, fleet_settings(), 200.0, 120.0, frontend=0.05)


@pytest.mark.parametrize("num_gpu_blocks", [600, 900, 20_000])
def test_scenarios_hit_the_cache_as_the_stream_goes_on_to_do(stream: Workload, num_gpu_blocks: int) -> None:
    """From a cache of which a part is evicted before it is used again, to one that holds everything."""
    snapshot = snapshot_at(stream, fleet_settings(num_gpu_blocks=num_gpu_blocks), 200.0, 100.0)
    real = hit_ratio(snapshot.fleet, between(stream, 200.0, 350.0))
    scenarios = draw_scenarios(snapshot, 150.0, range(12))
    assert np.mean([hit_ratio(snapshot.fleet, scenario) for scenario in scenarios]) == pytest.approx(real, abs=0.04)


def test_naive_draws_do_not(stream: Workload) -> None:
    snapshot = snapshot_at(stream, fleet_settings(num_gpu_blocks=20_000), 200.0, 100.0)
    real = hit_ratio(snapshot.fleet, between(stream, 200.0, 350.0))
    scenario = draw_scenario(snapshot, 150.0, 0)
    rng = np.random.default_rng(0)
    fresh = scenario._replace(chain=rng.integers(1 << 63, 1 << 64, scenario.chain.size, dtype=np.uint64))
    assert hit_ratio(snapshot.fleet, fresh) < real - 0.5
    finished = np.flatnonzero(snapshot.recent.output > 0)
    again = take_rows(snapshot.recent, rng.choice(finished, scenario.index.size))
    again = again._replace(arrival=scenario.arrival, delivered=scenario.delivered)
    assert hit_ratio(snapshot.fleet, again) > real + 0.1


def test_sessions_without_labels_recur_as_well(stream: Workload) -> None:
    anonymous = stream._replace(session=-1 - np.arange(stream.index.size))
    snapshot = snapshot_at(anonymous, fleet_settings(num_gpu_blocks=900), 200.0, 100.0)
    real = hit_ratio(snapshot.fleet, between(anonymous, 200.0, 350.0))
    scenarios = draw_scenarios(snapshot, 150.0, range(4))
    assert np.mean([hit_ratio(snapshot.fleet, scenario) for scenario in scenarios]) == pytest.approx(real, abs=0.04)


def test_lengths_and_rate_stay(stream: Workload, snapshot: Snapshot) -> None:
    scenarios = draw_scenarios(snapshot, 600.0, range(4))
    recent = snapshot.recent
    assert np.mean([scenario.prompt.mean() for scenario in scenarios]) == pytest.approx(recent.prompt.mean(), rel=0.1)
    finished = recent.output[recent.output > 0]
    assert np.mean([scenario.output.mean() for scenario in scenarios]) == pytest.approx(finished.mean(), rel=0.1)
    assert np.mean([scenario.index.size for scenario in scenarios]) == pytest.approx(
        600.0 * arrival_rate(snapshot), rel=0.1
    )
    assert np.isin(scenarios[0].output, finished).all()


def test_turns_stay_turns(snapshot: Snapshot) -> None:
    seen, drawn = read_stream(snapshot.recent), read_stream(draw_scenario(snapshot, 600.0, 1))
    assert drawn.return_ratio == pytest.approx(seen.return_ratio, abs=0.06)


def test_sessions_pause_as_long_as_they_did() -> None:
    """Also where few are open, so that those of the right age are few."""
    stream = chat_stream(2, 2_000.0, sessions_per_second=0.05, turns_mean=6.0, think_seconds=20.0)
    snapshot = snapshot_at(stream, fleet_settings(), 1_000.0, 1_000.0)

    def pauses(workload: Workload) -> list[float]:
        turns = np.flatnonzero(read_stream(workload).previous >= 0)
        return (workload.arrival[turns] - workload.arrival[read_stream(workload).previous[turns]]).tolist()

    drawn = [pause for scenario in draw_scenarios(snapshot, 1_000.0, range(4)) for pause in pauses(scenario)]
    assert np.median(drawn) == pytest.approx(np.median(pauses(snapshot.recent)), rel=0.35)


def test_deterministic(snapshot: Snapshot) -> None:
    assert same(draw_scenario(snapshot, 100.0, 7), draw_scenario(snapshot, 100.0, 7))
    assert not same(draw_scenario(snapshot, 100.0, 7), draw_scenario(snapshot, 100.0, 8))


def test_a_shorter_horizon_is_the_beginning_of_a_longer_one(snapshot: Snapshot) -> None:
    shorter, longer = draw_scenario(snapshot, 50.0, 7), draw_scenario(snapshot, 100.0, 7)
    assert 0 < shorter.index.size < longer.index.size
    assert same(shorter, take_rows(longer, np.arange(shorter.index.size)))


def test_a_scenario_can_be_fed(snapshot: Snapshot) -> None:
    scenario = draw_scenario(snapshot, 100.0, 7)
    assert (np.diff(scenario.delivered) >= 0).all()
    assert scenario.arrival[0] > snapshot.time_seconds
    assert scenario.arrival[-1] < snapshot.time_seconds + 100.0
    assert np.allclose(scenario.delivered, scenario.arrival + 0.05)
    assert (scenario.replica == -1).all()
    assert not scenario.held.any()
    assert (scenario.output > 0).all()
    assert scenario.index.min() > max(snapshot.recent.index.max(), *(live.index for live in snapshot.fleet.live()))
    assert np.unique(scenario.index).size == scenario.index.size
    assert (np.diff(scenario.chain_starts) == (scenario.prompt + scenario.output) // HASH_TOKENS).all()
    assert (scenario.chain >> np.uint64(63) == 1).all()
    assert not (scenario.chain & np.uint64(1023)).any()
    fleet = snapshot.fleet.fork()
    settle_lengths(fleet, snapshot.recent, np.random.default_rng(0))
    fleet.feed(scenario)
    fleet.run()
    ended = fleet.collect()
    assert set(ended["index"].tolist()) >= set(scenario.index.tolist())
    assert not ended["status"].any()


def test_no_prompt_outgrows_the_model(stream: Workload) -> None:
    snapshot = snapshot_at(stream, fleet_settings(max_model_len=1_100), 200.0, 120.0)
    scenario = draw_scenario(snapshot, 600.0, 0)
    longest_seen = (snapshot.recent.prompt + snapshot.recent.output).max()
    assert (scenario.prompt + scenario.output).max() <= max(1_100, longest_seen)


def test_nothing_seen_nothing_foreseen() -> None:
    assert draw_scenario(empty_snapshot(), 900.0, 0).index.size == 0


def test_a_stream_without_hashes(snapshot: Snapshot) -> None:
    n = snapshot.recent.index.size
    bare = snapshot.recent._replace(
        chain=np.zeros(0, np.uint64),
        chain_starts=np.zeros(n + 1, np.int64),
        hash_tokens=np.zeros(n, np.int64),
        covered=np.zeros(n, np.int64),
    )
    scenario = draw_scenario(with_recent(snapshot, bare), 100.0, 0)
    assert scenario.index.size > 0
    assert scenario.chain.size == 0
    assert not scenario.covered.any()
    assert np.isin(scenario.prompt, bare.prompt).all()
    assert np.isin(scenario.session, bare.session).all()


def test_hashes_that_end_with_the_prompt(snapshot: Snapshot) -> None:
    recent = snapshot.recent
    keys = recent.prompt // HASH_TOKENS
    starts = np.concatenate([[0], np.cumsum(keys)])
    chain = np.concatenate(
        [recent.chain[at : at + count] for at, count in zip(recent.chain_starts, keys, strict=False)]
    )
    prompts = recent._replace(chain=chain, chain_starts=starts, covered=keys * HASH_TOKENS)
    scenario = draw_scenario(with_recent(snapshot, prompts), 300.0, 0)
    assert (np.diff(scenario.chain_starts) == scenario.prompt // HASH_TOKENS).all()
    assert np.isin(scenario.chain, prompts.chain).mean() > 0.2


def test_a_single_session_goes_on(snapshot: Snapshot) -> None:
    session = np.bincount(snapshot.recent.session).argmax()
    one = take_rows(snapshot.recent, np.flatnonzero(snapshot.recent.session == session))
    assert one.index.size > 3
    scenario = draw_scenario(with_recent(snapshot, one), 300.0, 0)
    assert (scenario.session == session).all()
    assert (np.diff(scenario.prompt) > 0).all()
    assert scenario.chain[0] == one.chain[0]


def test_only_requests_in_flight() -> None:
    stream = chat_stream(3, 30.0, sessions_per_second=4.0, output_tokens=5_000)
    snapshot = snapshot_at(stream, fleet_settings(), 3.0, 3.0, held=True)
    assert snapshot.recent.index.size > 3
    assert not snapshot.recent.output.any()
    scenario = draw_scenario(snapshot, 60.0, 0)
    assert scenario.index.size > 0
    assert (scenario.output >= 1).all()
    assert np.unique(scenario.output).size == 1


# --- requests in flight -------------------------------------------------------------------------------------------


def generated(snapshot: Snapshot) -> dict[int, int]:
    requests = snapshot.fleet.state.requests
    return {int(row["index"]): int(row["tokens"] - row["prompt"]) for row in requests[requests["state"] != FREE]}


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_lengths_in_flight_are_longer_than_what_is_there(async_scheduling: bool, held: bool) -> None:
    settings = fleet_settings(async_scheduling=async_scheduling, num_gpu_blocks=700, replicas=2)
    stream = chat_stream(4, 60.0, sessions_per_second=4.0, output_tokens=200)
    for time in np.linspace(20.0, 50.0, 7):
        snapshot = snapshot_at(stream, settings, float(time), 30.0, held=held)
        before, image = generated(snapshot), state_bytes(snapshot.fleet)
        fleet = snapshot.fleet.fork()
        settle_lengths(fleet, snapshot.recent, np.random.default_rng(5))
        assert state_bytes(snapshot.fleet) == image
        finished = set(snapshot.recent.output.tolist())
        live = fleet.state.requests[fleet.state.requests["state"] != FREE]
        assert len(before) == live.size > 5
        for request in live:
            assert request["output"] > before[int(request["index"])]
            assert int(request["output"]) in finished or request["output"] > max(finished)
        fleet.run()
        ended = {int(row["index"]): int(row["output"]) for row in fleet.collect()}
        assert fleet.idle
        assert ended == {int(request["index"]): int(request["output"]) for request in live}


def test_a_request_longer_than_any_seen_goes_on_for_a_quarter() -> None:
    stream = chat_stream(3, 30.0, sessions_per_second=4.0, output_tokens=5_000)
    snapshot = snapshot_at(stream, fleet_settings(num_gpu_blocks=20_000), 10.0, 10.0, held=True)
    short = snapshot.recent._replace(output=np.where(snapshot.recent.index == 0, 2, 0))
    before = generated(snapshot)
    fleet = snapshot.fleet.fork()
    settle_lengths(fleet, short, np.random.default_rng(0))
    assert fleet.live()
    for live in fleet.live():
        tokens = before[live.index]
        output = fleet.state.requests["output"][live.replica, live.slot]
        assert output == 2 or assumed_output(tokens) <= output <= assumed_output(tokens + 2)


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_as_long_as_what_is_there_is_not_longer(async_scheduling: bool) -> None:
    stream = chat_stream(3, 30.0, sessions_per_second=4.0, output_tokens=5_000)
    settings = fleet_settings(num_gpu_blocks=20_000, async_scheduling=async_scheduling)
    fleet = snapshot_at(stream, settings, 10.0, 10.0, held=True).fleet
    live = fleet.live()[0]
    request = fleet.state.requests[live.replica, live.slot]
    there = int(request["computed"] + 1 - request["prompt"])
    recent = take_rows(stream, np.array([0]))._replace(output=np.array([there]))
    settle_lengths(fleet, recent, np.random.default_rng(0))
    assert fleet.state.requests[live.replica, live.slot]["output"] == assumed_output(there)


def test_a_request_that_waits_for_its_end_goes_on() -> None:
    """The mirror holds a request that generated all it was assumed to need."""
    stream = chat_stream(4, 60.0, output_tokens=300)
    snapshot = snapshot_at(stream, fleet_settings(), 30.0, 30.0, held=True)
    fleet = snapshot.fleet.fork()
    fleet.run(60.0)
    assert int(fleet.state.replicas["holding"].sum()) == len(fleet.live()) > 0
    fleet.state.replicas["hold_until"] = np.inf
    settle_lengths(fleet, snapshot.recent, np.random.default_rng(0))
    fleet.run()
    assert fleet.idle


def test_a_request_as_long_as_the_model_allows_ends() -> None:
    """Its finish record is late; no step could end it."""
    fleet = Fleet(fleet_settings(max_model_len=200), start_seconds=0.0)
    fleet.feed(make_workload([0.0, 0.0], 50, 1_000, held=1))
    fleet.run(30.0)
    assert (fleet.state.requests["tokens"][0, [live.slot for live in fleet.live()]] == 200).all()
    settle_lengths(fleet, make_workload([], 50, 10), np.random.default_rng(0))
    fleet.run(60.0)
    assert fleet.idle
    assert [int(row["output"]) for row in fleet.collect()] == [150, 150]
