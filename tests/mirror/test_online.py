"""Step times follow a fleet whose speed changes, and what is scored was never fitted on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from kavier_twin.mirror import mirror_state
from kavier_twin.mirror.calibration.online import BLOCK_SECONDS, Cusum
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.mirror.pace import Pace
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.workload import make_workload
from kavier_twin.telemetry import RequestFinished, RequestSeen

TRUE = StepTime(fixed=0.012, per_prefill_token=4e-5, per_decode_sequence=4e-4, per_context_token=1e-7)
GUESS = StepTime(fixed=0.01, per_prefill_token=3e-5, per_decode_sequence=3e-5, per_context_token=6e-8)
ENGINE = EngineSettings(num_gpu_blocks=4000, max_num_seqs=64, max_num_batched_tokens=2048)
NOISE = 0.05  # of the speed of each second
TYPICAL_WORK = np.array([100.0, 2000.0, 1000.0, 400_000.0, 0.0, 0.0])

Event = RequestSeen | RequestFinished


def stream(slower: Callable[[float], float], seconds: float, seed: int = 1) -> list[Event]:
    """A fleet's requests at 3 a second, where every step lasts `slower(time)` times what TRUE says, give or take."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / 3, int(3 * seconds)))
    prompt, output = rng.integers(50, 1200, arrival.size), rng.integers(20, 200, arrival.size)
    fleet = Fleet(FleetSettings(engine=ENGINE, step_time=TRUE))
    fleet.feed(make_workload(arrival, prompt, output, index=np.arange(arrival.size)))
    pace = Pace(TRUE)
    for second in range(int(arrival[-1]) + 30):
        pace.apply(fleet, slower(second) * rng.lognormal(0.0, NOISE))
        fleet.run(second + 1.0)
    events: list[Event] = []
    for outcome in fleet.collect():
        events += records_of(outcome)
    return sorted(events, key=lambda event: event.time_seconds)


def records_of(outcome: np.void, tell_pod: bool = False) -> tuple[RequestSeen, RequestFinished]:
    """What the stream tells of a request."""
    identity, began = f"{outcome['index']}", float(outcome["arrival"])
    pod = f"pod-{outcome['replica']}" if tell_pod else None
    return (
        RequestSeen(id=identity, time_seconds=began, prompt_tokens=int(outcome["prompt"]), pod=pod),
        RequestFinished(
            id=identity,
            time_seconds=float(outcome["finish"]),
            output_tokens=int(outcome["output"]),
            ttft_seconds=float(outcome["first_token"]) - began,
            e2e_seconds=float(outcome["finish"]) - began,
        ),
    )


def follow(mirror: Mirror, events: list[Event], until: float) -> list[Event]:
    """Take in what comes before a time; returns the rest."""
    for number, event in enumerate(events):
        if event.time_seconds >= until:
            return events[number:]
        mirror.ingest(event)
        mirror.advance()
    return []


def speed(mirror: Mirror) -> float:
    """How long typical steps last by the mirror's coefficients, TRUE's being 1."""
    found = mirror.fleet.settings.step_time.coefficients() @ TYPICAL_WORK
    return float(found / (TRUE.coefficients() @ TYPICAL_WORK))


@pytest.mark.parametrize("told", [True, False])
def test_without_pods_known_step_times_stay(told: bool) -> None:
    """Where nobody tells which replica served a request, the mirror's batches are others than those that took so
    long: nothing is to be fitted to them."""
    rng = np.random.default_rng(5)
    arrival = np.cumsum(rng.exponential(1 / 12, 1500))
    prompt, output = rng.integers(50, 1200, arrival.size), rng.integers(20, 200, arrival.size)
    # Three real replicas get their requests by chance, which the mirrored router cannot know.
    workload = make_workload(arrival, prompt, output, index=np.arange(arrival.size), replica=rng.integers(0, 3, 1500))
    fleet = Fleet(FleetSettings(engine=ENGINE, replicas=3, step_time=TRUE))
    fleet.feed(workload)
    fleet.run()
    mirror = Mirror(
        MirrorSettings(prior=TRUE), FleetSettings(engine=ENGINE, replicas=3, step_time=TRUE), calibrated=True
    )
    events = [event for outcome in fleet.collect() for event in records_of(outcome, told)]
    follow(mirror, sorted(events, key=lambda event: event.time_seconds), math.inf)
    assert mirror.finished > 1_000
    assert speed(mirror) == pytest.approx(1.0, abs=0.02)
    assert mirror.frontend_seconds < 0.01
    assert (mirror.calibration is not None) is told


def test_a_jump_is_found_and_met() -> None:
    events = stream(lambda time: 1.4 if time >= 200.0 else 1.0, 320.0)
    mirror = Mirror(MirrorSettings(), FleetSettings(engine=ENGINE, step_time=GUESS))
    rest = follow(mirror, events, 200.0)
    assert speed(mirror) == pytest.approx(1.0, abs=0.05)
    assert mirror.speed_changes == 0
    rest = follow(mirror, rest, 230.0)
    assert mirror.speed_changes == 1
    assert speed(mirror) == pytest.approx(1.4, abs=0.12)
    follow(mirror, rest, math.inf)
    assert speed(mirror) == pytest.approx(1.4, abs=0.06)
    assert mirror.speed_changes == 1
    tpot = next(s for s in mirror.scores if (s.kpi, s.statistic, s.window) == ("tpot_seconds", "mean", "5m"))
    assert abs(tpot.error) < 0.04
    assert mirror.calibration is not None
    fixed = mirror.calibration.coefficients["fixed"]
    assert 0.0 < fixed.deviation < fixed.value


def test_a_slow_drift_is_followed() -> None:
    """30 % in 10 minutes."""
    mirror = Mirror(MirrorSettings(), FleetSettings(engine=ENGINE, step_time=GUESS))
    rest = stream(lambda time: 1.0 + 0.3 * time / 600.0, 600.0, seed=2)
    for minute in range(2, 10):
        rest = follow(mirror, rest, 60.0 * minute)
        assert speed(mirror) == pytest.approx(1.0 + 0.03 * minute, abs=0.08)


def test_calibration_is_a_function_of_the_log() -> None:
    """A mirror that was saved and restored within the drift ends where one that ran through does."""
    settings, fleet = MirrorSettings(), FleetSettings(engine=ENGINE, step_time=GUESS)
    events = stream(lambda time: 1.4 if time >= 100.0 else 1.0, 150.0)
    whole, first = Mirror(settings, fleet), Mirror(settings, fleet)
    follow(whole, events, math.inf)
    rest = follow(first, events, 107.0)
    second = mirror_state.restore(mirror_state.save(first), settings, fleet)
    follow(second, rest, math.inf)
    assert whole.speed_changes == 1
    a, b = mirror_state.save(whole), mirror_state.save(second)
    assert a.document == b.document
    assert all((a.arrays[name].tobytes() == b.arrays[name].tobytes()) for name in a.arrays)


def test_noise_is_no_change() -> None:
    """An hour of blocks whose errors scatter by 15 % raises no alarm; a shift of the same size does, both ways."""
    rng = np.random.default_rng(3)
    cusum = Cusum()
    times = np.arange(0.0, 3600.0, BLOCK_SECONDS / 5)
    noise = np.repeat(rng.lognormal(0.0, 0.15, times.size // 5 + 1), 5)
    assert not any(cusum.observe(t, x, 1.0) for t, x in zip(times.tolist(), noise.tolist(), strict=False))
    for ratio in (2.0, 0.5):
        again = Cusum()
        again.restore(cusum.save())
        found = [again.observe(4000.0 + t, ratio * x, 1.0) for t, x in zip(range(60), noise.tolist(), strict=False)]
        change = next(change for change in found if change is not None)
        assert change.ratio == pytest.approx(ratio, rel=0.3)
        assert change.since_seconds >= 4000.0
