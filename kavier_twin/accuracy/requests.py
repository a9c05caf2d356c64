"""A run of which every request was measured: fit on the first third, predict the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from connectors.traces import Trace, TraceError, read_trace
from connectors.traces.recording import read_steps
from kavier_twin.accuracy.drift import WINDOW_SECONDS, Drift, drift
from kavier_twin.accuracy.prior import PLENTY_OF_BLOCKS, Deployment, engine_settings, from_catalogue
from kavier_twin.accuracy.result import HIT_RATIO, Pair, SetResult, Trial, per_token, request_pairs
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.errors import UserError
from kavier_twin.scenario import observed_of
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.settings import COEFFICIENTS, FleetSettings, StepTime
from kavier_twin.simulation.state import FINISHED, Records
from kavier_twin.twin.calibration import CalibrationError, Observed, calibrate, single_engine, with_frontend

SHARE = 1 / 3
_LAST = "the last two thirds of the requests"
_FIRST = "the first third of the requests, by arrival"


def run_requests(path: Path, name: str, tell: Callable[[str], None]) -> SetResult:
    """Raises UserError where the trace cannot be read or its engine is not told."""
    try:
        trace = read_trace(path)
    except TraceError as error:
        raise UserError(str(error)) from None
    observed = observed_of(trace)
    measured = np.isfinite(observed.ttft_seconds) & np.isfinite(observed.e2e_seconds)
    if not measured.any():
        raise UserError(f"{path}: no request tells its TTFT and end-to-end latency")
    deployment, notes = _deployment(path, trace)
    fitted = np.arange(measured.size) < round(SHARE * measured.size)
    trials = []
    blocks = PLENTY_OF_BLOCKS
    prior = None
    try:
        prior = from_catalogue(deployment, str(path))
    except CatalogError as error:
        notes.append(f"Nothing predicted from the catalogue: {error}.")
        if "num_gpu_blocks" not in deployment.engine:
            notes.append("The number of KV blocks is not known: taken as so many that memory never decides.")
    else:
        blocks = prior.engine.num_gpu_blocks
        tell("predicting from the catalogue")
        outcomes = _replay(FleetSettings(engine=prior.engine, step_time=prior.step_time), observed, 0.0)
        trials.append(_trial("from the catalogue alone", "nothing", trace, observed, outcomes, ~fitted))
    engine = engine_settings(deployment, blocks, str(path))
    tell("calibrating")
    known = Observed(
        observed.workload,
        np.where(fitted, observed.ttft_seconds, math.nan),
        np.where(fitted, observed.e2e_seconds, math.nan),
    )
    try:
        found = calibrate(
            single_engine(engine),
            known,
            prior=prior.step_time if prior else None,
            floor=prior.floor if prior else None,
        )
    except CalibrationError as error:
        notes.append(f"Not calibrated: {error}.")
        return SetResult(name, _measured(trace), tuple(trials), tuple(notes))
    settings = FleetSettings(engine=engine, step_time=found.step_time)
    tell("predicting the rest")
    outcomes = _replay(settings, observed, found.frontend_seconds)
    trials.append(_trial("calibrated", _FIRST, trace, observed, outcomes, ~fitted))
    if found.undetermined:
        notes.append(f"The first third did not determine {', '.join(found.undetermined)}.")
    speed = _drift(trace, float(observed.workload.arrival[fitted][-1]))
    if speed is not None:
        notes.append(_describe(speed))
        outcomes = _replay(settings, observed, found.frontend_seconds, speed)
        trials.append(_trial("calibrated, machine's drift corrected", _FIRST, trace, observed, outcomes, ~fitted))
    return SetResult(name, _measured(trace), tuple(trials), tuple(notes))


def _deployment(path: Path, trace: Trace) -> tuple[Deployment, list[str]]:
    engine = trace.settings.get("engine")
    if not isinstance(engine, dict):
        raise UserError(f"{path}: expected `engine`, what the server was configured to do, beside the trace; add it")
    notes = []
    gpu, model = engine.get("gpu"), engine.get("model")
    if gpu is None:
        gpu = trace.path.parent.name
        notes.append(f"The data names no GPU; looked for one in the folder's name, {gpu!r}.")
    return Deployment(
        model=model if isinstance(model, str) else None,
        gpu=gpu if isinstance(gpu, str) else None,
        engine=engine,
        tensor_parallel=int(engine.get("tensor_parallel_size") or 1),
        gpu_memory_utilization=float(engine.get("gpu_memory_utilization") or 0.9),
    ), notes


def _measured(trace: Trace) -> str:
    return f"{len(trace.records):,} requests of a real server, each with its own times"


def _replay(settings: FleetSettings, observed: Observed, frontend_seconds: float, speed: Drift | None = None) -> Records:
    """Outcomes in the order of the requests."""
    workload = with_frontend(observed.workload, frontend_seconds)
    fleet = Fleet(settings, start_seconds=float(min(0.0, workload.delivered[0])))
    if speed is not None:
        _follow(fleet, settings.step_time, speed)
    fleet.feed(workload)
    fleet.run()
    outcomes = fleet.collect()
    return outcomes[np.argsort(outcomes["index"], kind="stable")]


def _follow(fleet: Fleet, step_time: StepTime, speed: Drift) -> None:
    """Every step lasts as many times longer as the machine was slower at the time."""
    for start, factor in zip(speed.start_seconds.tolist(), speed.factor.tolist(), strict=True):
        scaled = (factor * step_time.coefficients()).tolist()
        overrides = {f"step_time.{name}": value for name, value in zip(COEFFICIENTS, scaled, strict=True)}
        fleet.switch_policy(overrides, max(start, fleet.now_seconds))


def _trial(basis: str, fitted_on: str, trace: Trace, observed: Observed, outcomes: Records, tested: Any) -> Trial:
    measured = np.isfinite(observed.ttft_seconds) & np.isfinite(observed.e2e_seconds)
    rows = np.flatnonzero(tested & measured & (outcomes["status"] == FINISHED))
    ttft = (outcomes["first_token"] - outcomes["arrival"])[rows]
    e2e = (outcomes["finish"] - outcomes["arrival"])[rows]
    output = outcomes["output"][rows].astype(np.float64)
    real_ttft, real_e2e = observed.ttft_seconds[rows], observed.e2e_seconds[rows]
    pairs = request_pairs(_LAST, (real_ttft, real_e2e), (ttft, e2e), output)
    hits = [row for row in rows if trace.records[row].cached_tokens is not None]
    if hits:
        prompts = float(sum(trace.records[row].prompt_tokens for row in hits))
        real = sum(trace.records[row].cached_tokens or 0 for row in hits) / prompts
        pairs.append(Pair(_LAST, HIT_RATIO, "mean", real, float(outcomes["cached"][hits].sum()) / prompts))
    scatter = {
        "TTFT": (real_ttft, ttft),
        "TPOT": (per_token(real_ttft, real_e2e, output), per_token(ttft, e2e, output)),
        "e2e": (real_e2e, e2e),
    }
    return Trial(basis, fitted_on, _LAST, tuple(pairs), scatter)


def _drift(trace: Trace, reference_seconds: float) -> Drift | None:
    started = trace.settings.get("started_unix")
    if not isinstance(started, int | float):
        return None
    try:
        return drift(read_steps(trace.path.parent), float(started), reference_seconds)
    except TraceError:
        return None


def _describe(speed: Drift) -> str:
    low, high = float(speed.factor.min()), float(speed.factor.max())
    return (
        f"The machine's own speed drifted: decode-only steps of equal size lasted {low:.2f} to {high:.2f} times what "
        f"they did during the first third (windows of {WINDOW_SECONDS:g} s, from the server's step log). The "
        "correction scales the simulated steps by that, and uses no request's timing."
    )
