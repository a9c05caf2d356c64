"""What engines and GPUs said of themselves, as the KPIs of a stretch of time.

Between two readings a gauge is taken to move in a straight line and a counter evenly. What lies between readings
farther apart than `LONGEST_GAP_SECONDS` is not known, and a stretch of time of which less than `LEAST_KNOWN` is known
tells nothing: no figure is made up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.forecast.rows import Rows
from kavier_twin.simulation.kpi_table import GAUGES, KPIS, RATIO, Metric, share

Floats = npt.NDArray[np.float64]

LONGEST_GAP_SECONDS: Final = 90.0  # three of the longest scrape intervals that are common
LEAST_KNOWN: Final = 0.8


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


class Observed(NamedTuple):
    """What readings tell of a stretch of time. NaN: it was not observed."""

    kpis: dict[Metric, float]  # without those not observed
    watts: float  # of all GPU boards, mean
    replicas: float  # mean


class Readings:
    """What one pool's engines and GPUs said over the last while. Memory is bounded by `forget` and the spacing."""

    def __init__(self) -> None:
        self.spacing_seconds = 0.0  # readings of one engine that follow closer are left out
        self._engines: dict[str, _Series] = {}
        self._gpus: dict[str, _Series] = {}
        self._size: dict[str, _Series] = {}

    def add(self, name: str, reading: Reading) -> bool:
        """One of the engine or GPU of this name. False: it is left out, as one that is no later than the last."""
        if isinstance(reading, EngineReading):
            gauges, counters = reading[1:4], (reading.preemptions, *reading.itl_counts)
            return self._add(self._engines, name, reading.time_seconds, gauges, counters, reading.itl_limits)
        if isinstance(reading, GpuReading):
            return self._add(self._gpus, name, reading.time_seconds, (reading.watts,), (reading.joules,))
        return self._add(self._size, name, reading.time_seconds, (reading.replicas,), ())

    def forget(self, before_seconds: float) -> None:
        """Drop what was read before, but for what tells where the stretch after it begins."""
        for of in (self._engines, self._gpus, self._size):
            for name, series in list(of.items()):
                series.forget(before_seconds - LONGEST_GAP_SECONDS)
                if not len(series.rows):
                    del of[name]

    def complete(self, until_seconds: float) -> bool:
        """Whether every engine and GPU that was there lately has been read since: nothing until then will change."""
        lasts = [series.last_seconds for of in (self._engines, self._gpus) for series in of.values()]
        return not any(until_seconds - LONGEST_GAP_SECONDS < last < until_seconds for last in lasts)

    def measure(self, start_seconds: float, stop_seconds: float) -> Observed:
        """Of (start, stop]."""
        kpis: dict[Metric, float] = {}
        engines = _Stretch(self._engines.values(), start_seconds, stop_seconds)
        if engines.known:
            for column, name in enumerate(GAUGES):
                # The sum over the engines, or of a ratio the mean.
                seconds = engines.known_seconds if KPIS[name].unit == RATIO else engines.seconds
                kpis[name] = engines.gauge(column) / seconds
            kpis["preemptions"] = engines.risen(len(GAUGES))
            for metric, statistic in KPIS["itl_seconds"].metrics.items():
                kpis[metric] = engines.itl_quantile(share(statistic))
        kpis = {metric: value for metric, value in kpis.items() if not math.isnan(value)}
        size = _Stretch(self._size.values(), start_seconds, stop_seconds)
        replicas = size.gauge(0) / size.known_seconds if size.known else math.nan
        if engines.known:
            replicas = engines.known_seconds / engines.seconds
        gpus = _Stretch(self._gpus.values(), start_seconds, stop_seconds)
        watts = math.nan
        if gpus.known:
            counted = gpus.risen(1) / gpus.seconds
            watts = counted if counted > 0.0 else gpus.gauge(0) / gpus.seconds
        return Observed(kpis, watts, replicas)

    def _add(
        self,
        of: dict[str, _Series],
        name: str,
        time_seconds: float,
        gauges: Sequence[float],
        counters: Sequence[float],
        limits: tuple[float, ...] = (),
    ) -> bool:
        found = of.get(name)
        if found is None or found.limits != limits:
            found = of[name] = _Series(1 + len(gauges) + len(counters), limits)
        if time_seconds <= found.last_seconds or time_seconds < found.last_seconds + self.spacing_seconds:
            return False
        found.add(time_seconds, gauges, np.array(counters))
        return True


class _Series:
    """Readings in order of time: a row has its time, its gauges, and how far each counter has risen since the first."""

    def __init__(self, width: int, limits: tuple[float, ...]) -> None:
        self.limits = limits
        self.rows = Rows(width)
        self.last_seconds = -math.inf
        self._counted: Floats | None = None
        self._risen: Floats = np.zeros(0)

    def add(self, time_seconds: float, gauges: Sequence[float], counters: Floats) -> None:
        if self._counted is None:
            self._risen = np.zeros(counters.size)
        else:
            # One that fell counts for another process, whose counters all began at zero.
            before = np.zeros(counters.size) if (counters < self._counted).any() else self._counted
            self._risen = self._risen + np.nan_to_num(counters - before)
        self._counted = counters
        self.rows.append((time_seconds, *gauges, *np.where(np.isnan(counters), np.nan, self._risen)))
        self.last_seconds = time_seconds

    def forget(self, before_seconds: float) -> None:
        self.rows.keep(self.rows.values[:, 0] >= before_seconds)


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

    def risen(self, column: int) -> float:
        """By how much a counter rose, summed over the series; NaN where one does not tell it."""
        return float(sum(self._risen(one, 1 + column) for one in self._series))

    def itl_quantile(self, share: float) -> float:
        """Of all inter-token latencies in between, straight lines within buckets, as PromQL's `histogram_quantile`."""
        limits = {one.limits for one in self._series}
        if len(limits) != 1 or limits == {()}:
            return math.nan
        (edges,) = limits
        first = 1 + 4
        counts = np.array([sum(self._risen(one, first + n) for one in self._series) for n in range(len(edges) + 1)])
        counts = np.maximum.accumulate(counts)
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

    def _risen(self, one: _Series, column: int) -> float:
        rows = one.rows.values
        told = np.isfinite(rows[:, column])
        if not told.any():
            return math.nan
        first, last = np.interp((self._start, self._stop), rows[told, 0], rows[told, column])
        return float(last - first)


def _overlap(time: Floats, start: float, stop: float) -> float:
    """Seconds from the first reading to the last that lie in (start, stop]."""
    return float(min(time[-1], stop) - max(time[0], start)) if time.size > 1 else 0.0
