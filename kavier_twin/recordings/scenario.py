"""From a trace file to something to simulate: the requests, the fleet, and where its step times come from."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ValidationError

from connectors.traces import Trace, TraceError, read_trace
from connectors.traces.table import RequestTable
from kavier_twin.errors import UserError, problems_of
from kavier_twin.hardware.fleet_file import FleetFile, Hardware, fleet_with_carbon_read, with_carbon_read
from kavier_twin.hardware.roofline import step_time
from kavier_twin.mirror.calibration.requests import (
    Calibration,
    CalibrationError,
    Observed,
    calibrate,
    single_engine,
    with_frontend,
)
from kavier_twin.mirror.calibration.steps import calibrate_counters, calibrate_steps
from kavier_twin.recordings.engine_logs import counted, logged_steps
from kavier_twin.simulation.footprint import Footprint
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.versions import NEWEST, nearest_profile, release
from kavier_twin.simulation.workload import Workload, adapter_identity, make_workload, take_rows

log = logging.getLogger(__name__)

CalibrateFrom = Literal["requests", "steps", "metrics"]
Model = TypeVar("Model", bound=BaseModel)

# What a recording's `engine` says of the server beside its settings: its name, the model's shape.
_DESCRIBED = frozenset({"engine", "gpu", "model"})
_PART = 20_000  # requests that are arrays at once

DEFAULT_HARDWARE = Hardware(gpu="H100 SXM 80GB", model="meta-llama/Llama-3.1-8B")
# A GPU-hour costs what on-demand offers of an H100 SXM asked in 2026: 1.9 to 2.9 USD.
# The data sheet's step times, also where measured operators are installed: the default is the same everywhere.
DEFAULT_FLEET = FleetFile.model_validate(
    {
        "hardware": DEFAULT_HARDWARE.model_dump(),
        "step_time": step_time(DEFAULT_HARDWARE.card, DEFAULT_HARDWARE.shape),
        "footprint": {"price_per_gpu_hour": 2.5, "currency": "USD"},
    }
).settings()
_DEFAULT = "the default, Llama-3.1-8B on one H100 SXM at 2.5 USD an hour"


@dataclass(frozen=True)
class Scenario:
    """What `simulate` runs."""

    trace: Trace
    fleet: FleetSettings
    frontend_seconds: float
    calibration: Calibration | None
    fleet_source: str  # where the fleet came from, for the report
    calibrated_from: CalibrateFrom = "requests"

    @cached_property
    def observed(self) -> Observed:
        """All requests at once, with NaN where the trace measured nothing."""
        return observed_of(self.trace)

    def parts(self, settings: FleetSettings) -> Iterator[Workload]:
        """The requests as the engine gets them, some at a time; all at once where Belady's policy is to know them."""
        count = len(self.trace.records)
        size = count if settings.engine.eviction == "belady" else _PART
        for start in range(0, count, size):
            part = workload_part(self.trace.records, start, min(start + size, count))
            yield with_frontend(part, self.frontend_seconds)


def load_scenario(
    path: Path,
    *,
    trace_format: str | None = None,
    fleet_file: Path | None = None,
    calibrate_until: float = 0.33,
    calibrate_from: CalibrateFrom = "requests",
) -> Scenario:
    """Read a trace and find its fleet: `fleet_file`, else what lies beside the trace, else the default.

    A recorded run without a fleet file has its step times fitted on its first part, `calibrate_until` of its duration:
    to its requests' timings, to vLLM's log of its steps, or to its counters (which tell nothing of the frontend).
    Raises UserError.
    """
    try:
        trace = read_trace(path, trace_format)
    except TraceError as error:
        raise UserError(str(error)) from None
    if fleet_file is not None:
        fleet, source = _read_fleet(fleet_file)
        return Scenario(trace, fleet, 0.0, None, f"{fleet_file}, step times: {source}")
    if trace.format == "golden":
        settings = trace.settings
        engine = _golden_engine(settings, f"{path}: scenario.json")
        fleet = FleetSettings(
            engine=engine,
            step_time=_checked(StepTime, settings.get("step_seconds"), f"{path}: scenario.json: step_seconds"),
        )
        return Scenario(trace, fleet, 0.0, None, "scenario.json")
    if trace.format in ("recording", "llmservingsim"):
        engine = _recorded_engine(trace.settings.get("engine"), f"{path}: meta.json")
        calibration = _fit(trace, engine, calibrate_until, calibrate_from)
        fleet = FleetSettings(engine=engine, step_time=calibration.step_time)
        return Scenario(trace, fleet, calibration.frontend_seconds, calibration, "meta.json", calibrate_from)
    return Scenario(trace, DEFAULT_FLEET, 0.0, None, _DEFAULT)


def without_trace(name: str, fleet_file: Path | None) -> Scenario:
    """A fleet for a load that is not a trace's, with no requests of its own. Raises UserError."""
    nothing = Trace(Path(name), name, RequestTable(), [], 0, {}, {}, None, False)
    if fleet_file is not None:
        return Scenario(nothing, read_fleet(fleet_file), 0.0, None, str(fleet_file))
    return Scenario(nothing, DEFAULT_FLEET, 0.0, None, _DEFAULT)


def observed_of(trace: Trace) -> Observed:
    """The trace's requests as arrays, with what was measured of them."""
    count = len(trace.records)
    queue = trace.records.latency("queue_seconds", 0, count)
    return Observed(
        workload=workload_part(trace.records, 0, count),
        ttft_seconds=trace.records.latency("ttft_seconds", 0, count),
        e2e_seconds=trace.records.latency("e2e_seconds", 0, count),
        queue_seconds=queue if np.isfinite(queue).any() else None,
    )


def workload_part(records: RequestTable, start: int, stop: int) -> Workload:
    """The requests [start, stop) of a trace as arrays, numbered by their place in it."""
    prompt, output = records.column("prompt_tokens", start, stop), records.column("output_tokens", start, stop)
    block_tokens = records.column("block_tokens", start, stop)
    chain, chain_starts = records.hashes(start, stop)
    hashed = np.diff(chain_starts) * block_tokens
    known = prompt + records.column("covers_output", start, stop) * output
    session, index = records.column("session", start, stop), np.arange(start, stop)
    return make_workload(
        records.times(start, stop),
        prompt,
        output,
        chain=chain,
        chain_starts=chain_starts,
        hash_tokens=block_tokens,
        covered=np.minimum(hashed, known),
        priority=records.rest("priority", start, stop),
        adapter=[adapter_identity(name) for name in records.rest("adapter", start, stop)],
        skips_lookup=records.rest("skip_reading_prefix_cache", start, stop),
        session=np.where(session < 0, -1 - index, session),  # without one, each is a session of its own
        index=index,
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


def _fit(trace: Trace, engine: EngineSettings, share: float, source: CalibrateFrom) -> Calibration:
    try:
        if source == "steps":
            return calibrate_steps(logged_steps(trace.path.parent, engine, share))
        if source == "metrics":
            return calibrate_counters(counted(trace.path.parent, engine, share))
        return calibrate(single_engine(engine), first_part(observed_of(trace), share))
    except CalibrationError as error:
        raise UserError(
            f"{trace.path}: cannot fit step times on the first {share:.0%}: {error}. "
            "Raise --calibrate-until, or give step times with --fleet FLEET.yaml"
        ) from None
    except TraceError as error:
        raise UserError(str(error)) from None


def read_fleet(path: Path) -> FleetSettings:
    """A fleet file: the YAML form of FleetSettings, or of the hardware that it follows from.

    Raises UserError that lists every problem.
    """
    return _read_fleet(path)[0]


def _read_fleet(path: Path) -> tuple[FleetSettings, str]:
    """The fleet, and where its step times come from."""
    told = _checked(FleetFile, _yaml(path), str(path))
    return fleet_with_carbon_read(told.settings(), path.resolve().parent), told.step_time_source


def read_footprint(path: Path) -> Footprint:
    """A footprint file: the YAML form of Footprint. Raises UserError that lists every problem."""
    return with_carbon_read(_checked(Footprint, _yaml(path), str(path)), path.resolve().parent)


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _golden_engine(settings: Mapping[str, Any], where: str) -> EngineSettings:
    """The engine of a golden run. A setting that is not modelled is refused. Raises UserError."""
    engine, version = settings.get("engine"), settings.get("vllm")
    if isinstance(engine, Mapping) and version is not None:
        engine = {"vllm": _profile(version, where), **engine}
    if isinstance(engine, Mapping):
        engine = _as_settings(engine)
    return _checked(EngineSettings, engine, f"{where}: engine")


def _as_settings(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Options of vLLM that come down to other settings of ours. What is not understood stays, to be refused."""
    engine = dict(engine)
    lora = engine.get("lora")
    if isinstance(lora, Mapping) and lora.keys() == {"max_loras"}:
        engine["max_loras"] = engine.pop("lora")["max_loras"]
    ranks, size = engine.get("decode_context_parallel_size"), engine.get("block_size")
    if type(ranks) is int and ranks > 0 and type(size) is int:
        # A block holds the tokens of all ranks: vLLM's effective_attention_block_size.
        engine["block_size"] = size * engine.pop("decode_context_parallel_size")
    if engine.get("disable_hybrid") is True:  # every layer keeps all its tokens, whatever its window
        del engine["disable_hybrid"]
        engine.pop("kv_layers", None)
    if engine.get("pipeline_parallel_size") == 1:
        del engine["pipeline_parallel_size"]
    return engine


def _recorded_engine(engine: Any, where: str) -> EngineSettings:
    """The engine of a recording, which tells all of its server: what is not modelled is named. Raises UserError."""
    if isinstance(engine, Mapping):
        told = re.search(r"vllm\s+(\S+)", str(engine.get("engine", "")), re.IGNORECASE)
        for name in sorted(engine.keys() - EngineSettings.model_fields.keys() - _DESCRIBED):
            log.warning("%s: engine.%s is not modelled: the simulation leaves it out", where, name)
        engine = {name: value for name, value in engine.items() if name in EngineSettings.model_fields}
        if told and release(told[1]) is not None:
            engine = {"vllm": _profile(told[1], where), **engine}
    return _checked(EngineSettings, engine, f"{where}: engine")


def _profile(version: object, where: str) -> str:
    """The profile that a version of vLLM is simulated with; says so if it is another one's. Raises UserError."""
    profile = nearest_profile(version)
    if profile is None:
        raise UserError(f'{where}: vllm is {version!r}; expected a version such as "{NEWEST}.0"')
    if release(version) != profile:
        log.warning("%s: vLLM %s is not among the versions reproduced: it is simulated as %s", where, version, profile)
    return profile


def _checked(model: type[Model], values: Any, where: str) -> Model:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping of {', '.join(model.model_fields)}")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = problems_of(error, known=lambda place: model.model_fields if len(place) == 1 else ())
        raise UserError("\n  ".join([f"{where}: {len(problems)} problem(s)", *problems])) from None
