"""Every policy on the same scenarios, from the same present."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.forecast.executors import Cancelled, Executor, never
from kavier_twin.forecast.kpis import measure, trimmed
from kavier_twin.forecast.load import LoadForecast, LoadForecaster
from kavier_twin.forecast.restart import begin_restart, needs_restart
from kavier_twin.forecast.result import FailedPolicy, FirstBreach, Forecast, Quantiles, Row, StopReason, Switch, Verdict
from kavier_twin.forecast.scenarios import Scenarios, settle_lengths
from kavier_twin.forecast.settings import ForecastSettings, RollingRestart
from kavier_twin.forecast.slo import Slo
from kavier_twin.forecast.statistics import quantiles, share_interval
from kavier_twin.forecast.verdict import Ranking, Table, verdict
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.simulation.fleet import Fleet, Peaks
from kavier_twin.simulation.kpi_table import METRICS
from kavier_twin.simulation.kpis import Counters
from kavier_twin.simulation.policies import Override, Policy, PolicyError, apply_overrides
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import Records
from kavier_twin.simulation.turns import Turns
from kavier_twin.simulation.workload import Workload

Floats = npt.NDArray[np.float64]

_MOST_WINDOWS = 60  # in which a first breach is looked for
_TREND_EVERY = 3  # of so many scenarios in a row the load of one goes on as it lately rose or fell


class OutOfTime(Exception):
    """The sweep was cancelled before it had anything to tell."""


class Scenario(NamedTuple):
    """A present in which what is in flight has a length, and the requests to come. Read only: tasks share it."""

    present: Fleet
    workload: Workload
    turns: Turns


class Task(NamedTuple):
    """One policy in one scenario. `deadline_unix_seconds`: when its result is of no use any more."""

    scenario: Scenario
    overrides: Mapping[str, Override]
    horizons_seconds: tuple[float, ...]
    slos: tuple[Slo, ...]
    frontend_seconds: float
    deadline_unix_seconds: float = math.inf
    restart: RollingRestart | None = None
    known: Seen | None = None  # what it will see, where that is certain


class Seen(NamedTuple):
    """What one policy did in one scenario."""

    kpis: Floats  # [horizons, METRICS]
    first_breach_seconds: Floats  # [slos] from now; infinite: none
    peaks: Peaks


def sweep(
    snapshot: Snapshot,
    settings: ForecastSettings,
    executor: Executor,
    cancelled: Cancelled = never,
    arrivals: LoadForecast | None = None,
) -> Forecast:
    """Simulate every policy in the same scenarios, one after the other, and read its KPIs at each horizon.

    All of `settings.scenarios`, unless the ranking is certain before: results depend on snapshot and settings only, not
    on the executor. Policies that cannot be applied are told in the result; the rest goes on. The snapshot stays as it
    is. `arrivals` are forecast from the snapshot if not given. Raises OutOfTime if cancelled.
    """
    return _Sweep(snapshot, settings, executor, cancelled, arrivals).forecast(math.inf)


def sweep_within(
    snapshot: Snapshot,
    settings: ForecastSettings,
    executor: Executor,
    seconds: float,
    cancelled: Cancelled = never,
    arrivals: LoadForecast | None = None,
) -> Forecast:
    """The same in so many seconds of wall clock: fewer scenarios where they do not suffice, then fewer policies.

    One scenario of today's policy is always simulated.
    """
    return _Sweep(snapshot, settings, executor, cancelled, arrivals).forecast(seconds)


def draw(
    snapshot: Snapshot,
    horizon_seconds: float,
    numbers: Sequence[int],
    seed: int,
    load: float = 1.0,
    arrivals: LoadForecast | None = None,
    trends: bool = False,
) -> Iterator[Scenario]:
    """The scenarios of these numbers; a scenario has the same present under every load. `trends`: some are trending."""
    scenarios = Scenarios(snapshot, horizon_seconds, load, arrivals)
    for number in numbers:
        present = snapshot.fleet.fork()
        settle_lengths(present, snapshot.recent, np.random.default_rng((seed, number, 1)))
        present.collect()  # what ended before is not of the scenario
        yield Scenario(present, *scenarios.draw((seed, number, 0), trends and trending(number)))


def trending(number: int) -> bool:
    """Whether the load goes on as it lately rose or fell in the scenario of this number.

    How far a climb goes is not known, and a median that follows each is wrong at its end: KPIs are told of the other
    scenarios, first breaches of all.
    """
    return number % _TREND_EVERY == 1


def simulate(task: Task, cancelled: Cancelled = never) -> Seen | None:
    """KPIs at every horizon from one run, which goes on in slices; None if cancelled or past the deadline."""
    if task.known is not None:
        return task.known
    fleet = task.scenario.present.fork()
    start = fleet.now_seconds
    before = at_window = Counters.of(fleet.state, start)
    if task.restart is None:
        fleet.apply(task.overrides)
    else:
        begin_restart(fleet, task.overrides, task.restart)
    fleet.feed_sessions(task.scenario.workload, task.scenario.turns)
    fleet.forget_peaks()
    watched = {slo.metric for slo in task.slos}
    outcomes: list[Records] = []
    kpis = np.empty((len(task.horizons_seconds), len(METRICS)))
    first_breach = np.full(len(task.slos), np.inf)
    for end in _slices(task.horizons_seconds):
        if cancelled() or time.time() > task.deadline_unix_seconds:
            return None
        fleet.run(start + end)
        ended = trimmed(fleet.collect())
        outcomes.append(ended)
        window = measure(fleet, at_window, ended, task.frontend_seconds, watched)
        at_window = Counters.of(fleet.state, fleet.now_seconds)
        for number, slo in enumerate(task.slos):
            if first_breach[number] == np.inf and slo.breached(window[slo.metric]):
                first_breach[number] = end
        if end in task.horizons_seconds:
            outcomes = [np.concatenate(outcomes)]
            found = measure(fleet, before, outcomes[0], task.frontend_seconds, METRICS)
            kpis[task.horizons_seconds.index(end)] = [found[name] for name in METRICS]
    return Seen(kpis, first_breach, fleet.peaks)


def row_of(policy: str, horizon: float, kpis: Floats, slos: Sequence[Slo], at: Sequence[float]) -> Row:
    """A policy at one horizon, from KPIs [scenarios, METRICS], with quantiles `at`."""
    breaches = {slo.name: int(slo.breaches(kpis[:, METRICS.index(slo.metric)]).sum()) for slo in slos}
    return Row(
        policy=policy,
        horizon_seconds=horizon,
        kpis={name: Quantiles(quantiles(kpis[:, number], at)) for number, name in enumerate(METRICS)},
        breach_probability={name: count / len(kpis) for name, count in breaches.items()},
        breach_interval={name: share_interval(count, len(kpis)) for name, count in breaches.items()},
        scenarios=len(kpis),
    )


class _Sweep:
    """One sweep under way."""

    def __init__(
        self,
        snapshot: Snapshot,
        settings: ForecastSettings,
        executor: Executor,
        cancelled: Cancelled,
        arrivals: LoadForecast | None,
    ) -> None:
        self._snapshot = snapshot
        self._settings = settings
        self._executor = executor
        self._cancelled = cancelled
        self._arrivals = arrivals or LoadForecaster().forecast(snapshot, settings.horizons_seconds[-1])
        self._policies, self._failed = _applicable(snapshot, settings.policies)
        self._today = next(policy for policy in self._policies if not policy.overrides)
        # The most important first: when time runs out, the last have to go.
        self._active = [self._today, *(policy for policy in self._policies if policy is not self._today)]
        self._seen: dict[str, list[Seen]] = {policy.name: [] for policy in self._policies}
        self._deadline = math.inf

    def forecast(self, seconds: float) -> Forecast:
        """Run it, in so many seconds."""
        self._deadline = time.time() + seconds
        stopped_because = self._simulate()
        if not self._seen[self._today.name]:
            raise OutOfTime
        complete = max(1, min(len(self._seen[policy.name]) for policy in self._active))
        kept = [policy for policy in self._policies if len(self._seen[policy.name]) >= complete]
        seen = {policy.name: self._seen[policy.name][:complete] for policy in kept}
        table = _table(seen)
        rows = self._rows({policy: kpis[_usual(complete)] for policy, kpis in table.items()})
        return Forecast(
            pool=self._snapshot.pool,
            time_seconds=self._snapshot.time_seconds,
            calibrated=self._snapshot.calibrated,
            rate_requests_per_second=self._arrivals.rate(self._settings.horizons_seconds[-1]),
            scenarios=complete,
            stopped_because=stopped_because,
            shed=tuple(policy.name for policy in self._policies if policy not in kept),
            rows=rows,
            first_breaches=tuple(self._first_breaches(seen)),
            failed=self._failed,
            verdict=self._verdict(table, rows, complete),
            notes=tuple(_notes(len(_usual(complete)), self._settings.quantiles)),
            load=self._arrivals.outlook(self._settings.horizons_seconds),
        )

    def _simulate(self) -> StopReason:
        """Fill `_seen`, scenario by scenario."""
        began, simulated = time.time(), 0
        handed: deque[tuple[int, Policy]] = deque()

        def tasks() -> Iterator[Task]:
            numbers = range(self._settings.scenarios)
            for number, scenario in enumerate(self._draw(numbers)):
                for policy in list(self._active):
                    handed.append((number, policy))
                    first = number == 0 and policy is self._today
                    task = self._task(scenario, policy, math.inf if first else self._deadline)
                    yield task._replace(known=self._known(policy, number))

        with closing(self._executor.run(simulate, tasks(), self._cancelled)) as results:
            for seen in results:
                number, policy = handed.popleft()
                if policy not in self._active:
                    continue
                if seen is None:
                    if self._cancelled():
                        raise OutOfTime
                    return "time"
                self._seen[policy.name].append(seen)
                simulated += 1
                if policy is self._active[-1] and number + 1 < self._settings.scenarios:
                    reason = self._enough(number + 1, (time.time() - began) / simulated)
                    if reason is not None:
                        return reason
        return "all_scenarios"

    def _known(self, policy: Policy, number: int) -> Seen | None:
        """What a policy does in a scenario that today's has been seen in, if it changes only limits out of reach."""
        today = self._seen[self._today.name][number : number + 1]
        settings = self._snapshot.fleet.settings
        return today[0] if today and out_of_reach(settings, policy.overrides, today[0].peaks) else None

    def _enough(self, complete: int, task_seconds: float) -> StopReason | None:
        """Whether to stop after so many scenarios, one policy in one of which took `task_seconds`; sheds policies."""
        least = min(self._settings.least_scenarios, self._settings.scenarios)
        left = self._deadline - time.time()
        if complete >= least:
            table = _table({policy.name: self._seen[policy.name] for policy in self._active})
            if len(table) > 1 and self._ranking(table).certain(self._settings.certainty):
                return "certain"
            return "time" if task_seconds * len(self._active) > left else None
        affordable = left / max(task_seconds, 1e-9) / (least - complete)
        del self._active[max(1, int(min(affordable, len(self._active)))) :]
        return None

    def _draw(self, numbers: Sequence[int]) -> Iterator[Scenario]:
        horizon, seed = self._settings.horizons_seconds[-1], self._settings.seed
        return draw(self._snapshot, horizon, numbers, seed, arrivals=self._arrivals, trends=True)

    def _task(self, scenario: Scenario, policy: Policy, deadline: float, restart: RollingRestart | None = None) -> Task:
        return Task(
            scenario=scenario,
            overrides=policy.overrides,
            horizons_seconds=self._settings.horizons_seconds,
            slos=self._settings.slos,
            frontend_seconds=self._snapshot.frontend_seconds,
            deadline_unix_seconds=deadline,
            restart=restart,
        )

    def _ranking(self, table: Table) -> Ranking:
        return Ranking(table, self._today.name, self._settings.slos, self._settings.objective)

    def _rows(self, table: Table) -> tuple[Row, ...]:
        settings = self._settings
        return tuple(
            row_of(name, horizon, kpis[:, place], settings.slos, settings.quantiles)
            for name, kpis in table.items()
            for place, horizon in enumerate(settings.horizons_seconds)
        )

    def _first_breaches(self, seen: Mapping[str, Sequence[Seen]]) -> Iterator[FirstBreach]:
        for policy, of_policy in seen.items():
            times = np.array([one.first_breach_seconds for one in of_policy])
            for number, slo in enumerate(self._settings.slos):
                # Between a finite time and none lies none.
                early, expected = np.quantile(times[:, number], (0.1, 0.5), method="inverted_cdf")
                probability = float(np.isfinite(times[:, number]).mean())
                yield FirstBreach(policy, slo.name, float(expected), float(early), probability)

    def _verdict(self, table: Table, rows: Sequence[Row], complete: int) -> Verdict:
        settings = self._snapshot.fleet.settings
        ranking = self._ranking(table)
        best = next(policy for policy in self._policies if policy.name == ranking.best)
        found = verdict(settings, best, self._today.name, ranking, rows)
        if not needs_restart(settings, best.overrides):
            return found
        tasks = (
            self._task(scenario, best, self._deadline, self._settings.switch)
            for scenario in self._draw(range(complete))
        )
        with closing(self._executor.run(simulate, tasks, self._cancelled)) as results:
            switching = [seen for seen in results if seen is not None]
        if len(switching) < complete:
            return found
        both = {self._today.name: table[self._today.name], **_table({best.name: switching})}
        gain = self._ranking(both).gain(best.name)
        return replace(found, switch=Switch(self._rows({best.name: both[best.name][_usual(complete)]}), gain))


def out_of_reach(settings: FleetSettings, overrides: Mapping[str, Override], peaks: Peaks) -> bool:
    """Whether a policy does what today's does: it changes nothing but limits which engines stay below, old and new."""
    engine = settings.engine
    if not overrides or not overrides.keys() <= {"max_num_seqs", "max_num_batched_tokens"}:
        return False
    if engine.eviction == "cost_aware" or not engine.enable_chunked_prefill:  # costs, and admission, depend on them
        return False
    changed = apply_overrides(settings, overrides).engine
    return peaks.running < min(engine.max_num_seqs, changed.max_num_seqs) and peaks.batch_tokens < min(
        engine.max_num_batched_tokens, changed.max_num_batched_tokens
    )


def _applicable(snapshot: Snapshot, policies: Sequence[Policy]) -> tuple[list[Policy], tuple[FailedPolicy, ...]]:
    applicable, failed = [], []
    for policy in policies:
        try:
            apply_overrides(snapshot.fleet.settings, policy.overrides)
            applicable.append(policy)
        except PolicyError as error:
            failed.append(FailedPolicy(policy.name, str(error)))
    return applicable, tuple(failed)


def _table(seen: Mapping[str, Sequence[Seen]]) -> Table:
    return {policy: np.array([one.kpis for one in of_policy]) for policy, of_policy in seen.items()}


def _usual(scenarios: int) -> list[int]:
    """Those of so many whose load is not trending."""
    return [number for number in range(scenarios) if not trending(number)]


def _slices(horizons: Sequence[float]) -> list[float]:
    """Ends of the stretches a run goes in: windows as long as the shortest horizon, and the horizons."""
    window = max(horizons[0], horizons[-1] / _MOST_WINDOWS)
    windows = window * np.arange(1, int(horizons[-1] / window) + 1)
    return sorted({*map(float, windows), *horizons})


def _notes(scenarios: int, at: Sequence[float]) -> list[str]:
    needed = math.ceil(round(1.0 / min(*at, 1.0 - max(at)), 6)) - 1
    if scenarios >= needed:
        return []
    return [
        f"{scenarios} scenario(s): quantiles beyond {1 / (scenarios + 1):.0%} and "
        f"{scenarios / (scenarios + 1):.0%} are the lowest and highest seen; {needed} scenarios would tell those of "
        f"{min(at):.0%} and {max(at):.0%}"
    ]
