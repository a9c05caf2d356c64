"""One place for how kernels are compiled and where their machine code is kept.

`nogil` lets forks run in parallel threads, `cache` keeps the machine code between processes, `error_model="numpy"`
drops zero-division checks. Fast-math stays off: results must not depend on how a loop was vectorised.

Kernels only look into arrays that Python owns for the length of the call. `_nrt=False` leaves out numba's reference
counting of every view they take, which cost a third of the time; in exchange a kernel cannot allocate (numba says so
when it is compiled). The option is numba's own, for code such as this, though not part of its documented interface:
were it gone, leaving it out changes nothing but the speed.

numba looks only at a kernel's own file when it asks whether cached code is stale, not at the kernels it calls. So the
cache lies in a folder named by a digest of all kernels: under `NUMBA_CACHE_DIR` if set, else in the user's cache
folder. Where that cannot be written, kernels are compiled anew in each process (a shared temporary folder would let
others plant code).
"""

import hashlib
import os
from pathlib import Path

import numba
from numba import njit


def _digest() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for source in [*sorted(Path(__file__).parent.rglob("*.py")), Path(__file__).parents[1] / "state.py"]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> str | None:
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    base = os.environ.get("NUMBA_CACHE_DIR") or os.path.join(user_cache, "kavier-twin")
    folder = os.path.join(base, f"kernels-{_digest()}")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


_FOLDER = _cache_folder()
if _FOLDER is not None:
    numba.config.CACHE_DIR = _FOLDER  # type: ignore[attr-defined]

kernel = njit(nogil=True, cache=_FOLDER is not None, error_model="numpy", _nrt=False)  # type: ignore[call-overload]
# Written out in its callers: for what returns records, which a compiled function cannot, for what is small, and for
# what has few callers, as each compiled function carries all the code it calls.
inlined_kernel = njit(  # type: ignore[call-overload]
    nogil=True, cache=_FOLDER is not None, error_model="numpy", _nrt=False, inline="always"
)
# Part of its callers' machine code: for the few instructions that touch one block.
small_kernel = njit(  # type: ignore[call-overload]
    nogil=True, cache=_FOLDER is not None, error_model="numpy", _nrt=False, forceinline=True
)
