"""A run of which every request was measured: fit on the first third, predict the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from connectors.traces import Trace, TraceError, read_trace
from connectors.traces.recording import read_steps
from kavier_twin.catalog.deployment import Deployment
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.errors import UserError, problems_of
from kavier_twin.mirror.calibration.requests import CalibrationError, Observed, calibrate, single_engine, with_frontend
from kavier_twin.recordings.machine_clock import NEIGHBOURHOOD_SECONDS, MachineClock, machine_clock
from kavier_twin.recordings.scenario import observed_of
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import EngineSettings, FleetSettings
from kavier_twin.simulation.state import FINISHED, Records
from kavier_twin.studies.accuracy.result import HIT_RATIO, Latencies, Pair, SetResult, Trial, request_pairs
from kavier_twin.studies.accuracy.server import (
    FRONTEND_SECONDS,
    PLENTY_OF_BLOCKS,
    Server,
    engine_settings,
    from_catalogue,
    gpus_named_in,
)

SHARE = 1 / 3
_TIMED_BY_ENGINE = ("llmservingsim",)  # formats whose times are the engine's own: no frontend in them
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
        raise UserError(f"{path}: no request has a TTFT and an e2e latency")
    server, notes = _server(path, trace)
    fitted = np.arange(measured.size) < round(SHARE * measured.size)
    trials = []
    prior = None
    try:
        prior = from_catalogue(server, str(path))
    except CatalogError as error:
        notes.append(f"Nothing predicted from the catalogue: {error}.")
        if "num_gpu_blocks" not in server.engine:
            notes.append("The number of KV blocks is unknown: so many are assumed that memory never limits the batch.")
        engine = engine_settings({"num_gpu_blocks": PLENTY_OF_BLOCKS, **server.engine}, str(path))
    else:
        engine = prior.engine
        if "num_gpu_blocks" not in server.engine:
            notes.append(f"The number of KV blocks, {engine.num_gpu_blocks:,}, is the catalogue's.")
        tell("from the catalogue")
        frontend = 0.0 if trace.format in _TIMED_BY_ENGINE else FRONTEND_SECONDS
        for basis, step_time in prior.step_times.items():
            outcomes = _replay(FleetSettings(engine=engine, step_time=step_time), observed, frontend)
            trials.append(_trial(basis, "nothing", trace, observed, outcomes, ~fitted))

    servable = _servable(engine, observed)
    if not servable.all():
        count = int((~servable).sum())
        notes.append(f"{count} requests were served that the described engine could not serve; they are left out.")

    def calibrated(basis: str, clock: MachineClock | None) -> None:
        tell(basis)
        told = observed if clock is None else _by_clock(observed, clock)
        found = calibrate(
            single_engine(engine),
            _only(told, fitted & servable),
            prior=prior.best if prior else None,
            floor=prior.floor if prior else None,
        )
        settings = FleetSettings(engine=engine, step_time=found.step_time)
        outcomes = _replay(settings, told, found.frontend_seconds)
        if clock is not None:
            for name in ("arrival", "first_token", "finish"):
                outcomes[name] = clock.wall(outcomes[name])
        trials.append(_trial(basis, _FIRST, trace, observed, outcomes, ~fitted))
        if found.undetermined:
            notes.append(f"{basis.capitalize()}: the first third did not determine {', '.join(found.undetermined)}.")

    try:
        calibrated("calibrated", None)
        clock = _clock(trace)
        if clock is not None:
            notes.append(_describe(clock))
            calibrated("calibrated, corrected for the machine's drift", clock)
    except CalibrationError as error:
        notes.append(f"Not calibrated: {error}.")
    return SetResult(name, _measured(trace), tuple(trials), tuple(notes))


def _server(path: Path, trace: Trace) -> tuple[Server, list[str]]:
    engine = trace.settings.get("engine")
    if not isinstance(engine, dict):
        raise UserError(f"{path}: expected `engine`, what the server was configured to do, beside the trace; add it")
    notes = []
    gpu, model = engine.get("gpu"), engine.get("model")
    if gpu is None:
        found = gpus_named_in(trace.path.parent.name)
        if found:
            gpu = found[0]
            others = f" (it could also be {', '.join(found[1:])})" if len(found) > 1 else ""
            notes.append(f"The data names no GPU; the folder's name indicates {gpu}{others}.")
    try:
        deployment = Deployment(
            tensor_parallel_size=engine.get("tensor_parallel_size", 1),
            quantization=engine.get("quantization"),
            kv_cache_dtype="fp8" if str(engine.get("kv_cache_dtype")).startswith("fp8") else "auto",
        )
    except ValidationError as error:
        raise UserError(f"{path}: engine.{problems_of(error)[0]}") from None
    share = engine.get("gpu_memory_utilization")
    return Server(
        model=model if isinstance(model, str) else None,
        gpu=gpu if isinstance(gpu, str) else None,
        deployment=deployment,
        engine=engine,
        gpu_memory_utilization=share if isinstance(share, float) else None,
    ), notes


def _measured(trace: Trace) -> str:
    return f"{len(trace.records):,} requests of a real server, each with its own times"


def _replay(settings: FleetSettings, observed: Observed, frontend_seconds: float) -> Records:
    """Outcomes in the order of the requests."""
    outcomes = simulate(settings, with_frontend(observed.workload, frontend_seconds)).collect()
    return outcomes[np.argsort(outcomes["index"], kind="stable")]


def _servable(engine: EngineSettings, observed: Observed) -> npt.NDArray[np.bool_]:
    """Requests that fit the engine's context and cache."""
    prompt, output = observed.workload.prompt, observed.workload.output
    blocks = -(-np.minimum(prompt + output, engine.max_model_len) // engine.block_size)
    return np.asarray((prompt < engine.max_model_len) & (blocks < engine.num_gpu_blocks), np.bool_)


def _only(observed: Observed, fitted: npt.NDArray[np.bool_]) -> Observed:
    """The same load, of which only these requests were measured."""
    queue = observed.queue_seconds
    return Observed(
        observed.workload,
        np.where(fitted, observed.ttft_seconds, math.nan),
        np.where(fitted, observed.e2e_seconds, math.nan),
        None if queue is None else np.where(fitted, queue, math.nan),
    )


def _by_clock(observed: Observed, clock: MachineClock) -> Observed:
    """The same requests, all times by the machine's clock."""
    arrival = observed.workload.arrival
    start = clock.machine(arrival)
    return Observed(
        observed.workload._replace(arrival=start, delivered=start),
        clock.machine(arrival + observed.ttft_seconds) - start,
        clock.machine(arrival + observed.e2e_seconds) - start,
    )


def _trial(
    basis: str, fitted_on: str, trace: Trace, observed: Observed, outcomes: Records, tested: npt.NDArray[np.bool_]
) -> Trial:
    measured = np.isfinite(observed.ttft_seconds) & np.isfinite(observed.e2e_seconds)
    rows = np.flatnonzero(tested & measured & (outcomes["status"] == FINISHED))
    output = outcomes["output"][rows].astype(np.float64)
    real = Latencies(observed.ttft_seconds[rows], observed.e2e_seconds[rows], output)
    simulated = Latencies(
        (outcomes["first_token"] - outcomes["arrival"])[rows], (outcomes["finish"] - outcomes["arrival"])[rows], output
    )
    pairs = request_pairs(_LAST, real, simulated)
    hits = [row for row in rows.tolist() if trace.records[row].cached_tokens is not None]
    if hits:
        prompts = float(sum(trace.records[row].prompt_tokens for row in hits))
        cached = sum(trace.records[row].cached_tokens or 0 for row in hits) / prompts
        pairs.append(Pair(_LAST, HIT_RATIO, "mean", cached, float(outcomes["cached"][hits].sum()) / prompts))
    scatter = {
        "TTFT": (real.ttft, simulated.ttft),
        "TPOT": (real.tpot, simulated.tpot),
        "e2e": (real.e2e, simulated.e2e),
    }
    return Trial(basis, fitted_on, _LAST, tuple(pairs), scatter)


def _clock(trace: Trace) -> MachineClock | None:
    started = trace.settings.get("started_unix")
    if not isinstance(started, int | float):
        return None
    try:
        return machine_clock(read_steps(trace.path.parent), float(started))
    except TraceError:
        return None


def _describe(clock: MachineClock) -> str:
    slow, fast = np.quantile(clock.speed, (0.95, 0.05)).tolist()
    return (
        "The machine's own speed drifted: for a tenth of the time, decode-only steps of equal size lasted less than "
        f"{fast:.2f} or more than {slow:.2f} times their mean (the server's step log, {NEIGHBOURHOOD_SECONDS:g} s at a "
        "time). The correction calibrates and predicts by a clock that follows the machine's speed. It uses the step "
        "log of the whole run, but no request's timing beyond the first third."
    )
