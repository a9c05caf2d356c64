"""Scenarios drawn from the first part of real streams, against how those went on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from connectors.traces import read_trace
from forecast.streams import between, fleet_settings, hit_ratio, snapshot_at
from kavier_twin.forecast.scenarios import Scenarios, draw_scenarios
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.simulation.settings import EngineSettings, StepTime
from kavier_twin.simulation.workload import Workload, take_rows, workload_of

RECORDINGS = Path(__file__).parents[1] / "data" / "recordings"
# Fast enough that nothing queues: what is tested is what the cache sees.
FAST = StepTime(fixed=0.005, per_prefill_token=5e-6, per_decode_sequence=2e-5, per_context_token=1e-9)
HALF_SECONDS = 1_800.0  # of the Mooncake trace, which ends at 3,537 s


def mean_hit_ratio(snapshot: Snapshot, scenarios: list[Workload]) -> float:
    return float(np.mean([hit_ratio(snapshot.fleet, scenario) for scenario in scenarios]))


@pytest.mark.parametrize("name", ["chat-400", "chat-400-nocache", "shift-300"])
def test_recordings_of_a_real_server(name: str) -> None:
    """Within a point on average over seven moments; at a single one the rest of the recording is a small sample."""
    recording = read_trace(RECORDINGS / name)
    stream, told = workload_of(recording.records), recording.settings["engine"]
    engine = {key: told[key] for key in EngineSettings.model_fields if key in told} | {"prefix_caching": True}
    end = float(stream.arrival[-1])
    errors = []
    for share in (0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.70):
        snapshot = snapshot_at(stream, fleet_settings(**engine), share * end, end)
        went_on = between(stream, share * end, end)
        scenarios = Scenarios(snapshot, (1.0 - share) * end)
        drawn = [scenarios.draw(seed) for seed in range(4)]  # turns that wait for simulated answers
        ratios = [hit_ratio(snapshot.fleet, *scenario) for scenario in drawn]
        errors.append(np.mean(ratios) - hit_ratio(snapshot.fleet, went_on))
        assert np.mean([scenario.output.mean() for scenario, _ in drawn]) == pytest.approx(
            went_on.output.mean(), rel=0.15
        )
    assert abs(np.mean(errors)) < 0.01
    assert np.abs(errors).max() < 0.025


@pytest.fixture(scope="module")
def mooncake(shared_data: Path) -> Workload:
    """Production chat, without session labels."""
    return workload_of(read_trace(shared_data / "mooncake" / "conversation_trace.jsonl").records)


def mooncake_at_half(stream: Workload, num_gpu_blocks: int) -> tuple[Snapshot, float]:
    """The snapshot, and the hit ratio that the second half of the trace had behind it."""
    settings = fleet_settings(num_gpu_blocks=num_gpu_blocks).model_copy(update={"step_time": FAST})
    snapshot = snapshot_at(stream, settings, HALF_SECONDS, HALF_SECONDS, tells_ends=False)  # as the trace is
    return snapshot, hit_ratio(snapshot.fleet, between(stream, HALF_SECONDS, np.inf))


CACHES = (100_000, 300_000, 1_000_000)
"""Blocks: caches that hold about one minute, three and ten of the stream."""


@pytest.mark.slow
@pytest.mark.parametrize("num_gpu_blocks", CACHES)
def test_the_second_half_of_production_chat(mooncake: Workload, num_gpu_blocks: int) -> None:
    snapshot, real = mooncake_at_half(mooncake, num_gpu_blocks)
    assert mean_hit_ratio(snapshot, draw_scenarios(snapshot, 1_737.0, range(16))) == pytest.approx(real, abs=0.02)


@pytest.mark.slow
def test_a_draw_without_returns_fails_that(mooncake: Workload) -> None:
    """Steady prefixes by their popularity, everything behind them new: no sessions."""
    for num_gpu_blocks in CACHES:
        snapshot, real = mooncake_at_half(mooncake, num_gpu_blocks)
        scenario = drawn_with_replacement(snapshot, draw_scenarios(snapshot, 1_737.0, [0])[0])
        first_of_its_row = np.zeros(scenario.chain.size, bool)
        first_of_its_row[scenario.chain_starts[:-1]] = True
        new = np.random.default_rng(1).integers(1 << 63, 1 << 64, scenario.chain.size, dtype=np.uint64)
        scenario = scenario._replace(chain=np.where(first_of_its_row, scenario.chain, new))
        assert hit_ratio(snapshot.fleet, scenario) < real - 0.02


@pytest.mark.parametrize("num_gpu_blocks", [100_000, 1_000_000])
def test_a_draw_without_distances_fails_that(mooncake: Workload, num_gpu_blocks: int) -> None:
    """Whole recent requests by their popularity. (Where its error changes sign it is right, as a stopped clock is.)"""
    snapshot, real = mooncake_at_half(mooncake, num_gpu_blocks)
    scenario = drawn_with_replacement(snapshot, draw_scenarios(snapshot, 1_737.0, [0])[0])
    assert hit_ratio(snapshot.fleet, scenario) > real + 0.02


def drawn_with_replacement(snapshot: Snapshot, scenario: Workload) -> Workload:
    """Recent requests at the scenario's times, each independent of the one before."""
    finished = np.flatnonzero(snapshot.recent.output > 0)
    again = take_rows(snapshot.recent, np.random.default_rng(0).choice(finished, scenario.index.size))
    return again._replace(index=scenario.index, arrival=scenario.arrival, delivered=scenario.delivered)
