from __future__ import annotations

import numpy as np
import pytest

from forecast.streams import between, chat_stream, fleet_settings, hit_ratio, snapshot_at
from kavier_twin.forecast.executors import ThreadExecutor
from kavier_twin.forecast.restart import begin_restart, needs_restart
from kavier_twin.forecast.settings import ForecastSettings, RollingRestart
from kavier_twin.forecast.slo import Slo
from kavier_twin.forecast.sweep import sweep
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.policies import Policy
from kavier_twin.simulation.workload import Workload
from simulation.invariants import check_state

SEQS = {"max_num_seqs": 512}


@pytest.fixture(scope="module")
def stream() -> Workload:
    return chat_stream(3, 260.0)


def warm(stream: Workload, **given: int) -> Fleet:
    fleet = Fleet(fleet_settings(**given))
    fleet.feed(between(stream, 0.0, 100.0))
    fleet.run(100.0)
    fleet.collect()
    return fleet


def restarted(stream: Workload, restart: RollingRestart, replicas: int, until: float = 250.0) -> Fleet:
    fleet = warm(stream, replicas=replicas)
    begin_restart(fleet, SEQS, restart)
    fleet.feed(between(stream, 100.0, until))
    return fleet


def test_some_at_a_time_are_out_and_come_back(stream: Workload) -> None:
    fleet = restarted(stream, RollingRestart(startup_seconds=20, drain_seconds=5, max_unavailable_ratio=0.5), 4)
    out = []
    for time in np.arange(100.5, 160.0, 1.0):
        fleet.run(float(time))
        out.append(4 - int(fleet.state.replicas["accepting"].sum()))
        check_state(fleet.state)
    assert max(out) == 2
    assert sum(out) == 4 * 25
    assert fleet.settings.engine.max_num_seqs == 512
    fleet.run()
    assert fleet.collect()["status"].max() == 0  # none was lost


def test_a_restart_loses_the_cache(stream: Workload) -> None:
    restart = RollingRestart(startup_seconds=1, drain_seconds=1, max_unavailable_ratio=0.5)
    fleet, untouched = restarted(stream, restart, 2, until=104.5), warm(stream, replicas=2)
    untouched.feed(between(stream, 100.0, 104.5))
    for each in (fleet, untouched):
        each.run(104.5)
    later = between(stream, 104.5, 115.0)
    assert hit_ratio(fleet, later) < hit_ratio(untouched, later) - 0.05


def test_a_single_replica_is_replaced_before_it_goes(stream: Workload) -> None:
    fleet = restarted(stream, RollingRestart(startup_seconds=10), 1)
    for time in (105.0, 115.0, 200.0):
        fleet.run(time)
        assert fleet.state.replicas["accepting"].sum() == 1
    assert fleet.state.replicas["leaving"].tolist() == [1, 0]


def test_new_replicas_come_when_they_are_started(stream: Workload) -> None:
    fleet = warm(stream, replicas=2)
    begin_restart(fleet, {"replicas": 3}, RollingRestart(startup_seconds=30))
    fleet.run(125.0)
    assert fleet.state.replicas["accepting"].sum() == 2
    fleet.run(131.0)
    assert fleet.state.replicas["accepting"].sum() == 3


def test_what_needs_a_restart() -> None:
    settings = fleet_settings(replicas=2)
    assert needs_restart(settings, SEQS)
    assert needs_restart(settings, {"replicas": 3})
    assert not needs_restart(settings, {"replicas": 1})
    assert not needs_restart(settings, {"router": "round_robin"})


def test_the_verdict_tells_what_switching_costs(stream: Workload) -> None:
    """A cache that is far too small: more of it is better once it is there, less so while it is brought."""
    snapshot = snapshot_at(stream, fleet_settings(replicas=4, num_gpu_blocks=150), 150.0, 100.0)
    settings = ForecastSettings(
        policies=(Policy(name="today"), Policy(name="more", overrides={"num_gpu_blocks": "8x"})),
        horizons_seconds=(20.0, 60.0),
        scenarios=4,
        slos=(Slo(name="hits", metric="prefix_cache_hit_ratio", threshold=0.78),),
        switch=RollingRestart(startup_seconds=5.0, drain_seconds=5.0),
    )
    verdict = sweep(snapshot, settings, ThreadExecutor(2)).verdict
    assert verdict.policy == "more"
    assert verdict.switch is not None
    assert [row.horizon_seconds for row in verdict.switch.rows] == [20.0, 60.0]
    assert verdict.switch.gain.by_objective["slo"] < verdict.gain.by_objective["slo"]
