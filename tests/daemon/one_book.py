"""Streams for the tests of what scores are taken from, and what a pool serves over one."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.forecast.slo import Metric, Slo
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.recordings.simulated_reality import simulated_reality
from kavier_twin.simulation.policies import Policy
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import EngineSample, RequestFinished, RequestRecord, RequestSeen

Event = RequestSeen | RequestFinished | EngineSample

FLEET = FleetSettings(
    engine=EngineSettings(num_gpu_blocks=20_000, max_num_seqs=128),
    step_time=StepTime(fixed=0.015, per_prefill_token=5e-5, per_decode_sequence=1e-4),
)
KNOWN_ENGINE = MirrorSettings(calibrate_after_requests=2**62)  # a fit to fewer requests is another fit


def synthetic(seconds: float, per_second: float, output_tokens: float, seed: int = 1) -> list[RequestRecord]:
    """Poisson arrivals with log-normal lengths, as the simulated fleet serves them."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0 / per_second, int(seconds * per_second)))
    prompts = np.clip(rng.lognormal(6.0, 0.8, times.size), 20, 6_000).astype(int)
    outputs = np.clip(rng.lognormal(np.log(output_tokens), 0.8, times.size), 2, 3_000).astype(int)
    records = [
        RequestRecord(id=f"r{number}", time_seconds=time, prompt_tokens=prompt, output_tokens=output)
        for number, (time, prompt, output) in enumerate(
            zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
        )
    ]
    return simulated_reality(records, FLEET, 0.01)[0]


def stream_of(records: Sequence[RequestRecord], samples: Sequence[EngineSample] = ()) -> list[Event]:
    """In order of time."""
    ends = [finished for record in records if (finished := record.finished()) is not None]
    events: list[Event] = [*(record.seen() for record in records), *ends, *samples]
    return sorted(events, key=lambda event: event.time_seconds)


def without_ends(stream: Sequence[Event], share: float, seed: int) -> list[Event]:
    """This share of the requests never ends in it."""
    rng = random.Random(seed)
    lost = {event.id for event in stream if isinstance(event, RequestSeen) and rng.random() < share}
    assert lost
    return [event for event in stream if not (isinstance(event, RequestFinished) and event.id in lost)]


def forecast_settings(horizons: tuple[float, ...], scenarios: int, *slos: Slo) -> ForecastSettings:
    return ForecastSettings(
        horizons_seconds=horizons,
        scenarios=scenarios,
        least_scenarios=scenarios,
        workers=1,
        policies=(Policy(name="today"),),
        slos=slos,
    )


def served(
    stream: Sequence[Event],
    pool: PoolTwin,
    *,
    first_seconds: float,
    every_seconds: float,
) -> dict[tuple[float, Metric], float]:
    """By horizon and KPI, the mean of the medians served, a forecast every so often."""
    found: dict[tuple[float, Metric], list[float]] = {}
    due = stream[0].time_seconds + first_seconds
    for event in stream:
        while event.time_seconds > due:
            snapshot = pool._snapshot()
            assert snapshot is not None
            forecast = pool.scores.judge(pool.forecaster.run(snapshot), "today")
            for row in forecast.rows:
                for metric, values in row.kpis.items():
                    found.setdefault((row.horizon_seconds, metric), []).append(values.p50)
            due += every_seconds
        pool.ingest([event], more=False, ended=False)
    return {key: float(np.mean(values)) for key, values in found.items() if np.isfinite(values).all()}
