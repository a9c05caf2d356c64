"""Scenarios in a closed loop: a next turn waits for the simulated answer, and otherwise all is as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from connectors.traces import read_trace
from forecast.streams import between, chat_stream, fleet_settings, snapshot_at
from kavier_twin.forecast.load import LoadForecast
from kavier_twin.forecast.scenarios import Scenarios
from kavier_twin.forecast.sweep import Scenario, draw
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.simulation.closed_loop import simulate_sessions
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.policies import Override
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.state import FREE, Records
from kavier_twin.simulation.turns import Turns
from kavier_twin.simulation.workload import Workload, take_rows, workload_of

HORIZON_SECONDS = 120.0
NARROW: Mapping[str, Override] = {"max_num_seqs": 2}


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    """Two replicas with answers of half a minute in flight, that nobody ended yet."""
    stream = chat_stream(1, 200.0, sessions_per_second=0.8, output_tokens=300, think_seconds=3.0)
    settings = fleet_settings(replicas=2, num_gpu_blocks=3_000)
    return snapshot_at(stream, settings, 150.0, 100.0, frontend=0.03, held=True)


def served(scenario: Scenario, overrides: Mapping[str, Override], *, closed: bool = True) -> tuple[Fleet, Records]:
    """The fleet at the horizon, and the requests that had ended."""
    fleet = scenario.present.fork()
    fleet.apply(overrides)
    if closed:
        fleet.feed_sessions(scenario.workload, scenario.turns)
    else:
        fleet.feed(scenario.workload)
    fleet.run(fleet.now_seconds + HORIZON_SECONDS)
    return fleet, fleet.collect()


def arrivals(fleet: Fleet, ended: Records) -> dict[int, float]:
    live = fleet.state.requests[fleet.state.requests["state"] != FREE]
    return {int(row["index"]): float(row["arrival"]) for rows in (ended, live) for row in rows}


@pytest.mark.parametrize("overrides", [{}, NARROW])
def test_no_turn_comes_before_the_answer_it_waits_for(snapshot: Snapshot, overrides: Mapping[str, Override]) -> None:
    """Nor later than its user thinks; also after a request that is in flight in the present."""
    in_flight = {live.index for live in snapshot.fleet.live()}
    after_in_flight = 0
    for scenario in draw(snapshot, HORIZON_SECONDS, range(4), 0):
        fleet, ended = served(scenario, overrides)
        end, arrival = dict(zip(ended["index"].tolist(), ended["finish"].tolist(), strict=True)), arrivals(fleet, ended)
        turns = scenario.turns
        for row in np.flatnonzero(turns.after >= 0):
            index, after = int(scenario.workload.index[row]), int(turns.after[row])
            if index in arrival:
                assert arrival[index] == pytest.approx(end[after] + turns.think_seconds[row])
                after_in_flight += after in in_flight
            elif after in end:
                assert end[after] + turns.think_seconds[row] + turns.frontend_seconds >= fleet.now_seconds
        first = turns.after < 0
        expected = dict(zip(scenario.workload.index[first], scenario.workload.arrival[first], strict=True))
        assert all(arrival[index] == time for index, time in expected.items() if index in arrival)
    assert after_in_flight > 3


def test_on_an_engine_as_fast_as_lately_the_load_is_what_was_forecast(snapshot: Snapshot) -> None:
    """And all else is as if nobody waited."""
    scenarios = list(draw(snapshot, HORIZON_SECONDS, range(8), 0))
    waiting = np.mean([(scenario.turns.after >= 0).mean() for scenario in scenarios])
    assert waiting > 0.4
    came = np.mean([len(arrivals(*served(scenario, {}))) - len(snapshot.fleet.live()) for scenario in scenarios])
    assert came == pytest.approx(np.mean([scenario.workload.index.size for scenario in scenarios]), rel=0.01)
    closed, opened = ([served(scenario, {}, closed=closed)[1] for scenario in scenarios] for closed in (True, False))

    def mean(ended: list[Records], of: Callable[[Records], float]) -> float:
        return float(np.mean([of(each) for each in ended]))

    def e2e(each: Records) -> float:
        return float(np.quantile(each["finish"] - each["arrival"], 0.95))

    def hits(each: Records) -> float:
        return float(each["cached"].sum() / each["prompt"].sum())

    assert mean(closed, e2e) == pytest.approx(mean(opened, e2e), rel=0.02)
    assert mean(closed, hits) == pytest.approx(mean(opened, hits), abs=0.003)


def test_where_answers_are_late_users_hold_back(snapshot: Snapshot) -> None:
    for scenario in draw(snapshot, HORIZON_SECONDS, range(2), 0):
        live = [len(served(scenario, NARROW, closed=closed)[0].live()) for closed in (True, False)]
        assert live[0] < 0.8 * live[1]


def test_a_stream_that_tells_no_ends_stays_an_open_load() -> None:
    stream = chat_stream(1, 200.0)
    told, untold = (snapshot_at(stream, fleet_settings(), 150.0, 100.0, tells_ends=tells) for tells in (True, False))
    _, turns = Scenarios(told, HORIZON_SECONDS).draw(0)
    _, none = Scenarios(untold, HORIZON_SECONDS).draw(0)
    assert (turns.after >= 0).any()
    assert not (none.after >= 0).any()


def test_what_came_before_its_answer_did_not_wait_for_it(snapshot: Snapshot) -> None:
    assert snapshot.ended_seconds is not None
    late = snapshot.ended_seconds + np.where(np.isfinite(snapshot.ended_seconds), 1e4, 0.0)
    impatient = Snapshot(
        snapshot.pool,
        snapshot.time_seconds,
        snapshot.fleet,
        snapshot.recent,
        snapshot.recent_seconds,
        snapshot.frontend_seconds,
        snapshot.calibrated,
        ended_seconds=late,
    )
    assert not (Scenarios(impatient, HORIZON_SECONDS).draw(0)[1].after >= 0).any()


# --- a recorded ramp on an engine twice as slow ---------------------------------------------------------------------

# About what the recorded server's step log shows (vllm_recordings/ramp-300/steps.jsonl.gz).
STEP_TIME = StepTime(
    fixed=0.0124,
    per_context_token=2e-6,
    linear_layers=((1.0, 0.001), (8.0, 0.002), (16.0, 0.011), (128.0, 0.018), (256.0, 0.025), (1024.0, 0.106)),
)


class Ramp:
    """The users of `ramp-300` on its server, as simulated: what the past of every snapshot was."""

    def __init__(self, path: Path) -> None:
        recording = read_trace(path)
        told = recording.settings["engine"]
        engine = EngineSettings(**{key: told[key] for key in EngineSettings.model_fields if key in told})
        self.settings = FleetSettings(engine=engine, step_time=STEP_TIME)
        self.slower = self.settings.model_copy(
            update={"step_time": STEP_TIME.with_coefficients(2.0 * STEP_TIME.coefficients())}
        )
        workload = workload_of(recording.records)
        ends = workload.arrival + [record.e2e_seconds or 0.0 for record in recording.records]
        after, think = np.full(ends.size, -1), np.zeros(ends.size)
        last: dict[int, int] = {}
        for row, session in enumerate(workload.session.tolist()):
            if session in last:
                after[row] = last[session]
                think[row] = max(0.0, workload.arrival[row] - ends[last[session]])
            last[session] = row
        self.turns = Turns(after, think, 0.0)
        outcomes = simulate_sessions(self.settings, workload, lambda row, end: end + think[row])
        order = np.argsort(outcomes["arrival"], kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(order.size)
        arrival = outcomes["arrival"][order]
        self.workload = take_rows(workload, order)._replace(
            index=np.arange(order.size), arrival=arrival, delivered=arrival.copy()
        )
        self.turns = Turns(np.where(after >= 0, place[after], -1)[order], think[order], 0.0)
        self.ends = outcomes["finish"][order]


@pytest.fixture(scope="module")
def ramp() -> Ramp:
    return Ramp(Path(__file__).parents[1] / "data/recordings/ramp-300")


def e2e_p95(outcomes: Records) -> float:
    return float(np.quantile(outcomes["finish"] - outcomes["arrival"], 0.95))


def test_users_replayed_on_a_slower_engine_hold_back_as_they_would(ramp: Ramp) -> None:
    truth = simulate_sessions(ramp.slower, ramp.workload, lambda row, end: end + ramp.turns.think_seconds[row])
    fleet = Fleet(ramp.slower)
    fleet.feed_sessions(ramp.workload, ramp.turns)
    fleet.run()
    assert e2e_p95(fleet.collect()) == pytest.approx(e2e_p95(truth), rel=1e-6)
    assert e2e_p95(simulate(ramp.slower, ramp.workload).collect()) > 1.25 * e2e_p95(truth)


@pytest.mark.slow
def test_scenarios_of_a_ramp_no_longer_overstate_how_bad_it_gets(ramp: Ramp) -> None:
    """Scenarios at the rate that truly came: what is tested is who waits, not the forecast of the rate."""
    ratios = []
    for time in (105.0, 140.0, 175.0, 210.0, 245.0):
        snapshot = snapshot_at(ramp.workload, ramp.settings, time, time)
        came = between(ramp.workload, time, np.inf)
        horizon = float(came.arrival[-1]) - time + 1.0
        in_flight = {live.index for live in snapshot.fleet.live()}
        after = ramp.turns.after[came.index]
        known = np.isin(after, [*came.index, *in_flight])
        turns = Turns(np.where(known, after, -1), ramp.turns.think_seconds[came.index], 0.0)
        truth = slower_p95(snapshot, ramp, came, turns)
        scenarios = Scenarios(snapshot, horizon, arrivals=_Came(came.arrival))
        drawn = [scenarios.draw(seed) for seed in range(4)]
        closed = np.mean([slower_p95(snapshot, ramp, *scenario) for scenario in drawn])
        opened = np.mean([slower_p95(snapshot, ramp, workload, None) for workload, _ in drawn])
        ratios.append((closed / truth, opened / truth))
    closed_ratio, open_ratio = np.mean(ratios, axis=0)
    assert closed_ratio == pytest.approx(1.0, abs=0.25)
    assert open_ratio > 1.4


class _Came(LoadForecast):
    """A forecast that knows."""

    def __init__(self, times: np.ndarray) -> None:
        object.__setattr__(self, "times", times)

    def scaled(self, factor: float) -> LoadForecast:
        return self

    def draw_arrivals(self, horizon_seconds: float, rng: np.random.Generator, trending: bool = False) -> np.ndarray:
        return np.array(self.times)  # type: ignore[attr-defined]


def slower_p95(snapshot: Snapshot, ramp: Ramp, workload: Workload, turns: Turns | None) -> float:
    """From now on the engine is twice as slow. Until the last request of an open load would have come."""
    fleet = snapshot.fleet.fork()
    fleet.settings = ramp.slower
    fleet.apply({})
    if turns is None:
        fleet.feed(workload)
    else:
        fleet.feed_sessions(workload, turns)
    fleet.run(float(workload.arrival[-1]))
    return e2e_p95(fleet.collect())
