"""Policies that change only limits out of reach are not simulated again: they would do what today's does."""

from __future__ import annotations

import pytest

from kavier_twin.forecast.sweep import out_of_reach
from kavier_twin.simulation.fleet import Peaks
from kavier_twin.simulation.policies import Override, apply_overrides
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import EngineSettings, FleetSettings
from kavier_twin.simulation.workload import make_workload
from simulation.test_closed_loop import STEP_TIME

ENGINE = EngineSettings(num_gpu_blocks=500, max_num_seqs=16, max_num_batched_tokens=512)
SETTINGS = FleetSettings(engine=ENGINE, step_time=STEP_TIME)


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        ({"max_num_seqs": 8}, True),
        ({"max_num_seqs": 7}, False),
        ({"max_num_seqs": "2x", "max_num_batched_tokens": "2x"}, True),
        ({"max_num_batched_tokens": 281}, True),
        ({"max_num_batched_tokens": 280}, False),
        ({"max_num_seqs": 8, "watermark": 0.1}, False),
        ({}, False),
    ],
)
def test_which_limits_are_out_of_reach(overrides: dict[str, Override], same: bool) -> None:
    """Seven requests come at once, 280 tokens in one batch. Where limits are said to be out of reach, so it is."""
    workload = make_workload([0.0] * 7, 40, 20)
    today = simulate(SETTINGS, workload)
    assert today.peaks == Peaks(running=7, batch_tokens=280)
    assert out_of_reach(SETTINGS, overrides, today.peaks) == same
    if same:
        changed = simulate(apply_overrides(SETTINGS, overrides), workload)
        assert changed.collect().tobytes() == today.collect().tobytes()


def test_admission_without_chunks_depends_on_them() -> None:
    settings = SETTINGS.model_copy(update={"engine": ENGINE.model_copy(update={"enable_chunked_prefill": False})})
    assert not out_of_reach(settings, {"max_num_batched_tokens": "2x"}, Peaks(1, 1))
