"""The load to come: the recent arrival rate goes on, as a Poisson process."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kavier_twin.twin.snapshot import Snapshot

Floats = npt.NDArray[np.float64]

_SHORTEST_WINDOW_SECONDS = 1.0  # two requests in a millisecond are no rate of thousands a second
_CHUNK = 1024


def arrival_rate(snapshot: Snapshot) -> float:
    """Requests per second over the recent window, 0 where fewer than two requests were seen.

    The window begins at its first arrival, which then only tells when: a stream that just began is not taken for one
    that was silent before, and what came behind the first is a fair sample whether the window was full or not.
    """
    arrivals = snapshot.recent.arrival
    if arrivals.size < 2:
        return 0.0
    window = max(snapshot.time_seconds - float(arrivals[0]), _SHORTEST_WINDOW_SECONDS)
    return (arrivals.size - 1) / window


def poisson_arrivals(rate: float, start_seconds: float, horizon_seconds: float, rng: np.random.Generator) -> Floats:
    """Sorted arrival times in (start, start + horizon), seconds, at `rate` requests per second.

    With the same generator state a shorter horizon gives the beginning of a longer one.
    """
    if rate <= 0.0:
        return np.zeros(0)
    chunks = [np.zeros(1)]
    while chunks[-1][-1] < horizon_seconds:
        chunks.append(chunks[-1][-1] + np.cumsum(rng.exponential(1.0 / rate, _CHUNK)))
    elapsed = np.concatenate(chunks[1:])
    return start_seconds + elapsed[elapsed < horizon_seconds]
