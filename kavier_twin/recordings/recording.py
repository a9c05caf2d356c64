"""Recordings of a real vLLM: its requests, what its server said of itself meanwhile, and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from connectors.prometheus.engines import engine_samples
from connectors.prometheus.readings import parse_exposition
from connectors.traces import Trace, TraceError, read_trace
from connectors.traces.base import each_line
from connectors.traces.recording import read_metrics
from connectors.traces.telemetry import TelemetryReader
from kavier_twin.errors import UserError
from kavier_twin.simulation.settings import EngineSettings
from kavier_twin.telemetry import EngineSample


def read_recording(directory: Path | None) -> tuple[Trace, list[EngineSample]]:
    """The recording in a directory (None: the shipped one), and the samples that lie beside it. Raises UserError."""
    if directory is None:
        with as_file(files("kavier_twin").joinpath("demo_data", "ramp-300")) as shipped:
            return read_recording(shipped)
    try:
        trace = read_trace(directory, "recording")
    except TraceError as error:
        raise UserError(f"{error}; give a recording with --recording DIR") from None
    return trace, recorded_samples(trace)


def recorded_samples(trace: Trace) -> list[EngineSample]:
    """What the server said of itself, on the requests' clock: as samples, or as scrapes of its metrics."""
    folder, samples = trace.path.parent, list[EngineSample]()
    path = folder / "samples.jsonl.gz"
    if path.is_file():
        reader = TelemetryReader(path)

        def take(_: int, line: bytes) -> None:
            record = reader.parse(line)
            if isinstance(record, EngineSample):
                samples.append(record)

        each_line(path, take, lambda *_: None)
    elif trace.format == "recording" and (folder / "metrics.jsonl.gz").is_file():
        begin = float(trace.settings.get("started_unix", 0.0))
        for time, text in read_metrics(folder):
            found = parse_exposition(text)
            samples += engine_samples(
                found, lambda _: None, time_seconds=time - begin, pool="default", namespace="", pod="vllm-0"
            )
    return samples


def recorded_engine(trace: Trace) -> EngineSettings:
    """The settings that the server ran with. Raises UserError."""
    told: Any = trace.settings.get("engine")
    if not isinstance(told, Mapping):
        raise UserError(f"{trace.path.parent}/meta.json: engine: expected the engine's settings")
    try:
        return EngineSettings(**{name: told[name] for name in EngineSettings.model_fields if name in told})
    except ValueError as error:
        raise UserError(f"{trace.path.parent}/meta.json: engine: {error}") from None


def recorded_server(trace: Trace) -> str:
    """What server it was, in words."""
    told: Any = trace.settings.get("engine")
    return str(told.get("engine", "vLLM")) if isinstance(told, Mapping) else "vLLM"
