"""Every policy on the same futures, from the same present."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kavier_twin.forecast.executors import Executor
from kavier_twin.forecast.futures import Futures, settle_lengths
from kavier_twin.forecast.load import LoadForecast, LoadForecaster
from kavier_twin.forecast.measure import measure
from kavier_twin.forecast.result import FailedPolicy, Forecast, Quantiles, Row
from kavier_twin.forecast.slo import METRICS, Metric, Slo
from kavier_twin.forecast.verdict import best_policy
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.kpis import Counters
from kavier_twin.simulation.policies import Override, Policy, PolicyError, apply_overrides
from kavier_twin.simulation.workload import Workload
from kavier_twin.twin.snapshot import Snapshot

_QUANTILES = (0.10, 0.50, 0.90)


def sweep(
    snapshot: Snapshot,
    policies: Sequence[Policy],
    horizons_seconds: Sequence[float],
    futures: int,
    seed: int,
    slos: Sequence[Slo],
    executor: Executor,
    arrivals: LoadForecast | None = None,
) -> Forecast:
    """Simulate every policy in the same `futures` futures and read its KPIs at each horizon (ascending, seconds).

    Policies that cannot be applied are told in the result; the rest goes on. The snapshot stays as it is. Results
    depend on the arguments only, not on the executor. `arrivals` are forecast from the snapshot if not given.
    """
    arrivals = arrivals or LoadForecaster().forecast(snapshot, horizons_seconds[-1])
    applicable, failed = _applicable(snapshot, policies)
    drawn = draw(snapshot, horizons_seconds[-1], futures, seed, arrivals=arrivals)
    tasks = [
        Task(future, policy.overrides, tuple(horizons_seconds), snapshot.frontend_seconds)
        for policy in applicable
        for future in drawn
    ]
    measured = executor.map(simulate, tasks)
    rows = []
    for number, policy in enumerate(applicable):
        of_policy = measured[number * futures : (number + 1) * futures]
        for place, horizon in enumerate(horizons_seconds):
            rows.append(row_of(policy.name, horizon, [kpis[place] for kpis in of_policy], slos))
    return Forecast(
        pool=snapshot.pool,
        time_seconds=snapshot.time_seconds,
        calibrated=snapshot.calibrated,
        rate_requests_per_second=arrivals.rate(horizons_seconds[-1]),
        load=arrivals.outlook(horizons_seconds),
        futures=futures,
        rows=tuple(rows),
        failed=failed,
        verdict=best_policy(snapshot.fleet.settings, applicable, rows),
    )


class Future(NamedTuple):
    """A present in which what is in flight has a length, and the requests to come. Read only: tasks share it."""

    present: Fleet
    workload: Workload


class Task(NamedTuple):
    """One policy in one future."""

    future: Future
    overrides: Mapping[str, Override]
    horizons_seconds: tuple[float, ...]
    frontend_seconds: float


def draw(
    snapshot: Snapshot,
    horizon_seconds: float,
    futures: int,
    seed: int,
    load: float = 1.0,
    arrivals: LoadForecast | None = None,
) -> list[Future]:
    """So many futures; the first ones of many are the few, and those of another load have the same presents."""
    futures_of = Futures(snapshot, horizon_seconds, load, arrivals)
    return [
        Future(_present(snapshot, np.random.default_rng((seed, number, 1))), futures_of.draw((seed, number, 0)))
        for number in range(futures)
    ]


def _applicable(snapshot: Snapshot, policies: Sequence[Policy]) -> tuple[list[Policy], tuple[FailedPolicy, ...]]:
    applicable, failed = [], []
    for policy in policies:
        try:
            apply_overrides(snapshot.fleet.settings, policy.overrides)
            applicable.append(policy)
        except PolicyError as error:
            failed.append(FailedPolicy(policy.name, str(error)))
    return applicable, tuple(failed)


def _present(snapshot: Snapshot, rng: np.random.Generator) -> Fleet:
    """The fleet as a future begins: what is in flight has a length, and nothing has ended yet."""
    present = snapshot.fleet.fork()
    settle_lengths(present, snapshot.recent, rng)
    present.collect()
    return present


def simulate(task: Task) -> list[dict[Metric, float]]:
    """KPIs at every horizon, from one run."""
    fleet = task.future.present.fork()
    start = fleet.now_seconds
    before = Counters.of(fleet.state, start)
    fleet.apply(task.overrides)
    fleet.feed(task.future.workload)
    outcomes, kpis = [], []
    for horizon in task.horizons_seconds:
        fleet.run(start + horizon)
        outcomes.append(fleet.collect())
        kpis.append(measure(fleet, before, np.concatenate(outcomes), task.frontend_seconds))
    return kpis


def row_of(policy: str, horizon: float, kpis: Sequence[dict[Metric, float]], slos: Sequence[Slo]) -> Row:
    """A policy's KPIs at one horizon, over as many futures."""
    return Row(
        policy=policy,
        horizon_seconds=horizon,
        kpis={name: _quantiles([future[name] for future in kpis]) for name in METRICS},
        breach_probability={
            slo.name: sum(slo.breached(future[slo.metric]) for future in kpis) / len(kpis) for slo in slos
        },
    )


def _quantiles(values: Sequence[float]) -> Quantiles:
    seen = np.array([value for value in values if not np.isnan(value)])
    return Quantiles(*map(float, np.quantile(seen, _QUANTILES))) if seen.size else Quantiles(np.nan, np.nan, np.nan)
