"""From a trace file to something to simulate: the requests, the fleet, and where its step times come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ValidationError

from connectors.traces import Trace, TraceError, read_trace
from kavier_twin.closed_loop_option import ClosedLoop
from kavier_twin.errors import UserError
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.workload import take_rows, workload_of
from kavier_twin.twin.calibration import Calibration, CalibrationError, Observed, calibrate, single_engine

Model = TypeVar("Model", bound=BaseModel)

# Llama-3.1-8B in bf16 on one H100 SXM 80 GB: blocks from 0.92 x 80 GiB less 15 GiB of weights and 2 GiB of
# activations at 2 MiB a block; step times from its data sheet (989 TFLOPS dense bf16, 3.35 TB/s) at 60 % of either.
DEFAULT_FLEET = FleetSettings(
    engine=EngineSettings(num_gpu_blocks=28_000),
    step_time=StepTime(
        fixed=0.008,
        per_prefill_token=2.7e-5,
        per_decode_sequence=2.7e-5,
        per_context_token=6.5e-8,
        per_prefill_attention=8.8e-10,
    ),
)
_DEFAULT = "the default, Llama-3.1-8B on one H100"


@dataclass(frozen=True)
class Scenario:
    """What `simulate` runs. `observed` carries NaN where the trace measured nothing."""

    trace: Trace
    fleet: FleetSettings
    observed: Observed
    frontend_seconds: float
    calibration: Calibration | None
    fleet_source: str  # where the fleet came from, for the report


def load_scenario(
    path: Path, *, trace_format: str | None = None, fleet_file: Path | None = None, calibrate_until: float = 0.33
) -> Scenario:
    """Read a trace and find its fleet: `fleet_file`, else what lies beside the trace, else the default.

    A recorded run without a fleet file has its step times fitted on its first part, `calibrate_until` of its duration.
    Raises UserError.
    """
    try:
        trace = read_trace(path, trace_format)
    except TraceError as error:
        raise UserError(str(error)) from None
    observed = observed_of(trace)
    if fleet_file is not None:
        return Scenario(trace, read_fleet(fleet_file), observed, 0.0, None, str(fleet_file))
    if trace.format == "golden":
        settings = trace.settings
        fleet = FleetSettings(
            engine=_engine(settings.get("engine"), f"{path}: scenario.json"),
            step_time=_checked(StepTime, settings.get("step_seconds"), f"{path}: scenario.json: step_seconds"),
        )
        return Scenario(trace, fleet, observed, 0.0, None, "scenario.json")
    if trace.format in ("recording", "llmservingsim"):
        engine = _engine(trace.settings.get("engine"), f"{path}: meta.json")
        calibration = _fit(path, engine, observed, calibrate_until)
        fleet = FleetSettings(engine=engine, step_time=calibration.step_time)
        return Scenario(trace, fleet, observed, calibration.frontend_seconds, calibration, "meta.json")
    return Scenario(trace, DEFAULT_FLEET, observed, 0.0, None, _DEFAULT)


def closed_loop_scenario(loop: ClosedLoop, fleet_file: Path | None) -> Scenario:
    """What a closed loop without a trace runs on: requests with nothing in common. Raises UserError."""
    workload = loop.workload()
    trace = Trace(Path("closed loop"), "closed-loop", [], [], 0, {}, {}, None, False)
    nothing = np.full(workload.index.size, math.nan)
    observed = Observed(workload, nothing, nothing)
    if fleet_file is not None:
        return Scenario(trace, read_fleet(fleet_file), observed, 0.0, None, str(fleet_file))
    return Scenario(trace, DEFAULT_FLEET, observed, 0.0, None, _DEFAULT)


def observed_of(trace: Trace) -> Observed:
    """The trace's requests as arrays, with what was measured of them."""
    return Observed(
        workload=workload_of(trace.records),
        ttft_seconds=np.array([math.nan if r.ttft_seconds is None else r.ttft_seconds for r in trace.records]),
        e2e_seconds=np.array([math.nan if r.e2e_seconds is None else r.e2e_seconds for r in trace.records]),
    )


def first_part(observed: Observed, share: float) -> Observed:
    """What was known at this share of the time between the first and the last arrival.

    Requests that had arrived but not ended by then are load without measurements.
    """
    arrival = observed.workload.arrival
    end = arrival[0] + share * (arrival[-1] - arrival[0])
    rows = np.flatnonzero(arrival <= end)
    ended = arrival[rows] + observed.e2e_seconds[rows] <= end
    return Observed(
        take_rows(observed.workload, rows),
        np.where(ended, observed.ttft_seconds[rows], math.nan),
        np.where(ended, observed.e2e_seconds[rows], math.nan),
    )


def _fit(path: Path, engine: EngineSettings, observed: Observed, share: float) -> Calibration:
    try:
        return calibrate(single_engine(engine), first_part(observed, share))
    except CalibrationError as error:
        raise UserError(
            f"{path}: cannot fit step times on the first {share:.0%}: {error}. "
            "Raise --calibrate-until, or give step times with --fleet FLEET.yaml"
        ) from None


def read_fleet(path: Path) -> FleetSettings:
    """A fleet file: the YAML form of FleetSettings. Raises UserError that lists every problem."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return _checked(FleetSettings, content, str(path))


def _engine(settings: Any, where: str) -> EngineSettings:
    """Engine settings that lie beside a trace; what vLLM was further told (model shape, ...) is passed over."""
    if isinstance(settings, Mapping):
        settings = {name: value for name, value in settings.items() if name in EngineSettings.model_fields}
    return _checked(EngineSettings, settings, f"{where}: engine")


def _checked(model: type[Model], values: Any, where: str) -> Model:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping of {', '.join(model.model_fields)}")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors()]
        raise UserError("\n".join([f"{where}: {len(problems)} problem(s)", *problems])) from None
