"""A simulated run as a workload of OpenDC: `tasks.parquet` and `fragments.parquet`.

A task is a request that a replica served. It is submitted when the replica first scheduled it (its queue time is past:
OpenDC is not to make it wait again) and lasts until its last token. Its fragments are its prefill (until the first
token) and its decode. A replica is one GPU of REPLICA_MHZ; a fragment uses the request's share of it: while n requests
run there, each has 1/n. Over all tasks that is exactly the time in which the replica had something to run, but for the
rounding of times to OpenDC's milliseconds. Requests that were rejected or lost are no tasks.

Schema: OpenDC, opendc-trace-api, formats/workload/parquet/TaskSchemas.kt (V4) and FragmentSchemas.kt (V2; `cpu_count`
and `gpu_count` of V1 are there too, which older versions ask for and newer ones pass over).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kavier_twin.errors import UserError
from kavier_twin.simulation.state import FINISHED, Records

REPLICA_MHZ: Final = 1000.0  # what a whole replica is in OpenDC's unit: the topology's GPU must have as much
CPU_MHZ: Final = 1000.0  # a request asks for one core and leaves it idle: the GPU does the work, as in Kavier's export

Floats = npt.NDArray[np.float64]


def write_opendc(directory: Path, outcomes: Records) -> tuple[int, int]:
    """Write both files into `directory`, made if it is not there. Returns the numbers of tasks and fragments.

    Raises UserError without pyarrow, or if the files cannot be written.
    """
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError("--export opendc needs pyarrow; install it with: pip install 'kavier-twin[opendc]'") from None
    tasks, fragments = _tables(arrow, outcomes)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, table in (("tasks", tasks), ("fragments", fragments)):
            part = directory / f"{name}.parquet.part"
            parquet.write_table(table, part)
            os.replace(part, directory / f"{name}.parquet")
    except OSError as error:
        raise UserError(f"--export opendc {directory}: {error.strerror}") from None
    return tasks.num_rows, fragments.num_rows


def _tables(arrow: Any, outcomes: Records) -> tuple[Any, Any]:
    done = outcomes[outcomes["status"] == FINISHED]
    done = done[np.lexsort((done["index"], done["scheduled"]))]
    ids = done["index"].astype(np.int32)
    edges = np.stack([done["scheduled"], done["first_token"], done["finish"]])  # [3, n] seconds
    shares = _shares(done["replica"], edges)
    milliseconds = np.rint(edges * 1000.0).astype(np.int64)
    milliseconds[2] = np.maximum(milliseconds[2], milliseconds[0] + 1)  # nothing lasts 0 ms in OpenDC
    lengths = np.diff(milliseconds, axis=0)  # [2, n] prefill and decode
    kept = lengths.T.ravel() > 0
    duration = milliseconds[2] - milliseconds[0]
    count = done.size

    def field(name: str, kind: Any) -> Any:
        return arrow.field(name, kind, nullable=False)

    tasks = arrow.table(
        [
            ids,
            arrow.array(milliseconds[0]).cast(arrow.timestamp("ms", tz="UTC")),
            duration,
            np.ones(count, np.int32),
            np.full(count, CPU_MHZ),
            np.zeros(count, np.int64),
            np.ones(count, np.int32),
            np.full(count, REPLICA_MHZ),
            (lengths > 0).sum(axis=0).astype(np.int32),
        ],
        schema=arrow.schema(
            [
                field("id", arrow.int32()),
                field("submission_time", arrow.timestamp("ms", tz="UTC")),  # time 0 of the run is 1970-01-01
                field("duration", arrow.int64()),  # milliseconds
                field("cpu_count", arrow.int32()),
                field("cpu_capacity", arrow.float64()),  # MHz
                field("mem_capacity", arrow.int64()),  # host memory: none; OpenDC has no GPU memory
                field("gpu_count", arrow.int32()),
                field("gpu_capacity", arrow.float64()),  # MHz
                field("num_fragments", arrow.int32()),
            ]
        ),
    )
    rows = int(kept.sum())
    fragments = arrow.table(
        [
            np.repeat(ids, 2)[kept],
            lengths.T.ravel()[kept],
            np.ones(rows, np.int32),
            np.zeros(rows),
            np.ones(rows, np.int32),
            REPLICA_MHZ * shares.T.ravel()[kept],
        ],
        schema=arrow.schema(
            [
                field("id", arrow.int32()),
                field("duration", arrow.int64()),  # milliseconds
                field("cpu_count", arrow.int32()),
                field("cpu_usage", arrow.float64()),  # MHz
                field("gpu_count", arrow.int32()),
                field("gpu_usage", arrow.float64()),  # MHz
            ]
        ),
    )
    return tasks, fragments


def _shares(replica: npt.NDArray[np.int32], edges: Floats) -> Floats:
    """[2, n] mean share of the replica between the `edges` [3, n], with 1/k for each while k requests run."""
    shares = np.zeros((2, edges.shape[1]))
    for number in np.unique(replica):
        rows = np.flatnonzero(replica == number)
        start, end = edges[0, rows], edges[2, rows]
        times = np.unique(np.concatenate([start, end]))
        running = np.cumsum(
            np.bincount(np.searchsorted(times, start), minlength=times.size)
            - np.bincount(np.searchsorted(times, end), minlength=times.size)
        )
        slices = np.diff(times) / np.maximum(running[:-1], 1)
        had = np.interp(edges[:, rows], times, np.concatenate([[0.0], np.cumsum(slices)]))  # a share of 1/k, integrated
        lengths = np.diff(edges[:, rows], axis=0)
        shares[:, rows] = np.divide(np.diff(had, axis=0), lengths, out=shares[:, rows], where=lengths > 0.0)
    return np.minimum(shares, 1.0)
