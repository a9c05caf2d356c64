"""One place for how kernels are compiled.

`nogil` lets forks run in parallel threads, `cache` keeps the machine code between processes, `error_model="numpy"`
drops zero-division checks. Fast-math stays off: results must not depend on how a loop was vectorised.
"""

from numba import njit

kernel = njit(nogil=True, cache=True, error_model="numpy")
