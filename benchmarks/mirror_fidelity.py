"""(h) The live mirror on recordings of a real vLLM: its errors where ends come in time, late or never.

Every record is offered when it would be known; each prediction is taken before the record that corrects it. Judged are
requests that ended in the last two thirds of a run, with what calibration had seen by then. The engine is as recorded;
step times start from a crude guess.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import report
from connectors.traces import read_trace
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.recordings.scenario import _engine
from kavier_twin.simulation.settings import CRUDE_STEP_TIME, FleetSettings
from kavier_twin.telemetry import RequestFinished, RequestRecord, RequestSeen

RECORDINGS = Path(__file__).parents[1] / "tests" / "data" / "recordings"
NAMES = ("chat-400", "chat-400-nocache", "ramp-300", "shift-300")
FATES = ((0.0, 0.0), (2.0, 0.0), (10.0, 0.0), (0.0, 0.05))  # seconds by which ends are late, share that never comes

Told = tuple[float, int, RequestSeen | RequestFinished]  # when, order, what


class Watched(Mirror):
    """A mirror that keeps every pair."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pairs: dict[str, list[tuple[float, float, float]]] = {}  # KPI -> event time, predicted, observed
        add = self.windows.add

        def keep(kpi: str, time_seconds: float, predicted: float, observed: float, weight: float = 1.0) -> None:
            self.pairs.setdefault(kpi, []).append((time_seconds, predicted, observed))
            add(kpi, time_seconds, predicted, observed, weight)

        self.windows.add = keep  # type: ignore[method-assign]


def told(records: Sequence[RequestRecord], late_seconds: float, never: float) -> list[Told]:
    """When each half of each record is known."""
    rng = random.Random(1)
    events: list[Told] = []
    for number, record in enumerate(records):
        events.append((record.time_seconds, 2 * number, record.seen()))
        finished = record.finished()
        if finished is not None and rng.random() >= never:
            events.append((finished.time_seconds + late_seconds, 2 * number + 1, finished))
    heapq.heapify(events)
    return [heapq.heappop(events) for _ in range(len(events))]


def follow(name: str, late_seconds: float = 0.0, never: float = 0.0) -> tuple[Watched, float, float]:
    """A mirror that has seen a whole recording, and when it began and ended."""
    trace = read_trace(RECORDINGS / name)
    fleet = FleetSettings(engine=_engine(trace.settings["engine"], name), step_time=CRUDE_STEP_TIME)
    mirror = Watched(MirrorSettings(), fleet)
    records = list(trace.records)
    for _, _, event in told(records, late_seconds, never):
        mirror.ingest(event)
        mirror.advance()
    mirror.advance(mirror.newest_seconds + mirror.settings.ordering_seconds)
    return mirror, records[0].time_seconds, max(r.time_seconds for r in records)


def errors(mirror: Watched, kpi: str, since: float) -> dict[str, float]:
    """Relative errors of mean and median, and the mean of each request's own error."""
    pairs = [pair[1:] for pair in mirror.pairs.get(kpi, []) if pair[0] >= since]
    found = np.array([pair for pair in pairs if all(map(math.isfinite, pair))])
    if not found.size:
        return {"mean": math.nan, "p50": math.nan, "each": math.nan}
    predicted, observed = found.T
    return {
        "mean": float(predicted.mean() / observed.mean() - 1),
        "p50": float(np.median(predicted) / np.median(observed) - 1),
        "each": float(np.abs(predicted - observed).mean() / observed.mean()),
    }


def main() -> None:
    """One row a recording and a fate of its ends."""
    rows = []
    for name in sys.argv[1:] or NAMES:
        for late_seconds, never in FATES:
            mirror, start, end = follow(name, late_seconds, never)
            since = start + (end - start) / 3
            ttft, e2e = errors(mirror, "ttft_seconds", since), errors(mirror, "e2e_seconds", since)
            tpot, hits = errors(mirror, "tpot_seconds", since), errors(mirror, "prefix_cache_hit_ratio", since)
            rows.append(
                {
                    "recording": name,
                    "ends late by s": late_seconds,
                    "ends lost": f"{never:.0%}",
                    "scored": sum(pair[0] >= since for pair in mirror.pairs.get("e2e_seconds", [])),
                    "TTFT mean": f"{ttft['mean']:+.1%}",
                    "TTFT p50": f"{ttft['p50']:+.1%}",
                    "TTFT each": f"{ttft['each']:.1%}",
                    "TPOT mean": f"{tpot['mean']:+.1%}",
                    "e2e mean": f"{e2e['mean']:+.1%}",
                    "e2e each": f"{e2e['each']:.1%}",
                    "hits": f"{hits['mean']:+.2%}",
                    "still running": mirror.load()[0],
                }
            )
    notes = "errors of predictions made before the record came; `each`: mean absolute error over the mean observed"
    report("(h) fidelity of the live mirror, last two thirds", rows, notes)


if __name__ == "__main__":
    main()
