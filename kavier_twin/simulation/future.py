"""What Belady's policy knows: when each hash of the trace is used again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.kernels import entries as kernels
from kavier_twin.simulation.state import FleetState, Records
from kavier_twin.simulation.workload import Workload


class Future(NamedTuple):
    """Uses to come, sorted by hash and then by arrival, and a hash table over them."""

    rows: Records  # [F] state.FUTURE
    requests: int


def foresee(workload: Workload, first_rank: int) -> Future:
    """The future that this workload, sorted by arrival, is. Ranks of its requests count from `first_rank`.

    A hash is used by a request whose prompt reaches into it; what a request generates is no use of a cached block.
    """
    lengths = np.diff(workload.chain_starts)
    row = np.repeat(np.arange(lengths.size), lengths)
    link = np.arange(row.size) - np.repeat(workload.chain_starts[:-1] - workload.chain_starts[0], lengths)
    in_prompt = link * workload.hash_tokens[row] < workload.prompt[row]
    row = row[in_prompt]
    return foresee_keys(workload.chain[in_prompt], row, workload.arrival[row], workload.index[row], first_rank)


def foresee_keys(
    keys: npt.NDArray[np.uint64],
    row: npt.NDArray[np.int64],
    arrival: npt.NDArray[np.float64],
    index: npt.NDArray[np.int64],
    first_rank: int,
) -> Future:
    """The future in which `row` (ascending), the request (arrival, index), uses the hash `keys`; all of one length."""
    if keys.size == 0:
        return Future(np.zeros(1, layout.FUTURE), 0)
    order = np.lexsort((index, arrival, keys))
    keys = keys[order]
    distinct = 1 + int((keys[1:] != keys[:-1]).sum())
    rows = np.zeros(1 << max(2 * distinct, keys.size).bit_length(), layout.FUTURE)
    uses = rows["use"][: keys.size]
    uses["arrival"], uses["index"], uses["rank"] = arrival[order], index[order], first_rank + row[order]
    kernels.fill_oracle(rows, keys)
    return Future(rows, int(row[-1]) + 1)


def with_future(state: FleetState, pending: Workload | None, time_seconds: float) -> FleetState:
    """The fleet knowing the requests to come; what it has cached is wanted when the first of them asks for it."""
    first_rank = int(state.fleet["next_rank"][0])
    rows, requests = (np.zeros(1, layout.FUTURE), 0) if pending is None else foresee(pending, first_rank)
    state = state._replace(future=rows)
    state.fleet["next_rank"] = first_rank + requests
    for number in range(state.replicas.size):
        kernels.learn_uses(state, number, time_seconds)
    return state
