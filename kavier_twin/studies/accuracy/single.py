"""Kavier's validation table: one request at a time, the seconds of its prefill and of its decode.

`prefill_decode_accuracy.csv` of the paper's capsule (arXiv 2605.25247): for each size the real and Kavier's own
seconds. `input_decode_accuracy.csv` beside it has the requests: a prefill row is a prompt of that many tokens, a decode
row the request that was asked for as many tokens and produced `num_output_tokens`. The paper measured an NVIDIA A10
with Llama-3-8B; the table does not say so itself.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from kavier_twin.catalog.deployment import Deployment
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.errors import UserError
from kavier_twin.mirror.calibration.fit import fit
from kavier_twin.mirror.calibration.requests import at_least
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import FleetSettings, StepTime
from kavier_twin.simulation.state import Records
from kavier_twin.simulation.workload import make_workload
from kavier_twin.studies.accuracy.result import Pair, SetResult, Trial
from kavier_twin.studies.accuracy.server import Prior, Server, from_catalogue

COLUMNS: Final = frozenset({"prompt_size", "reality_prefill", "reality_decode"})
REQUESTS_FILE: Final = "input_decode_accuracy.csv"
_GPU, _MODEL = "A10", "meta-llama/Meta-Llama-3-8B"
_ENGINE = {"max_model_len": 32_768, "async_scheduling": False, "prefix_caching": False}
_PLENTY = 4096  # KV blocks: a single request never lacks memory


class Point(NamedTuple):
    """One row of the table, seconds."""

    size: int
    prefill_seconds: float
    decode_seconds: float
    decode_prompt: int
    decode_output: int
    kavier_prefill: float
    kavier_decode: float


def run_single(path: Path, name: str, tell: Callable[[str], None]) -> SetResult:
    """From the catalogue alone, after fitting to the smaller third of the sizes, and Kavier's own predictions."""
    points = read_points(path)
    tell("predicting single requests")
    server = Server(_MODEL, _GPU, Deployment(), {**_ENGINE, "num_gpu_blocks": _PLENTY})
    notes = [f"The table names neither GPU nor model; those of the paper are assumed, {_GPU} and {_MODEL}."]
    trials = []
    try:
        prior = from_catalogue(server, str(path))
    except CatalogError as error:
        notes.append(f"Nothing predicted: {error}.")
    else:
        third = max(1, len(points) // 3)
        trials = [
            *(_trial(basis, "nothing", points, prior, step_time) for basis, step_time in prior.step_times.items()),
            _trial(
                "calibrated",
                f"the {third} smallest sizes",
                points[third:],
                prior,
                _fitted(points[:third], prior),
            ),
        ]
    pairs = [
        Pair(str(point.size), metric, "mean", real, predicted)
        for point in points
        for metric, real, predicted in (
            ("prefill", point.prefill_seconds, point.kavier_prefill),
            ("decode", point.decode_seconds, point.kavier_decode),
        )
        if predicted > 0.0
    ]
    if pairs:
        trials.append(Trial("Kavier, as published", "its own calibration", "all sizes", tuple(pairs)))
    return SetResult(name, f"{len(points)} prompt sizes, one request at a time", tuple(trials), tuple(notes))


def read_points(path: Path) -> list[Point]:
    """By size. Raises UserError."""
    requests = {}
    for line, row in _rows(path.with_name(REQUESTS_FILE)):
        where = f"{path.with_name(REQUESTS_FILE)}: line {line}"
        requests[_number(row, "session_id", where)] = (
            int(_number(row, "num_input_tokens", where)),
            int(_number(row, "num_output_tokens", where)),
        )
    points = []
    for line, row in _rows(path):
        where = f"{path}: line {line}"
        size = _number(row, "prompt_size", where)
        if size not in requests:
            raise UserError(f"{where}: no request {size:g} in {REQUESTS_FILE}; add it")
        points.append(
            Point(
                size=int(size),
                prefill_seconds=_number(row, "reality_prefill", where),
                decode_seconds=_number(row, "reality_decode", where),
                decode_prompt=requests[size][0],
                decode_output=requests[size][1],
                kavier_prefill=_number(row, "kavier_prefill", where) if row.get("kavier_prefill") else 0.0,
                kavier_decode=_number(row, "kavier_decode", where) if row.get("kavier_decode") else 0.0,
            )
        )
    return sorted(points)


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(enumerate(csv.DictReader(file), 2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from None
    if not rows:
        raise UserError(f"{path}: no rows; add some")
    return rows


def _number(row: dict[str, str], name: str, where: str) -> float:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        value = 0.0
    if not 0.0 < value < 1e9:
        raise UserError(f"{where}: {name}: expected a positive number")
    return value


def _alone(prior: Prior, step_time: StepTime, prompts: list[int], outputs: list[int]) -> Records:
    """Outcomes of requests that each have the engine to themselves."""
    apart = 1e5 * np.arange(len(prompts))
    settings = FleetSettings(engine=prior.engine, step_time=step_time)
    outcomes = simulate(settings, make_workload(apart, prompts, outputs)).collect()
    return outcomes[np.argsort(outcomes["index"], kind="stable")]


def _trial(basis: str, fitted_on: str, points: list[Point], prior: Prior, step_time: StepTime) -> Trial:
    prefill = _alone(prior, step_time, [p.size for p in points], [1] * len(points))
    decode = _alone(prior, step_time, [p.decode_prompt for p in points], [p.decode_output for p in points])
    pairs = []
    for point, first, second in zip(points, prefill, decode, strict=True):
        seconds = float(first["finish"] - first["arrival"])
        pairs.append(Pair(str(point.size), "prefill", "mean", point.prefill_seconds, seconds))
        seconds = float(second["finish"] - second["arrival"])
        pairs.append(Pair(str(point.size), "decode", "mean", point.decode_seconds, seconds))
    predicted = f"{len(points)} sizes, {points[0].size} to {points[-1].size}"
    return Trial(basis, fitted_on, predicted, tuple(pairs))


def _fitted(points: list[Point], prior: Prior) -> StepTime:
    """The prior, moved to where these requests put it."""
    prefill = _alone(prior, prior.best, [p.size for p in points], [1] * len(points))
    decode = _alone(prior, prior.best, [p.decode_prompt for p in points], [p.decode_output for p in points])
    work = np.concatenate([prefill["prefill_work"], decode["prefill_work"] + decode["decode_work"]])
    seconds = np.array([p.prefill_seconds for p in points] + [p.decode_seconds for p in points])
    floor = at_least(prior.floor)[:-1]
    found = fit(work, seconds, prior=prior.best.coefficients(), floor=floor)
    return prior.best.with_coefficients(found.values)
