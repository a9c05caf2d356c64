"""(m) From an empty cache of kernels to a twin that mirrors and forecasts, stage by stage, on all cores and on one.

Each run is a process of its own with a cache of its own; "warm" is the second one with the same cache. CPU seconds
include those of the processes that compile.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import report

TARGET_SECONDS = {1: 30, 2: 20}  # for compiling, by cores
TARGET_MEBIBYTES = 700
_MEASURE = "measure"
_REQUESTS = 60  # of the shipped recording


def measure() -> None:
    """Go through the stages and print what each took as JSON."""
    stages: dict[str, tuple[float, float]] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        result = work()
        stages[name] = time.perf_counter() - wall, _cpu_seconds() - cpu
        return result

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stage("import", _import)
    from kavier_twin.daemon.warm_up import make_ready  # importing is a stage of its own
    from kavier_twin.simulation.compiler import libraries
    from kavier_twin.simulation.kernels import POLICIES, TIERS

    stage("kernels", make_ready)
    functions = sum(len(code.functions) for code in libraries.cached())
    mirror = stage("mirror", _mirror)
    stage("forecast", lambda: _forecast(mirror))
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    stage("policies, tiers", lambda: libraries.load(POLICIES, TIERS))
    size = sum(file.stat().st_size for file in libraries.cache_folder().iterdir())
    print(json.dumps({"stages": stages, "functions": functions, "bytes": size, "peaks": peaks}))


def _import() -> None:
    import kavier_twin.daemon.daemon  # noqa: F401


def _mirror() -> Any:
    from kavier_twin.mirror.mirror import Mirror, MirrorSettings
    from kavier_twin.recordings.recording import read_recording, recorded_engine
    from kavier_twin.recordings.replay_source import ReplaySource
    from kavier_twin.simulation.settings import CRUDE_STEP_TIME, FleetSettings

    trace, _ = read_recording(None)
    fleet = FleetSettings(engine=recorded_engine(trace), step_time=CRUDE_STEP_TIME)
    mirror = Mirror(MirrorSettings(ordering_seconds=0.0, calibrate_after_requests=30), fleet)
    source = ReplaySource(trace.records[:_REQUESTS], speed=1e12)
    while not source.exhausted:
        for record in source.poll(10_000):
            mirror.ingest(record)
    mirror.advance()
    return mirror


def _forecast(mirror: Any) -> None:
    from kavier_twin.forecast.forecaster import Forecaster, ForecastSettings

    snapshot = mirror.snapshot()
    assert snapshot is not None
    Forecaster(ForecastSettings(horizons_seconds=(5.0,), scenarios=1, workers=1)).run(snapshot)


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def main() -> None:
    """Measure cold and warm starts."""
    rows = []
    for cores in sorted({1, min(2, len(os.sched_getaffinity(0)))}, reverse=True):
        with tempfile.TemporaryDirectory(prefix="cold-start-") as cache:
            rows += [_row(cores, cache, "cold"), _row(cores, cache, "warm")]
    report("(m) cold start", rows, "wall (CPU) seconds; peak RSS before policies and tiers are loaded")


def _row(cores: int, cache: str, start: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.cold_start", _MEASURE],
        env={**os.environ, "NUMBA_CACHE_DIR": cache},
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]),
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(run.stdout.splitlines()[-1])
    return {
        "cores": cores,
        "start": start,
        **{name: f"{wall:.1f} ({cpu:.1f})" for name, (wall, cpu) in found["stages"].items()},
        "target for kernels": TARGET_SECONDS[cores],
        "functions": found["functions"],
        "cache MiB": found["bytes"] / 2**20,
        "RSS MiB": found["peaks"][0],
        "target RSS": TARGET_MEBIBYTES,
        "RSS of the largest compiler MiB": found["peaks"][1],
    }


if __name__ == "__main__":
    if sys.argv[1:] == [_MEASURE]:
        measure()
    else:
        main()
