"""Bringing a policy to the engines: a rolling restart, which costs caches and, for a while, capacity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kavier_twin.forecast.settings import RollingRestart
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.lifecycle import Replacement, Restart
from kavier_twin.simulation.policies import Override, apply_overrides, vllm_flags
from kavier_twin.simulation.settings import FleetSettings


def needs_restart(settings: FleetSettings, overrides: Mapping[str, Override]) -> bool:
    """Whether a policy comes by restarting or starting engines. Where no flag deploys it, there is nothing to bring."""
    changed = apply_overrides(settings, overrides)
    return bool(vllm_flags(settings, changed)) or changed.replicas > settings.replicas


def begin_restart(fleet: Fleet, overrides: Mapping[str, Override], restart: RollingRestart) -> None:
    """Change the fleet as `Fleet.apply` does, and let its replicas restart one group after another from now on.

    Replicas run with the new settings from the beginning: simulated engines of a pool are alike. What the change costs
    lies in the caches, the replicas out of service and the requests begun again. More replicas come when started.
    """
    changed = apply_overrides(fleet.settings, overrides)
    flags = vllm_flags(fleet.settings, changed)
    added = changed.replicas - fleet.settings.replicas
    fleet.apply({name: value for name, value in overrides.items() if name != "replicas" or added < 0})
    now = fleet.now_seconds
    if added > 0:
        fleet.at(now + restart.startup_seconds, Fleet.add, added)
    if not flags:
        return
    accepting = np.flatnonzero(fleet.state.replicas["accepting"]).tolist()
    at_a_time = int(restart.max_unavailable_ratio * len(accepting))
    if at_a_time == 0:
        fleet.plan(Replacement(now + restart.startup_seconds, accepting, restart.startup_seconds))
    else:
        fleet.plan(Restart(now, accepting, at_a_time, restart.drain_seconds, restart.startup_seconds))
