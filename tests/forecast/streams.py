"""Streams of chat sessions made up for the forecaster's tests, and snapshots of a fleet that serves them."""

from __future__ import annotations

from typing import Any

import numpy as np

from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.footprint import Footprint, PowerModel
from kavier_twin.simulation.kpis import Counters
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.turns import Turns
from kavier_twin.simulation.workload import Workload, make_workload, take_rows

HASH_TOKENS = 16
STEP_TIME = StepTime(fixed=0.01, per_prefill_token=2e-5, per_decode_sequence=1e-4, per_context_token=1e-8)


def fleet_settings(*, replicas: int = 1, **engine: Any) -> FleetSettings:
    return FleetSettings(
        replicas=replicas,
        step_time=STEP_TIME,
        engine=EngineSettings(**({"num_gpu_blocks": 2_000} | engine)),
        footprint=Footprint(power=PowerModel(idle_watts=70.0, max_watts=700.0), price_per_gpu_hour=2.0),
    )


def chat_stream(
    seed: int,
    seconds: float,
    *,
    sessions_per_second: float = 1.0,
    systems: int = 5,
    turns_mean: float = 3.0,
    think_seconds: float = 6.0,
    message_tokens: int = 60,
    output_tokens: int = 50,
) -> Workload:
    """Sessions that begin with one of a few system prompts; every turn holds all that was said before.

    Chains cover prompt and output. A session's number in `session` is the truth that `read_stream` must find.
    """
    rng = np.random.default_rng(seed)
    prefixes = [[(1 << 40) + 1000 * system + block for block in range(8 + 6 * system)] for system in range(systems)]
    rows: list[tuple[float, int, int, list[int], int]] = []
    next_content, begin = 1, 0.0
    for session in range(1_000_000):
        begin += rng.exponential(1.0 / sessions_per_second)
        if begin >= seconds:
            break
        content = list(prefixes[int(systems * rng.random() ** 2)])
        time, tokens = begin, len(content) * HASH_TOKENS
        for _ in range(rng.geometric(1.0 / turns_mean)):
            prompt = tokens + 10 + int(rng.exponential(message_tokens))
            output = 1 + int(rng.exponential(output_tokens))
            tokens = prompt + output
            while len(content) < tokens // HASH_TOKENS:
                content.append(next_content)
                next_content += 1
            rows.append((time, prompt, output, list(content), session))
            time += 3.0 + rng.exponential(think_seconds)
    rows = sorted(row for row in rows if row[0] < seconds)
    starts = np.concatenate([[0], np.cumsum([len(row[3]) for row in rows])])
    return make_workload(
        [row[0] for row in rows],
        [row[1] for row in rows],
        [row[2] for row in rows],
        chain=[key for row in rows for key in row[3]],
        chain_starts=starts,
        hash_tokens=HASH_TOKENS,
        covered=np.diff(starts) * HASH_TOKENS,
        session=[row[4] for row in rows],
    )


def between(workload: Workload, start: float, end: float) -> Workload:
    """The requests that arrive in [start, end)."""
    return take_rows(workload, np.flatnonzero((workload.arrival >= start) & (workload.arrival < end)))


def snapshot_at(
    workload: Workload,
    settings: FleetSettings,
    time: float,
    window: float,
    *,
    frontend: float = 0.0,
    held: bool = False,
    tells_ends: bool = True,
) -> Snapshot:
    """A fleet that served the workload up to `time`; `held`: nobody told it yet when its live requests will end."""
    past = between(workload, 0.0, time)
    past = past._replace(delivered=past.arrival + frontend)
    fleet, outcomes = _served(settings, past, time)
    finished = outcomes["index"]
    if held:
        unfinished = ~np.isin(past.index, finished)
        fleet, _ = _served(settings, past._replace(held=unfinished.astype(np.int8)), time)
    recent = between(past, time - window, time)
    recent = recent._replace(output=np.where(np.isin(recent.index, finished), recent.output, 0))
    ends = dict(zip(finished.tolist(), outcomes["finish"].tolist(), strict=True))
    ended = np.array([ends.get(index, np.nan) for index in recent.index.tolist()]) if tells_ends else None
    return Snapshot("default", time, fleet, recent, window, frontend, calibrated=True, ended_seconds=ended)


def _served(settings: FleetSettings, past: Workload, time: float) -> tuple[Fleet, Any]:
    fleet = Fleet(settings)
    fleet.feed(past)
    fleet.run(time)
    return fleet, fleet.collect()


def empty_snapshot(settings: FleetSettings | None = None, time: float = 100.0) -> Snapshot:
    """A fleet that never saw a request."""
    fleet = Fleet(settings or fleet_settings(), start_seconds=time)
    return Snapshot("default", time, fleet, make_workload([], [], []), 60.0, 0.0, calibrated=False)


def hit_ratio(fleet: Fleet, scenario: Workload, turns: Turns | None = None) -> float:
    """Prefix-cache hit ratio of these requests on a copy of the fleet as it is now."""
    fork = fleet.fork()
    before = Counters.of(fork.state, fork.now_seconds)
    if turns is None:
        fork.feed(scenario)
    else:
        fork.feed_sessions(scenario, turns)
    fork.run()
    after = Counters.of(fork.state, fork.now_seconds)
    return (after.hit_tokens - before.hit_tokens) / (after.query_tokens - before.query_tokens)


def state_bytes(fleet: Fleet) -> bytes:
    return b"".join(array.tobytes() for array in fleet.state)
