"""The mirror's exactness on a real vLLM: prefix hits of every request, and calibration on the first third."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kavier_twin.mirror.calibration.requests import with_frontend
from kavier_twin.recordings.pinned import replay_pinned
from kavier_twin.recordings.scenario import Scenario, load_scenario
from kavier_twin.simulation.runs import simulate

RECORDINGS = Path(__file__).parents[1] / "data" / "recordings"

# Shares of requests whose prefix hit is vLLM's to the token. shift-300 stays below 99.5 %: its machine stalled for up
# to 0.2 s inside single steps, and even a replay driven by the time of every token reaches only 99.5 %.
EXACT = {"chat-400": 0.995, "chat-400-nocache": 1.0, "ramp-300": 0.995, "shift-300": 0.99}


def cached(scenario: Scenario) -> np.ndarray:
    return np.array([record.cached_tokens for record in scenario.trace.records])


@pytest.mark.parametrize("name", EXACT)
def test_pinned_prefix_hits_are_vllms(name: str) -> None:
    scenario = load_scenario(RECORDINGS / name)
    outcomes = replay_pinned(scenario.fleet, scenario.observed, scenario.frontend_seconds).collect()
    outcomes = outcomes[np.argsort(outcomes["index"])]
    assert np.mean(outcomes["cached"] == cached(scenario)) >= EXACT[name]
    ends = scenario.observed.workload.arrival + scenario.observed.e2e_seconds
    np.testing.assert_allclose(outcomes["finish"], ends)


@pytest.mark.parametrize("name", EXACT)
def test_free_running_hit_ratio(name: str) -> None:
    scenario = load_scenario(RECORDINGS / name)
    workload = scenario.observed.workload
    outcomes = simulate(scenario.fleet, with_frontend(workload, scenario.frontend_seconds)).collect()
    simulated = outcomes["cached"].sum() / workload.prompt.sum()
    assert abs(simulated - cached(scenario).sum() / workload.prompt.sum()) < 0.005


def test_calibration_uses_the_first_part_only() -> None:
    whole = load_scenario(RECORDINGS / "chat-400")
    part = load_scenario(RECORDINGS / "chat-400", calibrate_until=0.33)
    assert part.calibration is not None
    assert part.calibration == whole.calibration  # 0.33 is the default
    ends = part.observed.workload.arrival + part.observed.e2e_seconds
    limit = part.observed.workload.arrival[0] + 0.33 * np.ptp(part.observed.workload.arrival)
    assert part.calibration.requests <= int((ends <= limit).sum())
