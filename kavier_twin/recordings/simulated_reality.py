"""A simulated fleet as reality: what its requests, engines and GPUs tell, for a trace that measured none of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from kavier_twin.mirror.calibration.requests import with_frontend
from kavier_twin.scores.readings import EngineReading, GpuReading, Reading
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.power import Reading as Work
from kavier_twin.simulation.power import energy, phase_seconds
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import FINISHED, ITL_BIN_RATIO, ITL_BINS, ITL_SMALLEST_SECONDS
from kavier_twin.simulation.workload import workload_of
from kavier_twin.telemetry import RequestRecord

READ_EVERY_SECONDS: Final = 5.0
_BINS_JOINED: Final = 4  # of the simulation's histogram of inter-token latencies: 8 % wide
_ENDS: Final = np.arange(_BINS_JOINED, ITL_BINS + 1, _BINS_JOINED)
_LIMITS: Final = tuple((ITL_SMALLEST_SECONDS * ITL_BIN_RATIO**_ENDS).tolist())


def simulated_reality(
    records: Sequence[RequestRecord], settings: FleetSettings, frontend_seconds: float
) -> tuple[list[RequestRecord], list[tuple[str, Reading]]]:
    """The requests with what the simulated fleet makes of them, without those that it refuses; and what its engines
    and GPUs would tell, in order of time, each with its name."""
    if not records:
        return [], []
    workload = with_frontend(workload_of(records), frontend_seconds)
    fleet = Fleet(settings, start_seconds=float(workload.arrival[0]))
    fleet.feed(workload)
    readings: list[tuple[str, Reading]] = []
    joules, before = 0.0, Work.of(fleet.state, fleet.now_seconds)
    last = max(record.time_seconds for record in records)
    for time in np.arange(records[0].time_seconds, last + READ_EVERY_SECONDS, READ_EVERY_SECONDS):
        fleet.run(float(time))
        readings += _engines(fleet)
        if settings.footprint is not None:
            now = Work.of(fleet.state, fleet.now_seconds)
            gpus, alive = settings.footprint.gpus_per_replica, now.alive_seconds - before.alive_seconds
            joules += gpus * sum(
                energy(settings.footprint.power, alive, phase_seconds(before, now, settings.step_time))
            )
            readings.append(("gpus", GpuReading(fleet.now_seconds, math.nan, joules)))
            before = now
    fleet.run()
    return _told(records, fleet, frontend_seconds), readings


def _engines(fleet: Fleet) -> Iterator[tuple[str, EngineReading]]:
    state = fleet.state
    for number in np.flatnonzero(state.replicas["alive"]):
        replica, usable = state.replicas[number], int(state.engines["num_blocks"][number]) - 1
        counts = np.cumsum(state.itl_counts[number])
        yield (
            str(number),
            EngineReading(
                fleet.now_seconds,
                float(replica["running"]),
                float(replica["waiting"] + replica["loading"]),
                1.0 - float(replica["free_blocks"]) / max(usable, 1),
                float(replica["preemptions"]),
                _LIMITS,
                (*counts[_ENDS - 1].tolist(), float(counts[-1])),
            ),
        )


def _told(records: Sequence[RequestRecord], fleet: Fleet, frontend_seconds: float) -> list[RequestRecord]:
    outcomes, found = fleet.collect(), []
    for outcome in outcomes[np.argsort(outcomes["index"], kind="stable")]:
        if outcome["status"] == FINISHED:
            arrival = float(outcome["arrival"])
            told = {
                "ttft_seconds": float(outcome["first_token"]) - arrival,
                "e2e_seconds": float(outcome["finish"]) - arrival,
                "queue_seconds": max(0.0, float(outcome["scheduled"]) - arrival - frontend_seconds),
                "cached_tokens": int(outcome["cached"]),
                "output_tokens": int(outcome["output"]),
                "pod": str(int(outcome["replica"])),
            }
            found.append(records[int(outcome["index"])].model_copy(update=told))
    return found
