"""Predictions compared with what was observed, over windows of event time, per KPI, in bounded memory.

A window is made of buckets, of a minute unless told otherwise. They hold sums and, for latencies, counts in bins whose
edges grow by 2 %, so that a quantile is exact to 1 % (DDSketch; Masson, Rim, Lee 2019).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, NamedTuple

from pydantic import Field

from kavier_twin.simulation.kpi_table import KPIS, LATENCIES, RATES, share
from kavier_twin.simulation.plain import Figure

WINDOWS: Final = {"5m": 300.0, "1h": 3600.0}  # seconds of event time
BUCKET_SECONDS: Final = 60.0

_BIN_RATIO: Final = 1.02
_SMALLEST_SECONDS: Final = 1e-6
_KEPT_SECONDS: Final = max(WINDOWS.values())
_PREDICTED, _OBSERVED = 0, 1


@dataclass(frozen=True)
class WindowScore:
    """One statistic of a KPI over a window of event time, predictions made before the end was known."""

    kpi: Annotated[str, Field(examples=["ttft_seconds"])]
    statistic: Annotated[
        str, Field(description="Statistic of a latency (mean, p50, ...); otherwise empty.", examples=["mean"])
    ]
    window: Annotated[str, Field(examples=["5m"])]
    observations: Annotated[
        int, Field(description="Number of requests, or samples of the engines' gauges.", examples=[412])
    ]
    predicted: Annotated[Figure, Field(examples=[0.12])]
    observed: Annotated[Figure, Field(examples=[0.11])]
    error: Annotated[
        Figure,
        Field(description="(predicted - observed) / observed; predicted - observed for ratios.", examples=[0.09]),
    ]


def find_score(scores: Iterable[WindowScore], kpi: str, statistic: str = "") -> WindowScore | None:
    """That of a KPI over the shortest window that has it."""
    return next((score for score in scores if (score.kpi, score.statistic) == (kpi, statistic)), None)


class Stretch(NamedTuple):
    """One bucket: (KPI, statistic) -> (predicted, observed) of what ended, or was sampled, up to `until_seconds`."""

    until_seconds: float
    values: Mapping[tuple[str, str], tuple[float, float]]


@dataclass
class _Sums:
    """What a bucket holds of one KPI; lists and counters: predicted, observed."""

    count: int = 0
    weight: float = 0.0
    exact: int = 0  # pairs whose values are equal
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    bins: tuple[Counter[int], Counter[int]] = field(default_factory=lambda: (Counter(), Counter()))

    def save(self) -> list[Any]:
        return [self.count, self.weight, self.exact, self.sums, *(list(side.items()) for side in self.bins)]

    def take(self, other: _Sums) -> _Sums:
        self.count += other.count
        self.weight += other.weight
        self.exact += other.exact
        for side in (_PREDICTED, _OBSERVED):
            self.sums[side] += other.sums[side]
            self.bins[side].update(other.bins[side])
        return self


class Windows:
    """The last hour of every KPI, and its scores over each window. The same pairs in the same order, the same bits."""

    def __init__(self, bucket_seconds: float = BUCKET_SECONDS) -> None:
        self._bucket_seconds = bucket_seconds
        self._kept = int(_KEPT_SECONDS / bucket_seconds) + 1
        self._buckets: dict[int, dict[str, _Sums]] = {}
        self._own: set[int] = set()  # buckets that no fork shares
        self._whole: dict[int, Stretch] = {}  # of buckets that are over, until they are added to
        self._since_seconds = math.inf

    def fork(self) -> Windows:
        """An independent copy; buckets are copied when one side adds to them."""
        twin = copy(self)
        twin._buckets = self._buckets.copy()
        self._own, twin._own = set(), set()
        twin._whole = {}
        return twin

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "since_seconds": self._since_seconds,
            "buckets": [
                [number, [[kpi, *sums.save()] for kpi, sums in bucket.items()]]
                for number, bucket in self._buckets.items()
            ],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        self._since_seconds = saved["since_seconds"]
        for number, entries in saved["buckets"]:
            self._buckets[number] = {
                kpi: _Sums(count, weight, exact, list(sums), (Counter(dict(predicted)), Counter(dict(observed))))
                for kpi, count, weight, exact, sums, predicted, observed in entries
            }
        self._own = set(self._buckets)

    def add(self, kpi: str, time_seconds: float, predicted: float, observed: float, weight: float = 1.0) -> None:
        """A pair of values that belong to this event time; ignored if anything is not finite.

        Of a ratio that is a quotient of sums, `weight` is the denominator's part and the values are the numerators'.
        """
        if not (math.isfinite(predicted) and math.isfinite(observed)):
            return
        sums = self._sums(kpi, time_seconds)
        if sums is None:
            return
        sums.count += 1
        sums.weight += weight
        sums.exact += predicted == observed
        for side, value in ((_PREDICTED, predicted), (_OBSERVED, observed)):
            sums.sums[side] += value
            if kpi in LATENCIES:
                sums.bins[side][_bin(value)] += 1

    def add_end(self, predicted_seconds: float, observed_seconds: float, output_tokens: int) -> None:
        """A request ended, and when it was to end (NaN: later than it did). Both count where their time is."""
        for kpi, amount in zip(RATES, (1.0, float(output_tokens)), strict=True):
            observed = self._sums(kpi, observed_seconds)
            if observed is not None:
                observed.count += 1
                observed.sums[_OBSERVED] += amount
            predicted = self._sums(kpi, predicted_seconds) if math.isfinite(predicted_seconds) else None
            if predicted is not None:
                predicted.sums[_PREDICTED] += amount

    def scores(self, now_seconds: float) -> tuple[WindowScore, ...]:
        """Every statistic of every KPI that was observed within a window that ends now."""
        found: list[WindowScore] = []
        for window, seconds in WINDOWS.items():
            first, last = self._bucket(now_seconds - seconds), self._bucket(now_seconds)
            merged: dict[str, _Sums] = {}
            for number, bucket in self._buckets.items():
                if first <= number <= last:
                    for kpi, sums in bucket.items():
                        if number < last or kpi not in RATES:
                            merged.setdefault(kpi, _Sums()).take(sums)
            # Rates are those of whole buckets: of the last one, requests to end later than now are counted already.
            covered = last * self._bucket_seconds - max(self._since_seconds, first * self._bucket_seconds)
            for kpi, sums in merged.items():
                if sums.count:
                    found += _scores(kpi, window, sums, covered)
        return tuple(found)

    def exact_ratio(self, kpi: str, now_seconds: float) -> float:
        """Share of the last hour's pairs of which both values are equal; NaN without any."""
        if not self._buckets:
            return math.nan
        first, last = self._bucket(now_seconds - _KEPT_SECONDS), self._bucket(now_seconds)
        found = [b[kpi] for number, b in self._buckets.items() if first <= number <= last and kpi in b]
        count = sum(sums.count for sums in found)
        return sum(sums.exact for sums in found) / count if count else math.nan

    def course(self, now_seconds: float) -> tuple[Stretch, ...]:
        """The last hour bucket by bucket, oldest first. The last one is under way: it ends now, and has no rates."""
        if not self._buckets:
            return ()
        last = self._bucket(now_seconds)
        self._whole = {number: stretch for number, stretch in self._whole.items() if number > last - self._kept}
        found: list[Stretch] = []
        for number in range(max(min(self._buckets), last - self._kept + 1), last + 1):
            if number == last:
                found.append(self._stretch(number, now_seconds))
                continue
            if number not in self._whole:
                self._whole[number] = self._stretch(number, (number + 1) * self._bucket_seconds)
            found.append(self._whole[number])
        return tuple(found)

    def _stretch(self, number: int, until_seconds: float) -> Stretch:
        start = number * self._bucket_seconds
        covered = until_seconds - max(start, self._since_seconds)
        whole = until_seconds - start >= self._bucket_seconds
        values = {
            (score.kpi, score.statistic): (score.predicted, score.observed)
            for kpi, sums in self._buckets.get(number, {}).items()
            if sums.count and (whole or kpi not in RATES)
            for score in _scores(kpi, "", sums, covered)
        }
        return Stretch(until_seconds, values)

    def _bucket(self, time_seconds: float) -> int:
        return math.floor(time_seconds / self._bucket_seconds)

    def _sums(self, kpi: str, time_seconds: float) -> _Sums | None:
        """Those of the time's bucket, to be added to; None for what is older than every window."""
        number = self._bucket(time_seconds)
        newest = max(self._buckets, default=number)
        if number <= newest - self._kept:
            return None
        self._whole.pop(number, None)
        self._since_seconds = min(self._since_seconds, time_seconds)
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {}
            for old in [known for known in self._buckets if known <= number - self._kept]:
                del self._buckets[old]
        elif number not in self._own:
            bucket = self._buckets[number] = {name: _Sums().take(sums) for name, sums in bucket.items()}
        self._own.add(number)
        sums = bucket.get(kpi)
        if sums is None:
            sums = bucket[kpi] = _Sums()
        return sums


def _bin(seconds: float) -> int:
    return math.floor(math.log(max(seconds, _SMALLEST_SECONDS)) / math.log(_BIN_RATIO))


def _scores(kpi: str, window: str, sums: _Sums, covered_seconds: float) -> list[WindowScore]:
    denominator = covered_seconds if kpi in RATES else sums.weight
    if denominator <= 0.0:
        return []
    predicted, observed = (total / denominator for total in sums.sums)
    mean = "mean" if kpi in LATENCIES else ""
    found = [WindowScore(kpi, mean, window, sums.count, predicted, observed, _error(kpi, predicted, observed))]
    for statistic in KPIS[kpi].statistics:
        predicted, observed = (_quantile(bins, share(statistic)) for bins in sums.bins)
        error = _error(kpi, predicted, observed)
        found.append(WindowScore(kpi, statistic, window, sums.count, predicted, observed, error))
    return found


def _error(kpi: str, predicted: float, observed: float) -> float:
    if KPIS[kpi].error == "difference":
        return predicted - observed
    return (predicted - observed) / observed if observed > 0.0 else math.nan


def _quantile(bins: Counter[int], of: float) -> float:
    """The nearest rank's bin, at its geometric centre."""
    rank = math.ceil(of * bins.total())
    for number in sorted(bins):
        rank -= bins[number]
        if rank <= 0:
            return float(_BIN_RATIO ** (number + 0.5))
    return math.nan
