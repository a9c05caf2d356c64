"""Benchmarks at a fixed concurrency: one row of a table a run, with its mean TTFT and TPOT.

Format of NVIDIA AIConfigurator's validation data (`silicon_ttft_ms`, `silicon_tpot_ms` beside `model_path`, `system`,
`isl`, `osl`, `batch_size` and the parallelism). `batch_size` users each wait for an answer before they ask again;
prompts share nothing.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kavier_twin.catalog.deployment import Deployment
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.model import QUANTIZATIONS, QuantizationName
from kavier_twin.catalog.models import find_model
from kavier_twin.errors import UserError, problems_of
from kavier_twin.simulation.closed_loop import simulate_closed_loop
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import Records
from kavier_twin.simulation.workload import make_workload
from kavier_twin.studies.accuracy.result import Pair, SetResult, Trial
from kavier_twin.studies.accuracy.server import FRONTEND_SECONDS, Server, from_catalogue

COLUMNS = frozenset({"model_path", "system", "isl", "osl", "batch_size", "silicon_ttft_ms", "silicon_tpot_ms"})
_CYCLES = 5  # requests that each user sends; the first and the last are not counted: users come and go then
_SPREAD, _TOGETHER = "users starting one by one", "users starting together"


def _one(value: object) -> object:
    """Parallelism that is empty or 0 in the table is none."""
    return 1 if value in ("", "0", None) else value


Degree = Annotated[int, Field(ge=1), BeforeValidator(_one)]
Positive = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Row(BaseModel):
    """One run of the table."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    backend_version: str = ""
    model_path: str
    system: str
    isl: Positive
    osl: Annotated[int, Field(ge=2)]
    batch_size: Positive
    gemm_quant_mode: str = ""
    tp_size: Degree = 1
    pp_size: Degree = 1
    attention_dp_size: Degree = 1
    moe_ep_size: Degree = 1
    silicon_ttft_ms: Milliseconds
    silicon_tpot_ms: Milliseconds

    @property
    def engine(self) -> dict[str, Any]:
        """What follows from vLLM's version: asynchronous scheduling is the default since 0.14."""
        found = re.match(r"(\d+)\.(\d+)", self.backend_version)
        return {"async_scheduling": False} if found and (int(found[1]), int(found[2])) < (0, 14) else {}

    @property
    def label(self) -> str:
        return f"{self.model_path} {self.system} tp{self.tp_size} {self.isl}+{self.osl} tokens, {self.batch_size} users"


def run_concurrency(path: Path, name: str, tell: Callable[[str], None]) -> SetResult:
    """Raises UserError where the table cannot be read."""
    rows, notes = read_rows(path)
    pairs: dict[tuple[str, str], list[Pair]] = {}
    left_out: dict[str, int] = {}
    for number, row in enumerate(rows):
        tell(f"{number + 1} of {len(rows)}: {row.label}")
        try:
            kind = "dense models" if find_model(row.model_path).experts is None else "mixture-of-experts models"
            predicted = predict(row, str(path))
        except (CatalogError, ValueError) as error:
            left_out[str(error)] = left_out.get(str(error), 0) + 1
            continue
        for basis, (ttft, tpot) in predicted.items():
            pairs.setdefault((basis, kind), []).extend(
                [
                    Pair(row.label, "TTFT", "mean", row.silicon_ttft_ms / 1e3, ttft),
                    Pair(row.label, "TPOT", "mean", row.silicon_tpot_ms / 1e3, tpot),
                ]
            )
    notes += [f"{count} rows left out: {reason}." for reason, count in left_out.items()]
    notes.append(
        f"Each user sends {_CYCLES} requests; the first and the last are not counted. The data does not say how the "
        "benchmark started its users, and TTFT depends on it: users who start together stay bunched and wait for each "
        "other's prefills; users who start one after the other do not. Both results are given; the first row is the "
        "prediction."
    )
    notes.append("vLLM's limits on a batch are unknown too; its defaults for the GPU are assumed.")
    queued = sum(row.silicon_ttft_ms > row.silicon_tpot_ms * (row.osl - 1) for row in rows)
    if queued:
        notes.append(
            f"In {queued} rows the measured TTFT is longer than the whole decode after it: the server admitted fewer "
            "requests than there were users. The table does not contain a limit that would explain it."
        )
    trials = tuple(Trial(basis, "nothing", kind, tuple(found)) for (basis, kind), found in pairs.items())
    measured = f"{len(rows)} benchmarks of real servers at a fixed concurrency, means"
    return SetResult(name, measured, trials, tuple(notes))


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows, and what is to be said of those that could not be read. Raises UserError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from None
    rows, wrong = [], []
    for number, line in enumerate(lines, 2):
        try:
            rows.append(Row.model_validate(line))
        except ValidationError as error:
            wrong.append(f"line {number}, {problems_of(error)[0]}")
    if not rows:
        raise UserError(f"{path}: no valid row" + (f" ({wrong[0]})" if wrong else "; add some"))
    return rows, [f"{len(wrong)} malformed rows left out, the first is {wrong[0]}."] if wrong else []


def predict(row: Row, where: str) -> dict[str, tuple[float, float]]:
    """Mean TTFT and TPOT in seconds, by what the step times follow from and how the users start.

    Raises CatalogError, or ValueError where the requests do not fit the server.
    """
    if row.pp_size > 1:
        raise CatalogError("pipeline parallelism is not modelled")
    deployment = Deployment(
        tensor_parallel_size=row.tp_size,
        data_parallel_size=row.attention_dp_size,
        enable_expert_parallel=row.moe_ep_size > 1,
        quantization=_quantization(row),
    )
    prior = from_catalogue(Server(row.model_path, row.system, deployment, row.engine), where)
    predicted = {}
    for basis, step_time in prior.step_times.items():
        settings = FleetSettings(
            engine=prior.engine, step_time=step_time, replicas=row.attention_dp_size, router="round_robin"
        )
        together = _closed_loop(settings, row, 0.0)
        spread = _closed_loop(settings, row, float(together["finish"].max()) / _CYCLES)
        predicted[f"{basis}, {_SPREAD}"] = _means(row, spread)
        predicted[f"{basis}, {_TOGETHER}"] = _means(row, together)
    return predicted


def _closed_loop(settings: FleetSettings, row: Row, ramp_seconds: float) -> Records:
    """The users start evenly spread over `ramp_seconds`."""
    requests = _CYCLES * row.batch_size
    start = np.minimum(np.arange(requests) / row.batch_size, 1.0) * ramp_seconds
    workload = make_workload(start, row.isl, row.osl)
    outcomes = simulate_closed_loop(settings, workload, row.batch_size, frontend_seconds=FRONTEND_SECONDS).collect()
    return outcomes[np.argsort(outcomes["index"], kind="stable")]


def _means(row: Row, outcomes: Records) -> tuple[float, float]:
    counted = outcomes[row.batch_size : (_CYCLES - 1) * row.batch_size]
    decode = counted["finish"] - counted["first_token"]
    return float((counted["first_token"] - counted["arrival"]).mean()), float(decode.mean()) / (row.osl - 1)


def _quantization(row: Row) -> QuantizationName | None:
    """The table names types of the matrix products; a model published in a narrow type is served as published."""
    kept = find_model(row.model_path).quantization
    if kept is not None or row.gemm_quant_mode not in QUANTIZATIONS:
        return None
    return QUANTIZATIONS[row.gemm_quant_mode].name  # type: ignore[return-value]  # its keys are the names
