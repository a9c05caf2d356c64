"""Kernels made ready before anything is mirrored, how far that is, and the caches of other versions removed.

On the first start of a version they are compiled; afterwards they come from the cache in less than a second. What only
some fleets need, eviction policies other than LRU and host tiers, is left out unless the fleet has it: a what-if that
needs it has it compiled, which the mirrors and the other forecasts do not wait for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Final

from kavier_twin.forecast.drawing import DRAWING
from kavier_twin.serve.models import Compiling, KernelCounts
from kavier_twin.simulation.build import kernels_of
from kavier_twin.simulation.compiler import libraries
from kavier_twin.simulation.kernels import ENGINE, FLEET
from kavier_twin.simulation.settings import EngineSettings

_NEEDED: Final = (ENGINE, FLEET, DRAWING)
_KEPT: Final = re.compile(r"[a-z]+-[0-9a-f]{16}\.kernels")
_OLD_SECONDS: Final = 30 * 86_400.0  # not used for so long, a library is removed


def compiled() -> Compiling:
    """How many of the libraries of kernels that every twin needs are there."""
    return Compiling(sum(library.is_loaded for library in _NEEDED), len(_NEEDED))


def counts() -> KernelCounts:
    """What was and is compiled, when first needed or before."""
    return KernelCounts(len(libraries.compiling()), len(libraries.compiled()))


def make_ready(engines: Iterable[EngineSettings] = ()) -> None:
    """Load all that mirrors and forecasts of these engines need, so that nothing is compiled later on."""
    libraries.load(*_NEEDED, *(library for engine in engines for library in kernels_of(engine)))
    remove_old_libraries(libraries.cache_folder())


def cannot_keep() -> str:
    """Why kernels will be compiled at every start, and what to do; empty where they are cached or can be."""
    folder = libraries.cache_folder()
    if all(libraries.cached_file(library).is_file() for library in _NEEDED):
        return ""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        why = f"the cache of compiled kernels, {folder}, cannot be written ({error.strerror})"
    mend = "mount a volume there, or set NUMBA_CACHE_DIR to a folder that can be written"
    try:
        gettempdir()
    except OSError:
        return f"{why}, nor can a temporary folder such as /tmp, so kernels are compiled in the daemon itself; {mend}"
    return f"{why}, so kernels are compiled at every start; {mend}"


def remove_old_libraries(folder: Path) -> None:
    """Remove what was not used for a month, other versions' mostly.

    Nothing breaks if another process needs it after all: it compiles it again.
    """
    now = time.time()
    try:
        for path in folder.iterdir():
            if _KEPT.fullmatch(path.name) and now - path.stat().st_mtime > _OLD_SECONDS:
                path.unlink()
    except OSError:  # one that went away, a cache that may only be read
        return
