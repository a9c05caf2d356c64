"""What engines say of themselves beside the mirror at the same event time: running, waiting, KV usage.

Samples come when somebody scraped them, often long after the stream has moved on. So the mirror's own gauges are kept
once a second for a while, and a sample is compared with those of its second, whenever it comes.
"""

from __future__ import annotations

import math
from collections import deque
from copy import copy
from typing import Any, Final, NamedTuple

from kavier_twin.simulation.kpi_table import GAUGES
from kavier_twin.telemetry import EngineSample

KEPT_SECONDS: Final = 300
WAITING_SAMPLES: Final = 10_000
# Sums of multiples of this are exact, so that the order in which samples come does not show in them.
_GRAIN: Final = 2.0**-20


class Pair(NamedTuple):
    """One gauge of one engine at a moment, as mirrored (the mean over its pool's replicas) and as reported."""

    kpi: str
    time_seconds: float
    mirrored: float
    observed: float
    engine: str = ""


class Gauges:
    """The mirror's gauges lately, by second, and the samples that wait for the mirror to come to their time."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[float, ...]] = {}  # second -> by GAUGES, oldest first
        self._waiting: deque[EngineSample] = deque(maxlen=WAITING_SAMPLES)

    def fork(self) -> Gauges:
        """An independent copy."""
        twin = copy(self)
        twin._kept, twin._waiting = self._kept.copy(), self._waiting.copy()
        return twin

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "kept": [[second, *values] for second, values in self._kept.items()],
            "waiting": [sample.model_dump(mode="json", exclude_defaults=True) for sample in self._waiting],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        self._kept = {second: tuple(values) for second, *values in saved["kept"]}
        self._waiting.extend(map(EngineSample.model_validate, saved["waiting"]))

    def record(self, second: int, load: tuple[float, float, float], replicas: int) -> None:
        """The mirrored pool at this second: running and waiting requests, KV usage (0..1)."""
        running, waiting, usage = load
        each = max(replicas, 1)
        self._kept[second] = tuple(_grains(value) for value in (running / each, waiting / each, usage))
        while len(self._kept) > KEPT_SECONDS:
            del self._kept[next(iter(self._kept))]

    def offer(self, sample: EngineSample) -> None:
        """A sample, at whatever time it was taken."""
        self._waiting.append(sample)

    def due(self, now_seconds: float) -> list[Pair]:
        """Comparisons of the samples that the mirror has come to; those older than what is kept are let go."""
        pairs: list[Pair] = []
        waiting: deque[EngineSample] = deque(maxlen=WAITING_SAMPLES)
        for sample in self._waiting:
            if sample.time_seconds > now_seconds:
                waiting.append(sample)
                continue
            mirrored = self._kept.get(math.floor(sample.time_seconds + 0.5)) or self._kept.get(
                math.floor(sample.time_seconds)
            )
            if mirrored is None:
                continue
            reported = [getattr(sample, name) for name in GAUGES]
            engine = f"{sample.namespace}/{sample.pod}/{sample.engine}"
            pairs += [
                Pair(kpi, sample.time_seconds, ours, _grains(theirs), engine)
                for kpi, ours, theirs in zip(GAUGES, mirrored, reported, strict=True)
                if theirs is not None
            ]
        self._waiting = waiting
        return pairs


def _grains(value: float) -> float:
    return round(value / _GRAIN) * _GRAIN
