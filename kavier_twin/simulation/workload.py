"""Requests as plain arrays, in order of arrival: what the kernels read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.kernels.entries import chain_keys
from kavier_twin.simulation.state import Workload as Workload


class RequestLike(Protocol):
    """What a request must tell to be simulated (telemetry's RequestRecord does)."""

    @property
    def time_seconds(self) -> float: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def session(self) -> str | None: ...
    @property
    def block_hashes(self) -> Sequence[int]: ...
    @property
    def block_tokens(self) -> int | None: ...
    @property
    def hashes_cover_output(self) -> bool: ...
    @property
    def adapter(self) -> str | None: ...
    @property
    def skip_reading_prefix_cache(self) -> bool: ...


def make_workload(
    arrival: npt.ArrayLike,
    prompt: npt.ArrayLike,
    output: npt.ArrayLike,
    *,
    chain: npt.ArrayLike = (),
    chain_starts: npt.ArrayLike | None = None,
    hash_tokens: npt.ArrayLike = 0,
    covered: npt.ArrayLike = 0,
    priority: npt.ArrayLike = 0,
    session: npt.ArrayLike | None = None,
    held: npt.ArrayLike = 0,
    replica: npt.ArrayLike = -1,
    adapter: npt.ArrayLike = 0,
    skips_lookup: npt.ArrayLike = 0,
    index: npt.ArrayLike | None = None,
) -> Workload:
    """Build a workload; scalars are broadcast. Arrivals must be sorted, `chain` holds content hashes (any 64 bits).

    Raises ValueError for arrivals that run backwards or arrays of unequal length.
    """
    times = np.ascontiguousarray(arrival, dtype=np.float64)
    n = times.size
    if n and not (np.isfinite(times).all() and (np.diff(times) >= 0).all()):
        raise ValueError("arrivals must be finite and sorted")

    def column(values: npt.ArrayLike, dtype: type) -> npt.NDArray[np.int64]:
        if np.ndim(values) == 0:
            return np.full(n, values, dtype=dtype)  # the mirror makes a workload of each request
        # Copied, as a broadcast array may only be read, and kernels would be compiled once more for such columns.
        return np.array(np.broadcast_to(np.asarray(values, dtype=dtype), (n,)))

    starts = np.zeros(n + 1, np.int64) if chain_starts is None else np.ascontiguousarray(chain_starts, np.int64)
    if starts.size != n + 1:
        raise ValueError(f"chain_starts has {starts.size} entries for {n} requests")
    keys = np.array(chain, dtype=np.uint64)
    chain_keys(keys, starts)
    numbers = np.arange(n)
    return Workload(
        index=column(numbers if index is None else index, np.int64),
        arrival=times,
        delivered=times,
        prompt=column(prompt, np.int64),
        output=column(output, np.int64),
        priority=column(priority, np.int64),
        session=column(numbers if session is None else session, np.int64),
        held=column(held, np.int8),  # type: ignore[arg-type]
        replica=column(replica, np.int64),
        adapter=column(adapter, np.int64),
        skips_lookup=column(skips_lookup, np.int8),  # type: ignore[arg-type]
        chain_starts=starts,
        chain=keys,
        hash_tokens=column(hash_tokens, np.int64),
        covered=column(covered, np.int64),
    )


def workload_of(
    requests: Iterable[RequestLike],
    *,
    held: bool = False,
    first_index: int = 0,
) -> Workload:
    """Turn request records, sorted by arrival, into arrays. A missing session is a session of its own."""
    rows = list(requests)
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row.block_hashes) for row in rows], out=starts[1:])
    chain = np.fromiter((key for row in rows for key in row.block_hashes), np.uint64, count=int(starts[-1]))
    sessions: dict[str, int] = {}
    return make_workload(
        [row.time_seconds for row in rows],
        [row.prompt_tokens for row in rows],
        [row.output_tokens for row in rows],
        chain=chain,
        chain_starts=starts,
        hash_tokens=[row.block_tokens or 0 for row in rows],
        covered=[covered_tokens(row) for row in rows],
        priority=[row.priority for row in rows],
        session=[
            -1 - number if row.session is None else sessions.setdefault(row.session, len(sessions))
            for number, row in enumerate(rows, first_index)
        ],
        held=int(held),
        adapter=[adapter_identity(row.adapter) for row in rows],
        skips_lookup=[row.skip_reading_prefix_cache for row in rows],
        index=np.arange(first_index, first_index + len(rows)),
    )


def take_rows(workload: Workload, rows: npt.NDArray[np.int64]) -> Workload:
    """The workload of these rows, in this order."""
    starts = workload.chain_starts
    lengths = starts[rows + 1] - starts[rows]
    chain_starts = np.zeros(rows.size + 1, np.int64)
    np.cumsum(lengths, out=chain_starts[1:])
    picks = np.repeat(starts[rows] - chain_starts[:-1], lengths) + np.arange(int(chain_starts[-1]))
    columns = {
        name: column[rows] for name, column in workload._asdict().items() if name not in ("chain", "chain_starts")
    }
    return Workload(chain=workload.chain[picks], chain_starts=chain_starts, **columns)


def writable(workload: Workload) -> Workload:
    """The workload with copies of the columns that may only be read, as Ray's are: kernels are compiled for the others.

    They only write arrivals and deliveries.
    """
    columns = workload._asdict().items()
    return workload._replace(**{name: column.copy() for name, column in columns if not column.flags.writeable})


def concatenate(first: Workload, second: Workload) -> Workload:
    """One workload after the other. Raises ValueError if the second does not start where the first ends or later."""
    if first.delivered.size and second.delivered.size and second.delivered[0] < first.delivered[-1]:
        raise ValueError("the second workload begins before the first ends")
    columns = {
        name: np.concatenate([column, getattr(second, name)])
        for name, column in first._asdict().items()
        if name != "chain_starts"
    }
    starts = np.concatenate([first.chain_starts, second.chain_starts[1:] + first.chain_starts[-1]])
    return Workload(chain_starts=starts, **columns)


def adapter_identity(name: str | None) -> int:
    """A number for a LoRA adapter, the same in every process; 0 for none."""
    if name is None:
        return 0
    return 1 + int.from_bytes(blake2b(name.encode(), digest_size=7).digest())


def covered_tokens(request: RequestLike) -> int:
    """Leading tokens of a request whose content its hashes identify."""
    if not request.block_hashes or not request.block_tokens:
        return 0
    hashed = len(request.block_hashes) * request.block_tokens
    known = request.prompt_tokens + (request.output_tokens if request.hashes_cover_output else 0)
    return min(hashed, known)
