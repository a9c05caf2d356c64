"""From the readings of one scrape of one vLLM server to a sample of each of its engines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from connectors.prometheus.names import Place, is_bare, model_of, place_of, rank_of
from connectors.prometheus.readings import Reading, Reject
from kavier_twin.telemetry import EngineSample, Histogram
from kavier_twin.telemetry.records import FARTHEST_SECONDS


def engine_samples(
    readings: Iterable[Reading],
    reject: Reject,
    *,
    time_seconds: float,
    pool: str,
    namespace: str,
    pod: str,
    spot: str = "",
    prefix: str = "",
) -> list[EngineSample]:
    """A sample of each engine (data-parallel rank and served model) among the readings.

    `spot` tells this server from others in the same pod, `prefix` is one more that stands for `vllm:`. Where models
    share a rank, all but the first have their name in `engine`: `0@model`.

    What the server counts for all its engines together (its start aside, which is every engine's) goes to the first,
    so that sums over engines are right. Series that differ in labels unknown here are added. Where a server reports
    a quantity under an old and a new name, the new one counts. Rejects values that are not finite or below zero
    ("bad-value") and histograms without sum or count ("incomplete-histogram").
    """
    engines: dict[tuple[str, str], _Engine] = {}
    started: list[tuple[int, float]] = []
    known = [(place, reading) for reading in readings if (place := place_of(reading.name, prefix)) is not None]
    if not _are_an_engines(known, prefix):
        return []
    for place, reading in known:
        if _is_a_routers(reading):
            continue
        limit = reading.labels.get("le") if place.part == "bucket" else None
        if not _good(place, reading.value) or (place.part == "bucket" and not _is_limit(limit)):
            reject("bad-value")
        elif place.part == "started":
            started.append((place.age, reading.value))
        else:
            key = (rank_of(reading.labels), model_of(reading.labels))
            engines.setdefault(key, _Engine()).take(place, reading)
    for rank, model in list(engines):
        if not model and (alike := [key for key in engines if key[0] == rank and key[1]]):
            engines[min(alike)].add(engines.pop((rank, model)))
    shared = [key for key in engines if not key[0]]
    named = sorted((key for key in engines if key[0]), key=_by_rank)
    for key in shared if named else []:
        first = next((other for other in named if other[1] == key[1]), named[0])
        engines[first].add(engines.pop(key))
    # The oldest of what was created first: a counter may be made long after its process.
    start = min(started)[1] if started else None
    found: dict[str, EngineSample] = {}
    for (rank, model), engine in sorted(engines.items(), key=lambda item: _by_rank(item[0])):
        name = f"{rank}@{spot}" if spot else rank
        if name in found:
            name = f"{name}@{model}"
        found[name] = EngineSample(
            time_seconds=time_seconds,
            pool=pool,
            namespace=namespace,
            pod=pod,
            engine=name,
            model=model or None,
            started_seconds=start,
            **engine.fields(reject),
        )
    return list(found.values())


_LARGEST: Final = 1e100  # far beyond what an engine counts; sums of values up to this are finite


@dataclass
class _Engine:
    """What was read of one engine so far, by field and age of the name."""

    values: dict[tuple[str, int], float] = field(default_factory=dict)
    labelled: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    histograms: dict[tuple[str, int], _Parts] = field(default_factory=dict)

    def take(self, place: Place, reading: Reading) -> None:
        key = (place.field, place.age)
        if place.part == "value":
            self._value(key, reading.value)
        elif place.part == "labelled":
            entries = self.labelled.setdefault(key, {})
            entry = reading.labels.get(place.label, "")
            entries[entry] = entries.get(entry, 0.0) + reading.value
        else:
            parts = self.histograms.setdefault(key, _Parts())
            if place.part == "bucket":
                limit = float(reading.labels["le"])
                parts.buckets[limit] = parts.buckets.get(limit, 0.0) + reading.value
            elif place.part == "sum":
                parts.sums.append(reading.value)
            else:
                parts.counts.append(reading.value)

    def add(self, other: _Engine) -> None:
        """Take over what the server counts without naming an engine."""
        for key, value in other.values.items():
            self._value(key, value)
        for labelled, entries in other.labelled.items():
            mine = self.labelled.setdefault(labelled, {})
            for entry, value in entries.items():
                mine[entry] = mine.get(entry, 0.0) + value
        for key, parts in other.histograms.items():
            self.histograms.setdefault(key, parts)

    def _value(self, key: tuple[str, int], value: float) -> None:
        known = self.values.get(key)
        if known is None:
            self.values[key] = value
        else:
            self.values[key] = max(known, value) if key[0].endswith("_ratio") else known + value

    def fields(self, reject: Reject) -> dict[str, Any]:
        # Oldest names first, so that newer ones replace them.
        found: dict[str, Any] = {}
        for (name, _), value in sorted(self.values.items(), key=lambda item: -item[0][1]):
            found[name] = value
        for (name, _), entries in sorted(self.labelled.items(), key=lambda item: -item[0][1]):
            found[name] = entries
        for (name, _), parts in sorted(self.histograms.items(), key=lambda item: -item[0][1]):
            histogram = parts.histogram()
            if histogram is None:
                reject("incomplete-histogram")
            else:
                found[name] = histogram
        return found


@dataclass
class _Parts:
    """The series of one histogram."""

    buckets: dict[float, float] = field(default_factory=dict)
    sums: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)

    def histogram(self) -> Histogram | None:
        if not self.sums or not self.counts:
            return None
        finite = {limit: count for limit, count in sorted(self.buckets.items()) if math.isfinite(limit)}
        return Histogram(buckets=finite, sum=sum(self.sums), count=sum(self.counts))


def _are_an_engines(known: Sequence[tuple[Place, Reading]], prefix: str) -> bool:
    """Names without a prefix, such as `prompt_tokens_total`, are an engine's where its running requests are told."""
    named = [(place, reading) for place, reading in known if place.part != "started"]
    return any(place.field == "requests_running" or not is_bare(reading.name, prefix) for place, reading in named)


def _is_a_routers(reading: Reading) -> bool:
    """The router of vLLM's production-stack uses names of the engine's, with a label `server` and without a model."""
    return "server" in reading.labels and not model_of(reading.labels)


def _good(place: Place, value: float) -> bool:
    if place.part == "started" and value > FARTHEST_SECONDS:
        return False
    return 0.0 <= value <= _LARGEST and not (place.field.endswith("_ratio") and value > 1.0)


def _is_limit(text: str | None) -> bool:
    try:
        return text is not None and float(text) >= 0.0
    except ValueError:
        return False


def _by_rank(key: tuple[str, str]) -> tuple[int, str, str]:
    return (int(key[0]) if key[0].isdigit() else -1, *key)
