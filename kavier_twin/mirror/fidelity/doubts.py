"""What takes trust at once, before errors over minutes show it: the newest evidence against the mirror.

Errors over windows (`trust`) are slow. Three signs are fast: engines' gauges that contradict the mirror in two scrapes
in a row, records that come too late to be applied, and arrivals that engines counted and no record told of. Each doubt
ends when its cause does.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Final

from kavier_twin.mirror.fidelity.gauges import Pair
from kavier_twin.simulation.kpi_table import KPIS

ROUNDS: Final = 2  # scrapes of all engines in a row that must contradict
NEGLIGIBLE_REQUESTS: Final = 3.0  # an engine's gauges and its records are cut at slightly different moments
LATE_SHARE: Final = 0.03
LATE_SECONDS: Final = 60.0  # over which late records are counted
LEAST_RECORDS: Final = 30
COVERED_SHARE: Final = 0.9
LEAST_ARRIVALS: Final = 30.0


class Doubts:
    """Collects the evidence of one pool. `max_error` by KPI as in the settings of trust."""

    def __init__(self, max_error: Mapping[str, float]) -> None:
        self._max_error = max_error
        self._round: dict[str, dict[str, Pair]] = {}  # by KPI, of each engine
        self._contradicted: Counter[str] = Counter()  # rounds in a row, by KPI
        self._last: dict[str, tuple[float, float]] = {}  # mirrored and observed in the last round, by KPI
        self._records: deque[tuple[float, int, int]] = deque()  # (second, late, all) since the start
        self.coverage_ratio = math.nan  # arrivals that records told of, of those counted lately
        self.counted_arrivals = 0.0

    def gauges(self, pairs: Iterable[Pair]) -> None:
        """Take in comparisons with engines' gauges, in the order of time."""
        for pair in pairs:
            engines = self._round.setdefault(pair.kpi, {})
            if pair.engine in engines:  # the next round begins
                self._close(pair.kpi, list(engines.values()))
                engines.clear()
            engines[pair.engine] = pair

    def records(self, second: float, counts: Mapping[str, int]) -> None:
        """Take in the counts of records by result at a whole second."""
        self._records.append((second, counts.get("late", 0), sum(counts.values())))
        while self._records[0][0] < second - LATE_SECONDS:
            self._records.popleft()

    def arrivals(self, recorded: float, counted: float) -> None:
        """Take in the arrivals that records told of lately, and those that engines counted in the same time."""
        self.counted_arrivals = counted
        self.coverage_ratio = min(1.0, recorded / counted) if counted > 0.0 else math.nan

    def reasons(self) -> list[str]:
        """Why nothing is to be trusted now; empty where there is no doubt."""
        found = [
            f"{kpi}: {self._last[kpi][1]:.3g} observed and {self._last[kpi][0]:.3g} mirrored in the last scrapes"
            for kpi, rounds in self._contradicted.items()
            if rounds >= ROUNDS
        ]
        if self._records:
            late, all_ = (self._records[-1][n] - self._records[0][n] for n in (1, 2))
            if all_ >= LEAST_RECORDS and late > LATE_SHARE * all_:
                found.append(f"{late / all_:.0%} of the records came too late to be applied (mirror.late_seconds)")
        if self.counted_arrivals >= LEAST_ARRIVALS and self.coverage_ratio < COVERED_SHARE:
            found.append(f"records tell of {self.coverage_ratio:.0%} of the requests that the engines received")
        return found

    def _close(self, kpi: str, pairs: list[Pair]) -> None:
        mirrored = sum(pair.mirrored for pair in pairs) / len(pairs)
        observed = sum(pair.observed for pair in pairs) / len(pairs)
        bound = self._max_error[kpi]
        if KPIS[kpi].error == "difference":
            wrong = abs(mirrored - observed) > bound
        else:
            wrong = abs(mirrored - observed) > max(NEGLIGIBLE_REQUESTS / math.sqrt(len(pairs)), bound * observed)
        self._contradicted[kpi] = self._contradicted[kpi] + 1 if wrong else 0
        self._last[kpi] = mirrored, observed
