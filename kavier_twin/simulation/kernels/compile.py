"""One place for how kernels are compiled and where their machine code is kept.

`nogil` lets forks run in parallel threads, `cache` keeps the machine code between processes, `error_model="numpy"`
drops zero-division checks. Fast-math stays off: results must not depend on how a loop was vectorised.

Kernels only look into arrays that Python owns for the length of the call. `_nrt=False` leaves out numba's reference
counting of every view they take, which cost a third of the time; in exchange a kernel cannot allocate (numba says so
when it is compiled). The option is numba's own, for code such as this, though not part of its documented interface:
were it gone, leaving it out changes nothing but the speed.

numba looks only at a kernel's own file when it asks whether cached code is stale, not at the kernels it calls. So the
cache lies in a folder named by a digest of all kernels: `NUMBA_CACHE_DIR` if set, else the user's cache folder.
"""

import hashlib
import os
from pathlib import Path

import numba
from numba import njit


def _cache_folder() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[1] / "state.py"]
    for source in sources:
        digest.update(source.read_bytes())
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    base = os.environ.get("NUMBA_CACHE_DIR") or os.path.join(user_cache, "kavier-twin")
    return os.path.join(base, f"kernels-{digest.hexdigest()[:16]}")


numba.config.CACHE_DIR = _cache_folder()  # type: ignore[attr-defined]

kernel = njit(nogil=True, cache=True, error_model="numpy", _nrt=False)  # type: ignore[call-overload]
