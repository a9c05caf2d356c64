"""What one run tells of another: the same users on the same server under other settings, predicted and compared.

From recording A alone come the requests, the users' think times and the step times; recording B adds its settings, and
is what the prediction is compared with. Machines are not equally fast in two runs, so three predictions are made: with
A's step times as they are; with all times multiplied by how much longer B's steps last than A's for equal batches (the
step logs of both); and with that ratio second by second, since speed drifts within a run as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from connectors.traces import TraceError, read_trace
from connectors.traces.recording import read_steps
from kavier_twin.errors import UserError
from kavier_twin.mirror.calibration.fit import fit
from kavier_twin.mirror.calibration.requests import Observed
from kavier_twin.mirror.calibration.steps import MINIMUM_STEPS, StepLog
from kavier_twin.recordings.engine_logs import logged_steps
from kavier_twin.recordings.machine_clock import MachineClock, machine_clock
from kavier_twin.recordings.scenario import observed_of
from kavier_twin.simulation.closed_loop import simulate_sessions
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.state import MAX_KNOTS, Records
from kavier_twin.studies.accuracy.server import engine_settings

Floats = npt.NDArray[np.float64]

RAW: Final = "raw"
BY_RATIO: Final = "scaled by one ratio"
BY_CLOCK: Final = "scaled second by second"
_ROUNDS = 8
_HALF_WAY = 0.8  # of what a round finds missing is added: less, since longer steps make larger batches, longer ones
_STEADY = MachineClock(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.ones(1))


@dataclass(frozen=True)
class Recording:
    """A run of a real server: who asked what, and how long its steps took."""

    path: Path
    engine: EngineSettings
    observed: Observed
    identities: tuple[str, ...]
    contents: tuple[tuple[int, ...], ...]  # block hashes of prompt and output
    measured: Means
    log: StepLog
    decode_steps: Mapping[int, Floats]  # requests of a decode-only step -> seconds of each
    clock: MachineClock | None


@dataclass(frozen=True)
class Means:
    """What the runs are compared by: tokens hit / prompt tokens, and mean latencies in seconds."""

    hit_ratio: float
    ttft_seconds: float
    e2e_seconds: float


@dataclass(frozen=True)
class Prediction:
    """One way of predicting B from A."""

    basis: str
    means: Means
    errors: Means  # of the hit ratio in percentage points, of latencies as shares of what was measured


@dataclass(frozen=True)
class Counterfactual:
    """B predicted from A."""

    source: Recording
    target: Recording
    changed: Mapping[str, tuple[Any, Any]]  # setting -> A's and B's
    same_requests: int  # of B's, how many have the content that A's of that name have
    step_ratio: float  # B's step times over A's, for equal batches
    predictions: tuple[Prediction, ...]


def read_recording(path: Path) -> Recording:
    """Raises UserError where something is missing."""
    try:
        trace = read_trace(path, "recording")
        rows = read_steps(trace.path.parent)
        told = trace.settings.get("engine")
        if not isinstance(told, Mapping):
            raise UserError(f"{path}/meta.json: engine: missing; add the settings of the server")
        engine = engine_settings(told, f"{path}/meta.json")
        log = logged_steps(trace.path.parent, engine, 1.0)
    except TraceError as error:
        raise UserError(f"{error}; a counterfactual needs the requests and the step log of both runs") from None
    observed = observed_of(trace)
    records = trace.records
    if not len(records) or not (np.isfinite(observed.ttft_seconds) & np.isfinite(observed.e2e_seconds)).all():
        raise UserError(f"{path}: requests.jsonl: every request needs its token_times")
    if log.seconds.size < MINIMUM_STEPS:
        raise UserError(f"{path}: {log.seconds.size} logged steps; at least {MINIMUM_STEPS} are needed")
    started = trace.settings.get("started_unix")
    decode: dict[int, list[float]] = defaultdict(list)
    alone = (log.prefill_tokens == 0) & (log.prefill_requests == 0)
    for size, seconds in zip(log.decode_sequences[alone].tolist(), log.seconds[alone].tolist(), strict=True):
        decode[int(size)].append(seconds)
    prompts = sum(record.prompt_tokens for record in records)
    return Recording(
        path=path,
        engine=engine,
        observed=observed,
        identities=tuple(record.id for record in records),
        contents=tuple(tuple(record.block_hashes) for record in records),
        measured=Means(
            sum(record.cached_tokens or 0 for record in records) / prompts,
            float(observed.ttft_seconds.mean()),
            float(observed.e2e_seconds.mean()),
        ),
        log=log,
        decode_steps={size: np.array(seconds) for size, seconds in decode.items()},
        clock=machine_clock(rows, float(started)) if isinstance(started, int | float) else None,
    )


def predict(source: Recording, target: Recording) -> Counterfactual:
    """The target's run from the source's. Raises UserError where the settings make a request impossible."""
    ratio = step_ratio(source.decode_steps, target.decode_steps)
    found = []
    server = _fit_server(source, _STEADY)
    found.append(_predict(RAW, source, target, server, 1.0, _STEADY))
    if math.isfinite(ratio):
        found.append(_predict(BY_RATIO, source, target, server, ratio, _STEADY))
        if source.clock is not None and target.clock is not None:
            server = _fit_server(source, source.clock)
            found.append(_predict(BY_CLOCK, source, target, server, ratio, target.clock))
    mine = dict(zip(source.identities, source.contents, strict=True))
    return Counterfactual(
        source=source,
        target=target,
        changed={
            name: (getattr(source.engine, name), getattr(target.engine, name))
            for name in EngineSettings.model_fields
            if getattr(source.engine, name) != getattr(target.engine, name)
        },
        same_requests=sum(
            mine.get(identity) == content for identity, content in zip(target.identities, target.contents, strict=True)
        ),
        step_ratio=ratio,
        predictions=tuple(found),
    )


def step_ratio(source: Mapping[int, Floats], target: Mapping[int, Floats]) -> float:
    """How much longer the target's decode-only steps last than the source's of as many requests.

    Sizes count by how well both runs know them, a b / (a + b) for a and b steps; NaN where they have none in common.
    """
    sizes = sorted(source.keys() & target.keys())
    weights = [source[size].size * target[size].size / (source[size].size + target[size].size) for size in sizes]
    means = [(float(source[size].mean()), float(target[size].mean())) for size in sizes]
    mine = sum(weight * mean for weight, (mean, _) in zip(weights, means, strict=True))
    theirs = sum(weight * mean for weight, (_, mean) in zip(weights, means, strict=True))
    return theirs / mine if mine > 0.0 else math.nan


@dataclass(frozen=True)
class _Server:
    step_time: StepTime
    frontend_seconds: float


def _fit_server(source: Recording, clock: MachineClock) -> _Server:
    """Step times from the source's log; what the log does not show, from its requests.

    A step's seconds are affine in the contexts and piecewise linear in its tokens, with bends where the tokens double:
    the first hundreds of a prefill fill the machine better and better, and a run with caching has few long ones to
    tell a straight line from a bend. Between steps and before the engine passes time as well: a constant per step and
    one per request are added until the mean decode and the mean TTFT of the source's own run come out.
    """
    log = source.log
    share = log.decode_sequences / np.maximum(log.decode_sequences + log.prefill_requests, 1.0)
    tokens = log.prefill_tokens + log.decode_sequences
    bends = [2.0**power for power in range(math.ceil(math.log2(max(float(tokens.max()), 2.0))) + 1)][:MAX_KNOTS]
    pieces = [np.clip(tokens - low, 0.0, high - low) for low, high in pairwise(bends)]
    rows = np.column_stack([np.ones(tokens.size), share * log.context_tokens, *pieces])
    values = fit(rows, log.seconds).values
    rise = np.concatenate([[0.0], np.cumsum(values[2:] * np.diff(bends))])
    layers = tuple(zip(bends, rise.tolist(), strict=True))
    observed = source.observed
    decode_seconds = float((observed.e2e_seconds - observed.ttft_seconds).mean())
    between, frontend = 0.0, 0.0
    for _ in range(_ROUNDS):
        step_time = StepTime(fixed=values[0] + between, per_context_token=values[1], linear_layers=layers)
        outcomes = _simulate(source, source.engine, _Server(step_time, frontend), clock)
        missing = decode_seconds - float((outcomes["finish"] - outcomes["first_token"]).mean())
        between = max(0.0, between + _HALF_WAY * missing / float(outcomes["decode_work"][:, 0].mean()))
        frontend += source.measured.ttft_seconds - float((outcomes["first_token"] - outcomes["arrival"]).mean())
        frontend = max(0.0, frontend)
    return _Server(step_time, frontend)


def _predict(
    basis: str, source: Recording, target: Recording, server: _Server, scale: float, clock: MachineClock
) -> Prediction:
    step_time = server.step_time.with_coefficients(scale * server.step_time.coefficients())
    try:
        outcomes = _simulate(source, target.engine, _Server(step_time, scale * server.frontend_seconds), clock)
    except ValueError as error:
        raise UserError(f"{target.path}: its server could not serve the requests of {source.path}: {error}") from None
    means = Means(
        float(outcomes["cached"].sum() / outcomes["prompt"].sum()),
        float((outcomes["first_token"] - outcomes["arrival"]).mean()),
        float((outcomes["finish"] - outcomes["arrival"]).mean()),
    )
    real = target.measured
    errors = Means(
        100.0 * (means.hit_ratio - real.hit_ratio),
        means.ttft_seconds / real.ttft_seconds - 1.0,
        means.e2e_seconds / real.e2e_seconds - 1.0,
    )
    return Prediction(basis, means, errors)


def _simulate(source: Recording, engine: EngineSettings, server: _Server, clock: MachineClock) -> Records:
    """The source's users on this server: they think in wall time, the engine runs by the machine's clock."""
    workload = source.observed.workload
    ends = workload.arrival + source.observed.e2e_seconds
    think = _think_seconds(workload.session.tolist(), workload.arrival, ends)

    def arrival_after(row: int, finish_seconds: float) -> float:
        finish = float(clock.wall(np.array([finish_seconds]))[0])
        return float(clock.machine(np.array([finish + think[row]]))[0])

    outcomes = simulate_sessions(
        FleetSettings(engine=engine, step_time=server.step_time),
        workload._replace(arrival=clock.machine(workload.arrival)),
        arrival_after,
        frontend_seconds=server.frontend_seconds,
    )
    for name in ("arrival", "scheduled", "first_token", "finish"):
        outcomes[name] = clock.wall(outcomes[name])
    return outcomes


def _think_seconds(sessions: Sequence[int], arrival: Floats, ends: Floats) -> Floats:
    """Of every turn but a session's first, seconds from the end of the turn before; NaN of first turns."""
    think = np.full(arrival.size, np.nan)
    last: dict[int, int] = {}
    for row, session in enumerate(sessions):
        if session in last:
            think[row] = max(0.0, arrival[row] - ends[last[session]])
        last[session] = row
    return think
