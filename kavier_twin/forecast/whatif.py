"""What if: one question to the live state, answered from a fork of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import count, islice
from threading import Lock
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from kavier_twin.forecast.executors import Executor, ThreadExecutor
from kavier_twin.forecast.load import LoadForecast, LoadForecaster
from kavier_twin.forecast.result import Row
from kavier_twin.forecast.slo import Slo
from kavier_twin.forecast.sweep import Task, draw, row_of, simulate, trending
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.simulation.kpi_table import Metric
from kavier_twin.simulation.policies import Override, apply_overrides, hypothetical_reasons, vllm_flags

Floats = npt.NDArray[np.float64]

MOST_WAITING: Final = 8  # questions; each waits some seconds for every one before it

_QUANTILES: Final = (0.1, 0.5, 0.9)

CaseName = Literal["today", "today_at_load", "asked"]


class Question(BaseModel):
    """What to change, how much more load there is, and how far to look."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    overrides: dict[str, Override] = Field(
        default={},
        description="Settings to change, including `replicas`. Names and factors such as `0.5x` are those of a policy.",
        examples=[{"kv_cache_dtype": "fp8", "replicas": 6}],
    )
    load: Annotated[float, Field(gt=0.0, le=100.0, allow_inf_nan=False)] = Field(
        default=1.0, description="Arrival rate as a multiple of the predicted rate.", examples=[1.5]
    )
    horizon_seconds: Annotated[float, Field(gt=0.0, le=86_400.0, allow_inf_nan=False)] = Field(
        default=900.0, description="Horizons in seconds from now.", examples=[900.0]
    )
    scenarios: Annotated[int, Field(ge=1, le=64)] = Field(default=8, description="Maximum number of scenarios.")
    budget_seconds: Annotated[float, Field(gt=0.0, le=60.0)] = Field(
        default=2.0,
        description="Time budget for the answer. If it is too short, fewer scenarios are simulated, but at least one.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Seed. The same seed and state give the same answer."
    )
    pool: str | None = Field(
        default=None, description="Name of the pool. Optional if there is only one.", examples=["chat"]
    )


class Spread(BaseModel):
    """A KPI over the scenarios; null: nothing was observed."""

    p10: float | None = Field(examples=[0.4])
    p50: float | None = Field(examples=[0.5])
    p90: float | None = Field(examples=[0.9])


class Case(BaseModel):
    """One policy under one load, from now to the horizon.

    `today`: today's policy under the load foreseen; `today_at_load`: under the load asked about; `asked`: the question.
    """

    name: CaseName = Field(examples=["asked"])
    overrides: dict[str, Override] = Field(examples=[{"kv_cache_dtype": "fp8"}])
    load: float = Field(examples=[1.5])
    kpis: dict[Metric, Spread] = Field(description="Quantiles by KPI, in the unit at the end of its name.")
    breach_probability: dict[str, float] = Field(
        description="Share of scenarios that violate the SLO, by SLO.", examples=[{"ttft_p99": 0.5}]
    )
    breach_interval: dict[str, tuple[float, float]] = Field(
        description="90 % credible interval of the violation probability, by SLO.", examples=[{"ttft_p99": [0.3, 0.7]}]
    )


class Answer(BaseModel):
    """Today's policy beside the one asked about, on the same scenarios."""

    pool: str = Field(examples=["chat"])
    event_seconds: float = Field(description="Event time of the state that was used.", examples=[1767225600.5])
    calibrated: bool = Field(examples=[True])
    horizon_seconds: float = Field(examples=[900.0])
    scenarios: int = Field(examples=[2])
    rate_requests_per_second: float = Field(
        description="Predicted arrival rate, before `load` is applied.", examples=[4.2]
    )
    deployable: bool = Field(description="Whether `vllm serve` has flags for all changes.", examples=[True])
    vllm_flags: tuple[str, ...] = Field(examples=[["--kv-cache-dtype fp8"]])
    hypothetical_reasons: tuple[str, ...] = Field(
        description="Why flags cannot deploy the change, if they cannot.", examples=[[]]
    )
    cases: tuple[Case, ...] = Field(
        description="The current policy first, the one asked about last. Equal policies are one case."
    )
    duration_seconds: float = Field(
        description="Duration in seconds, without the time spent waiting for other requests.", examples=[1.5]
    )


class Busy(Exception):
    """Too many requests are waiting."""


class NothingYet(Exception):
    """There is no state to ask yet."""


def answer(
    snapshot: Snapshot,
    question: Question,
    slos: Sequence[Slo],
    executor: Executor,
    arrivals: LoadForecast | None = None,
) -> Answer:
    """The KPIs of today's policy and of the one asked about. The snapshot stays as it is.

    `arrivals` are forecast from the snapshot if not given.
    Raises PolicyError for overrides that this fleet cannot have.
    """
    began = time.perf_counter()
    arrivals = arrivals or LoadForecaster().forecast(snapshot, question.horizon_seconds)
    settings = snapshot.fleet.settings
    changed = apply_overrides(settings, question.overrides)
    cases = _cases(question)

    loads = list(dict.fromkeys(load for _, _, load in cases))
    horizon, seed = question.horizon_seconds, question.seed
    numbers = list(islice((number for number in count() if not trending(number)), question.scenarios))
    drawn = {load: draw(snapshot, horizon, numbers, seed, load, arrivals) for load in loads}
    kpis: list[Floats] = []  # by scenario: [cases, METRICS]
    while len(kpis) < question.scenarios and (
        not kpis or _time_for_more(len(kpis), time.perf_counter() - began, question)
    ):
        scenario = {load: next(drawn[load]) for load in loads}
        tasks = (
            Task(scenario[load], overrides, (horizon,), (), snapshot.frontend_seconds) for _, overrides, load in cases
        )
        kpis.append(np.array([one.kpis[0] for one in executor.run(simulate, tasks) if one is not None]))
    return Answer(
        pool=snapshot.pool,
        event_seconds=snapshot.time_seconds,
        calibrated=snapshot.calibrated,
        horizon_seconds=question.horizon_seconds,
        scenarios=len(kpis),
        rate_requests_per_second=arrivals.rate(question.horizon_seconds),
        deployable=not hypothetical_reasons(settings, changed),
        vllm_flags=tuple(vllm_flags(settings, changed)),
        hypothetical_reasons=tuple(hypothetical_reasons(settings, changed)),
        cases=tuple(
            _case(name, overrides, load, row_of(name, question.horizon_seconds, of_case, slos, _QUANTILES))
            for (name, overrides, load), of_case in zip(cases, np.stack(kpis, axis=1), strict=True)
        ),
        duration_seconds=time.perf_counter() - began,
    )


class WhatIf:
    """Answers one question at a time; others wait for their turn, up to a limit.

    `snapshot_source` gives a fork of the present, or None where there is none yet; only it touches the mirror.
    `load` tells the arrivals to come, as the forecast cycle fitted it last.
    """

    def __init__(
        self,
        snapshot_source: Callable[[], Snapshot | None],
        slos: Sequence[Slo],
        workers: int,
        load: LoadForecaster | None = None,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._snapshot_source = snapshot_source
        self._slos = tuple(slos)
        self._executor = ThreadExecutor(workers)
        self._load = load or LoadForecaster()
        self._most_waiting = most_waiting
        self.asked = 0  # waiting or being answered
        self._counting = Lock()
        self._answering = Lock()

    def ask(self, question: Question) -> Answer:
        """Wait for the turn and answer. Raises Busy, NothingYet, and PolicyError for overrides that cannot be."""
        with self._counting:
            if self.asked > self._most_waiting:
                raise Busy(f"{self._most_waiting} questions wait already; ask again in a few seconds")
            self.asked += 1
        try:
            with self._answering:
                snapshot = self._snapshot_source()
                if snapshot is None:
                    raise NothingYet("the mirror has not processed any telemetry yet")
                arrivals = self._load.forecast(snapshot, question.horizon_seconds, refit=False)
                return answer(snapshot, question, self._slos, self._executor, arrivals)
        finally:
            with self._counting:
                self.asked -= 1


def _time_for_more(scenarios: int, seconds: float, question: Question) -> bool:
    """Whether one more scenario ends within the budget, if it takes as long as those before."""
    return seconds * (scenarios + 1) / scenarios <= question.budget_seconds


def _cases(question: Question) -> list[tuple[CaseName, dict[str, Override], float]]:
    cases: list[tuple[CaseName, dict[str, Override], float]] = [("today", {}, 1.0)]
    if question.load != 1.0 and question.overrides:
        cases.append(("today_at_load", {}, question.load))
    if question.load != 1.0 or question.overrides:
        cases.append(("asked", question.overrides, question.load))
    return cases


def _case(name: CaseName, overrides: dict[str, Override], load: float, row: Row) -> Case:
    return Case(
        name=name,
        overrides=overrides,
        load=load,
        kpis={
            metric: Spread(**{f"p{100 * at:g}": _known(value) for at, value in values.values.items()})
            for metric, values in row.kpis.items()
        },
        breach_probability=row.breach_probability,
        breach_interval=row.breach_interval,
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
