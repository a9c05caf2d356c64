"""What engines and GPUs said of themselves, as the KPIs of a stretch of time.

Between two readings a gauge is taken to move in a straight line and a counter evenly. What lies between readings
farther apart than `LONGEST_GAP_SECONDS` is not known, and a stretch of time of which less than `LEAST_KNOWN` is known
tells nothing: no figure is made up. What is kept depends on the readings alone, not on the order in which they come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.kpi_table import GAUGES, KPIS, RATIO, Metric, share

Floats = npt.NDArray[np.float64]

LONGEST_GAP_SECONDS: Final = 90.0  # three of the longest scrape intervals that are common
LEAST_KNOWN: Final = 0.8
_FIRST_ROWS: Final = 64


class EngineReading(NamedTuple):
    """One engine at one moment of event time; NaN for what it does not tell.

    `preemptions` and `itl_counts` count since its process began: of inter-token latencies those at or below each of
    `itl_limits` (seconds, ascending) and, last, all of them.
    """

    time_seconds: float
    running: float
    waiting: float
    kv_usage_ratio: float
    preemptions: float
    itl_limits: tuple[float, ...] = ()
    itl_counts: tuple[float, ...] = ()


class GpuReading(NamedTuple):
    """One GPU board at one moment; NaN for what it does not tell. `joules` counts since its driver was loaded."""

    time_seconds: float
    watts: float
    joules: float


class SizeReading(NamedTuple):
    """So many replicas from this moment on, as far as the twin knows."""

    time_seconds: float
    replicas: float


Reading = EngineReading | GpuReading | SizeReading
_COUNTERS_FROM: Final[Mapping[type[Reading], int]] = {EngineReading: 4, GpuReading: 2, SizeReading: 2}  # column


class Observed(NamedTuple):
    """What readings tell of a stretch of time. NaN: it was not observed."""

    kpis: dict[Metric, float]  # without those not observed
    watts: float  # of all GPU boards, mean
    replicas: float  # mean


class Readings:
    """What one pool's engines and GPUs said over the last while. Memory is bounded by `forget` and the spacing."""

    def __init__(self) -> None:
        self.spacing_seconds = 0.0  # of an engine's readings, only the first in each such stretch of time is kept
        # By kind, name and, for engines, the limits of their histogram.
        self._series: dict[type[Reading], dict[tuple[str, tuple[float, ...]], _Series]] = {
            kind: {} for kind in _COUNTERS_FROM
        }

    def add(self, name: str, reading: Reading) -> None:
        """One of the engine or GPU of this name."""
        kind = type(reading)
        row: tuple[float, ...]
        limits: tuple[float, ...] = ()
        if isinstance(reading, EngineReading):
            row, limits = (*reading[:5], *reading.itl_counts), reading.itl_limits
        else:
            row = tuple(reading)
        series = self._series[kind].get((name, limits))
        if series is None:
            series = self._series[kind][name, limits] = _Series(limits, Rows(len(row)), _COUNTERS_FROM[kind])
        series.add(row, self.spacing_seconds)

    def save(self) -> tuple[dict[str, Any], dict[str, Floats]]:
        """As JSON types, and arrays by name."""
        series = [(kind.__name__, *key, one) for kind, of in self._series.items() for key, one in of.items()]
        arrays = {f"readings {number}": one.rows.values.copy() for number, (*_, one) in enumerate(series)}
        return {"spacing_seconds": self.spacing_seconds, "series": [one[:3] for one in series]}, arrays

    def restore(self, document: Mapping[str, Any], arrays: Mapping[str, Floats]) -> None:
        """What `save` gave."""
        self.spacing_seconds = document["spacing_seconds"]
        kinds = {kind.__name__: kind for kind in _COUNTERS_FROM}
        for number, (name_of_kind, name, limits) in enumerate(document["series"]):
            kind, rows = kinds[name_of_kind], Rows.of(arrays[f"readings {number}"])
            self._series[kind][name, tuple(limits)] = _Series(tuple(limits), rows, _COUNTERS_FROM[kind])

    def forget(self, before_seconds: float) -> None:
        """Drop what was read before, but for what tells where the stretch after it begins."""
        for of in self._series.values():
            for key, series in list(of.items()):
                series.rows.keep(series.rows.values[:, 0] >= before_seconds - LONGEST_GAP_SECONDS)
                if not len(series.rows):
                    del of[key]

    def complete(self, until_seconds: float) -> bool:
        """Whether every engine and GPU that was there lately has been read since: nothing until then will change."""
        heard = self._series[EngineReading], self._series[GpuReading]
        lasts = [series.rows.values[-1, 0] for of in heard for series in of.values()]
        return not any(until_seconds - LONGEST_GAP_SECONDS < last < until_seconds for last in lasts)

    def measure(self, start_seconds: float, stop_seconds: float) -> Observed:
        """Of (start, stop]."""
        kpis: dict[Metric, float] = {}
        engines = _Stretch(self._series[EngineReading].values(), start_seconds, stop_seconds)
        if engines.known:
            for column, name in enumerate(GAUGES):
                # The sum over the engines, or of a ratio the mean.
                seconds = engines.known_seconds if KPIS[name].unit == RATIO else engines.seconds
                kpis[name] = engines.gauge(column) / seconds
            kpis["preemptions"] = engines.risen(0)
            for metric, statistic in KPIS["itl_seconds"].metrics.items():
                kpis[metric] = engines.itl_quantile(share(statistic))
        kpis = {metric: value for metric, value in kpis.items() if not math.isnan(value)}
        size = _Stretch(self._series[SizeReading].values(), start_seconds, stop_seconds)
        replicas = size.gauge(0) / size.known_seconds if size.known else math.nan
        if engines.known:
            replicas = engines.known_seconds / engines.seconds
        gpus = _Stretch(self._series[GpuReading].values(), start_seconds, stop_seconds)
        watts = math.nan
        if gpus.known:
            counted = gpus.risen(0) / gpus.seconds
            watts = counted if counted > 0.0 else gpus.gauge(0) / gpus.seconds
        return Observed(kpis, watts, replicas)


class Rows:
    """Rows of so many numbers."""

    def __init__(self, width: int) -> None:
        self._table = np.zeros((_FIRST_ROWS, width))
        self._count = 0

    @classmethod
    def of(cls, values: Floats) -> Rows:
        """These rows."""
        found = cls(values.shape[1])
        found._table, found._count = values.copy(), values.shape[0]
        return found

    def __len__(self) -> int:
        return self._count

    @property
    def values(self) -> Floats:
        """[rows, width]; not to be kept beyond the next change."""
        return self._table[: self._count]

    def append(self, row: Sequence[float]) -> None:
        """One more at the end."""
        if self._count == self._table.shape[0]:
            self._table = np.concatenate([self._table, np.zeros((self._count + _FIRST_ROWS, self._table.shape[1]))])
        self._table[self._count] = row
        self._count += 1

    def insert(self, place: int, row: Sequence[float]) -> None:
        """One more before the row at this place."""
        self.append(row)
        self._table[place + 1 : self._count] = self._table[place : self._count - 1].copy()
        self._table[place] = row

    def keep(self, kept: npt.NDArray[np.bool_]) -> None:
        """Only those rows."""
        if kept.all():
            return
        found = self.values[kept]
        spare = np.zeros((max(_FIRST_ROWS, found.shape[0] // 4), found.shape[1]))
        self._table, self._count = np.concatenate([found, spare]), found.shape[0]


class _Series:
    """Readings in order of time: a row has its time, its gauges and its counters as they were read."""

    def __init__(self, limits: tuple[float, ...], rows: Rows, counters_from: int) -> None:
        self.limits = limits
        self.rows = rows
        self._counters_from = counters_from

    def add(self, row: Sequence[float], spacing_seconds: float) -> None:
        times = self.rows.values[:, 0]
        # Nearly always it is the newest.
        place = times.size if not times.size or row[0] > times[-1] else int(np.searchsorted(times, row[0]))
        if place < times.size and times[place] == row[0]:
            return
        if spacing_seconds > 0.0:
            stretch = math.floor(row[0] / spacing_seconds)
            if place > 0 and math.floor(times[place - 1] / spacing_seconds) == stretch:
                return
            if place < times.size and math.floor(times[place] / spacing_seconds) == stretch:
                self.rows.values[place] = row
                return
        self.rows.insert(place, row)

    def risen(self) -> Floats:
        """How far each counter has risen since the first row; NaN where it is not told."""
        counters = self.rows.values[:, self._counters_from :]
        # One that fell counts for another process, whose counters all began at zero.
        anew = (counters[1:] < counters[:-1]).any(axis=1, keepdims=True)
        rises = np.nan_to_num(counters[1:] - np.where(anew, 0.0, counters[:-1]))
        total = np.concatenate([np.zeros((1, counters.shape[1])), np.cumsum(rises, axis=0)])
        return np.where(np.isnan(counters), np.nan, total)


class _Stretch:
    """Several series over (start, stop]. Columns are counted after the time."""

    def __init__(self, series: Iterable[_Series], start: float, stop: float) -> None:
        self.seconds = max(stop - start, 1e-12)
        self._start, self._stop = start, stop
        spans = {one: span for one in series if (span := _overlap(one.rows.values[:, 0], start, stop)) > 0.0}
        self._series = list(spans)
        known = [self._integral(one, lambda rows: np.ones(len(rows))) for one in self._series]
        self.known_seconds = sum(known)
        # Engines come and go; but one that is silent between two readings was there, and what it did is missing.
        silent = any(seconds < LEAST_KNOWN * span for seconds, span in zip(known, spans.values(), strict=True))
        self.known = max(known, default=0.0) >= LEAST_KNOWN * self.seconds and not silent

    def gauge(self, column: int) -> float:
        """Its integral over time, summed over the series; NaN where one does not tell it."""
        return sum(self._integral(one, lambda rows: rows[:, 1 + column]) for one in self._series)

    def risen(self, counter: int) -> float:
        """By how much a counter rose, summed over the series; NaN where one does not tell it."""
        return float(sum(rises[counter] for rises in self._rises))

    def itl_quantile(self, share: float) -> float:
        """Of all inter-token latencies in between, straight lines within buckets, as PromQL's `histogram_quantile`."""
        limits = {one.limits for one in self._series}
        if len(limits) != 1 or limits == {()}:
            return math.nan
        (edges,) = limits
        counts = np.maximum.accumulate(np.sum([rises[1:] for rises in self._rises], axis=0))
        if not counts[-1] > 0.0:
            return math.nan
        place = int(np.searchsorted(counts, share * counts[-1]))
        if place >= len(edges):
            return edges[-1]
        below, lower = (counts[place - 1], edges[place - 1]) if place else (0.0, 0.0)
        part = (share * counts[-1] - below) / (counts[place] - below)
        return float(lower + part * (edges[place] - lower))

    def _integral(self, one: _Series, of: Callable[[Floats], Floats]) -> float:
        rows = one.rows.values
        time, value = rows[:, 0], of(rows)
        clipped = np.clip(time, self._start, self._stop)
        at = np.interp(clipped, time, value)
        length = np.where(np.diff(time) <= LONGEST_GAP_SECONDS, np.diff(clipped), 0.0)
        inside = length > 0.0
        return float((0.5 * (at[1:] + at[:-1]) * length)[inside].sum())

    @cached_property
    def _rises(self) -> list[Floats]:
        """By how much each counter of each series rose; NaN where it is not told."""
        return [self._rise(one) for one in self._series]

    def _rise(self, one: _Series) -> Floats:
        time, totals = one.rows.values[:, 0], one.risen()
        found = np.full(totals.shape[1], np.nan)
        for column, total in enumerate(totals.T):
            told = np.isfinite(total)
            if told.any():
                found[column] = np.diff(np.interp((self._start, self._stop), time[told], total[told]))[0]
        return found


def _overlap(time: Floats, start: float, stop: float) -> float:
    """Seconds from the first reading to the last that lie in (start, stop]."""
    return float(min(time[-1], stop) - max(time[0], start)) if time.size > 1 else 0.0
