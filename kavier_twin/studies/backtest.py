"""The whole twin over a trace in fast time: mirror and forecaster see only what was known then, and are judged by the
rest.

A recording tells how long its requests took; the twin starts uncalibrated, as a live one does. For a trace without
latencies reality is the simulation of its requests on the fleet given: the twin then knows the engine, and is judged by
how well it knows the load to come.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kavier_twin.errors import UserError
from kavier_twin.forecast.forecaster import Forecaster, ForecastSettings
from kavier_twin.forecast.slo import Slo
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.recordings.recording import recorded_samples
from kavier_twin.recordings.replay_source import ReplaySource
from kavier_twin.recordings.scenario import Scenario
from kavier_twin.recordings.simulated_reality import simulated_reality
from kavier_twin.scores.keeper import follow, read
from kavier_twin.scores.readings import Reading
from kavier_twin.scores.scorer import Moment, ScoredBreach, ScoredKpi, Scorer, Scores
from kavier_twin.simulation.policies import Policy
from kavier_twin.simulation.settings import CRUDE_STEP_TIME
from kavier_twin.telemetry import EngineSample, RequestRecord

TODAY: Final = "today"
_CALIBRATE_AFTER = 60  # requests: a recording is short
_CALIBRATE_EVERY = 150


@dataclass(frozen=True)
class Backtest:
    """What was foreseen and what came. Times in seconds of the trace."""

    scores: Scores
    kpis: tuple[ScoredKpi, ...]
    breaches: tuple[ScoredBreach, ...]
    moments: tuple[Moment, ...]
    forecasts: int
    requests: int
    measured: bool  # whether reality is a recording's


def reshaped(records: Sequence[RequestRecord], shape: Sequence[tuple[float, float]]) -> list[RequestRecord]:
    """The same requests in the same order, coming so many times as fast: `shape` has (seconds, factor), ascending,
    straight in between, the last factor holding on. What was measured of them no longer holds and is taken away."""
    if not records:
        return []
    times, factors = np.array(shape, np.float64).T
    begin = records[0].time_seconds
    span = records[-1].time_seconds - begin
    # Old time that has passed at each new time: the integral of the factor. Fine enough to invert by interpolation.
    latest = times[-1] + span / max(float(factors[-1]), 1e-9)
    new = np.linspace(0.0, latest, 100_001)
    speed = np.interp(new, times, factors)
    old = np.concatenate([[0.0], np.cumsum(0.5 * (speed[1:] + speed[:-1]) * np.diff(new))])
    when = np.interp([record.time_seconds - begin for record in records], old, new)
    gone = {"ttft_seconds": None, "e2e_seconds": None, "queue_seconds": None, "cached_tokens": None}
    return [
        record.model_copy(update={"time_seconds": begin + float(time), **gone})
        for record, time in zip(records, when, strict=True)
    ]


def backtest(
    scenario: Scenario,
    forecast: ForecastSettings,
    slos: Sequence[Slo],
    *,
    shape: Sequence[tuple[float, float]] = (),
    warm_up_seconds: float = 300.0,
    progress: Callable[[float], None] = lambda _: None,
) -> Backtest:
    """Run the twin over the scenario's trace; forecasts begin after `warm_up_seconds`, or a quarter of the trace if
    that is less. Raises UserError for a trace that is too short for any horizon."""
    records = list(scenario.trace.records)
    readings: list[tuple[str, Reading]] = []
    samples: list[EngineSample] = []
    measured = not shape and all(record.e2e_seconds is not None for record in records) and bool(records)
    fleet = scenario.fleet
    if measured:
        samples = recorded_samples(scenario.trace)
        fleet = fleet.model_copy(update={"step_time": CRUDE_STEP_TIME})
        settings = MirrorSettings(
            ordering_seconds=0.0,
            calibrate_after_requests=_CALIBRATE_AFTER,
            recalibrate_every_requests=_CALIBRATE_EVERY,
        )
    else:
        settings = MirrorSettings(ordering_seconds=0.0, calibrate_after_requests=sys.maxsize)  # the engine is known
        shaped = reshaped(records, shape) if shape else records
        records, readings = simulated_reality(shaped, fleet, scenario.frontend_seconds)
    first, last = (records[0].time_seconds, records[-1].time_seconds) if records else (0.0, 0.0)
    if last - first <= min(forecast.horizons_seconds):
        raise UserError(
            f"{scenario.trace.path}: {last - first:g} s of requests are too short for a horizon of "
            f"{min(forecast.horizons_seconds):g} s; give shorter --horizons"
        )
    frontend_seconds = 0.0 if measured else scenario.frontend_seconds
    mirror = Mirror(settings, fleet, calibrated=not measured, frontend_seconds=frontend_seconds)
    forecaster = Forecaster(forecast.model_copy(update={"policies": (Policy(name=TODAY),), "slos": tuple(slos)}))
    scorer = Scorer(slos, judged=None)
    now = first + min(warm_up_seconds, 0.25 * (last - first))
    clock = [first]
    source = ReplaySource(records, samples, clock=lambda: clock[0])
    unread = deque(readings)
    source.start()
    kpis: list[ScoredKpi] = []
    breaches: list[ScoredBreach] = []
    moments: list[Moment] = []
    made = 0

    def settle(until: float) -> None:
        settled = scorer.settle(until, fleet.footprint)
        kpis.extend(settled.kpis)
        breaches.extend(settled.breaches)
        moments.extend(settled.moments)

    def take_until(until: float) -> None:
        clock[0] = until
        while records := source.poll(10_000):
            for record in records:
                mirror.ingest(record)
                read(scorer.reality, record)
        while unread and unread[0][1].time_seconds <= until:
            scorer.reality.readings.add(*unread.popleft())

    while now <= last:
        take_until(now)
        follow(scorer.reality, mirror.advance(now), mirror.time_seconds)
        settle(now)
        snapshot = mirror.snapshot()
        if snapshot is not None and mirror.calibrated:
            scorer.foresee(forecaster.run(snapshot), TODAY)
            made += 1
        progress((now - first) / (last - first))
        now += forecast.every_seconds
    take_until(math.inf)
    follow(scorer.reality, mirror.end(), mirror.time_seconds)
    settle(last)
    return Backtest(
        scorer.scores(), tuple(kpis), tuple(breaches), tuple(moments), made, len(records), measured=measured
    )
