"""Forks, determinism, and no decision from the future."""

from __future__ import annotations

import numpy as np
import pytest

from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.workload import Workload, make_workload, take_rows

STEP = StepTime(fixed=0.00613, per_prefill_token=3e-5, per_decode_sequence=4e-5, per_context_token=4.5e-8)


def settings(asynchronous: bool) -> FleetSettings:
    engine = EngineSettings(num_gpu_blocks=700, max_num_seqs=32, async_scheduling=asynchronous)
    return FleetSettings(replicas=2, engine=engine, step_time=STEP)


def workload() -> Workload:
    rng = np.random.default_rng(5)
    requests, blocks = 300, 40
    chain = np.arange(requests * blocks).reshape(requests, blocks) + 10**6
    chain[:, :20] = rng.integers(0, 6, requests)[:, None] * 100 + np.arange(20) + 1
    return make_workload(
        np.cumsum(rng.exponential(0.03, requests)),
        rng.integers(321, 640, requests),
        rng.integers(1, 250, requests),
        chain=chain.ravel(),
        chain_starts=np.arange(requests + 1) * blocks,
        hash_tokens=16,
        covered=320,
    )


def digest(fleet: Fleet) -> list[bytes]:
    return [array.tobytes() for array in fleet.state]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_fork_continues_bit_for_bit(asynchronous: bool) -> None:
    fleet = Fleet(settings(asynchronous))
    fleet.feed(workload())
    fleet.at(6.0, Fleet.crash, 0)
    fleet.at(6.5, Fleet.add)
    fleet.at(7.0, Fleet.apply, {"num_gpu_blocks": "0.7x"})
    fleet.run(4.0)
    fork = fleet.fork()
    fleet.run()
    ended = digest(fleet)
    fork.run()
    assert digest(fork) == ended
    assert fork.collect().tobytes() == fleet.collect().tobytes()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_same_run_gives_the_same_bytes(asynchronous: bool) -> None:
    fleets = [Fleet(settings(asynchronous)) for _ in range(2)]
    for fleet in fleets:
        fleet.feed(workload())
        fleet.run()
    assert digest(fleets[0]) == digest(fleets[1])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_past_does_not_depend_on_the_future(asynchronous: bool) -> None:
    """Drop the arrivals after t, and let everything still running at t generate much more: until t nothing changes."""
    whole, now = workload(), 4.0
    fleet = Fleet(settings(asynchronous))
    fleet.feed(whole)
    fleet.run(now)
    past = fleet.collect()
    ended = set(past["index"].tolist())
    rows = np.flatnonzero(whole.arrival <= now)
    other = take_rows(whole, rows)
    longer = np.array([index not in ended for index in other.index.tolist()])
    other = other._replace(output=np.where(longer, other.output + 500, other.output))
    changed = Fleet(settings(asynchronous))
    changed.feed(other)
    changed.run(now)
    again = changed.collect()
    for name in ("index", "replica", "cached", "preemptions"):
        assert again[name].tolist() == past[name].tolist()
    for name in ("scheduled", "first_token", "finish"):
        np.testing.assert_allclose(again[name], past[name], rtol=1e-12)
