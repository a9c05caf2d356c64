"""Watts of real GPUs beside the mirrored fleet's, made by a known power model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from kavier_twin.mirror.fidelity.power import PowerWatch
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.footprint import Footprint, PowerModel
from kavier_twin.simulation.power import Reading, energy, phase_seconds
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.workload import make_workload
from kavier_twin.telemetry import GpuSample

PRIOR = PowerModel(idle_watts=70.0, max_watts=700.0)
TRUTH = PowerModel(idle_watts=118.0, max_watts=700.0, compute_load=0.78, memory_load=0.47)
STEP_TIME = StepTime(fixed=0.008, per_prefill_token=2.7e-5, per_decode_sequence=2.7e-5, per_context_token=6.5e-8)
MINUTES = 40


def busy_fleet(footprint: Footprint | None) -> Fleet:
    """Bursts, some of long prompts, some of long outputs, with idleness between."""
    engine = EngineSettings(num_gpu_blocks=28_000)
    fleet = Fleet(FleetSettings(engine=engine, step_time=STEP_TIME, footprint=footprint))
    rng = np.random.default_rng(1)
    rows = []
    for start in range(0, 60 * MINUTES, 20):
        long_prompts = rng.random() < 0.5
        for _ in range(int(rng.integers(2, 30))):
            prompt = int(rng.integers(2_000, 8_000) if long_prompts else rng.integers(50, 200))
            output = int(rng.integers(1, 30) if long_prompts else rng.integers(200, 900))
            rows.append((start + 5.0 * rng.random(), prompt, output))
    times, prompts, outputs = zip(*sorted(rows), strict=True)
    fleet.feed(make_workload(times, prompts, outputs))
    return fleet


def watched(minutes: int, watch: PowerWatch, footprint: Footprint | None = None, restart_at: int = -1) -> PowerWatch:
    """Two GPUs are measured every 10 s, known 15 s later; the mirror is looked at twice a second."""
    footprint = footprint or Footprint(power=PRIOR)
    fleet, rng, late = busy_fleet(footprint), np.random.default_rng(3), []
    before = Reading.of(fleet.state, 0.0)
    for tick in range(1, 120 * minutes):
        fleet.run(0.5 * tick)
        if tick % 20 == 0:
            after = Reading.of(fleet.state, fleet.now_seconds)
            watts = sum(energy(TRUTH, 10.0, phase_seconds(before, after, STEP_TIME))) / 10.0
            late.append([(0.5 * tick, watts + rng.normal(0.0, 4.0)) for _ in range(2)])
            before = after
        if tick % 20 == 10 and len(late) > 1:
            for number, (time, value) in enumerate(late.pop(0)):
                watch.take(GpuSample(time_seconds=time, gpu=f"GPU-{number}", power_watts=max(0.0, value)))
            watch.take(GpuSample(time_seconds=time, gpu="GPU-9", mig_instance="3", power_watts=9_000.0))
        watch.follow(fleet)
        if tick == restart_at:
            watch = PowerWatch.restored(json.loads(json.dumps(watch.save())))
            fleet.settings = fleet.settings.model_copy(update={"footprint": footprint})  # as configured
    assert fleet.settings.footprint is not None
    assert watch.calibrations == 0 or fleet.settings.footprint.power != PRIOR
    return watch


def test_the_model_comes_to_draw_what_the_gpus_draw() -> None:
    early = watched(4, PowerWatch())
    mirrored, observed = early.means()
    assert early.calibrations == 0
    assert abs(mirrored / observed - 1.0) > 0.05  # the prior is wrong
    late = watched(MINUTES, PowerWatch())
    mirrored, observed = late.means()  # each by the model in use before it was measured
    assert late.calibrations >= 5
    assert mirrored == pytest.approx(observed, rel=0.03)


def test_a_restart_changes_nothing() -> None:
    assert watched(15, PowerWatch(), restart_at=1_111).save() == watched(15, PowerWatch()).save()


def test_nothing_is_compared_without_a_footprint_or_without_watts() -> None:
    fleet, watch = busy_fleet(None), PowerWatch()
    watch.take(GpuSample(time_seconds=1.0, gpu="g", power_watts=100.0))
    fleet.run(100.0)
    watch.follow(fleet)
    assert math.isnan(watch.means()[0])
    fleet, watch = busy_fleet(Footprint(power=PRIOR)), PowerWatch()
    watch.take(GpuSample(time_seconds=1.0, gpu="g", utilization_ratio=0.5))
    for second in range(0, 300, 10):
        fleet.run(float(second))
        watch.follow(fleet)
    assert not watch.stretches
