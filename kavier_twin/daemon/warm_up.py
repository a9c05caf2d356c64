"""Kernels made ready before anything is mirrored, how far that is, and the caches of old ones removed.

On the first start of a version the kernels are compiled: a minute and a half of one core. Afterwards they come from
the cache (`simulation/kernels/compile.py`) in a second or two.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from typing import Final

import numba
from numba.core.dispatcher import Dispatcher

from kavier_twin.forecast.forecaster import Forecaster, ForecastSettings
from kavier_twin.forecast.load_methods import prepare
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.recordings.recording import read_recording, recorded_engine
from kavier_twin.recordings.replay_source import ReplaySource
from kavier_twin.serve.models import Compiling
from kavier_twin.simulation.settings import CRUDE_STEP_TIME, FleetSettings

_REQUESTS: Final = 60  # of the shipped recording: enough to calibrate on and to draw scenarios from
_CACHES: Final = re.compile("kernels-[0-9a-f]{16}")
_CACHES_KEPT: Final = 3  # of those used last, ours among them
_OLD_SECONDS: Final = 30 * 86_400.0  # not used for so long, a cache is removed
_IN_USE_SECONDS: Final = 86_400.0  # used within this time it stays, however many there are: a twin may be running on it


def compiled() -> Compiling:
    """How many of the kernels that this process may need are compiled or loaded."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("kavier_twin.")]
    kernels = {id(found): found for module in modules for found in list(vars(module).values()) if _is_kernel(found)}
    return Compiling(sum(bool(kernel.overloads) for kernel in kernels.values()), len(kernels))


@cache
def make_ready() -> None:
    """Run all that a twin does on the beginning of the shipped recording, so that nothing is compiled later on.

    Once in a process.
    """
    trace, _ = read_recording(None)
    fleet = FleetSettings(engine=recorded_engine(trace), step_time=CRUDE_STEP_TIME)
    mirror = Mirror(MirrorSettings(ordering_seconds=0.0, calibrate_after_requests=30), fleet)
    source = ReplaySource(trace.records[:_REQUESTS], speed=1e12)
    while not source.exhausted:
        for record in source.poll(10_000):
            mirror.ingest(record)
    mirror.advance()
    snapshot = mirror.snapshot()
    prepare()
    assert snapshot is not None
    Forecaster(ForecastSettings(horizons_seconds=(5.0,), scenarios=1, workers=1)).run(snapshot)
    remove_old_caches(Path(numba.config.CACHE_DIR))  # type: ignore[attr-defined]


def remove_old_caches(ours: Path) -> None:
    """Remove kernels of other versions beside our own cache, which counts as used now.

    Nothing breaks if another process needs them after all: it compiles them again.
    """
    if not _CACHES.fullmatch(ours.name) or not ours.is_dir():
        return
    now = time.time()
    try:
        os.utime(ours)
        beside = [path for path in ours.parent.iterdir() if _CACHES.fullmatch(path.name) and not path.is_symlink()]
        used = {path: path.stat().st_mtime for path in beside}
    except OSError:  # one that went away, a cache that may only be read
        return
    for number, path in enumerate(sorted(used, key=used.__getitem__, reverse=True)):
        unused_seconds = now - used[path]
        if unused_seconds > _OLD_SECONDS or (number >= _CACHES_KEPT and unused_seconds > _IN_USE_SECONDS):
            shutil.rmtree(path, ignore_errors=True)


def _is_kernel(found: object) -> bool:
    """Whether it is compiled on its own, not as a part of its callers."""
    return isinstance(found, Dispatcher) and found.targetoptions.get("inline") != "always"
