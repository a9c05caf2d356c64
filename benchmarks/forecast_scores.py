"""(k) How good forecasts are: 23 backtests on shaped production traces, their scores in one table.

`python -m benchmarks.forecast_scores MOONCAKE.jsonl AZURE.csv [--only PART] [--json FILE]`: the first half of each
trace is what the design was chosen on, the second half, other shapes and other fleets judge it.

Ratios to persistence are geometric means over the backtests in which persistence erred at all, coverage is of all
forecasts together, alerts are counted over all backtests.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.common import report
from kavier_twin.forecast.settings import ForecastSettings
from kavier_twin.forecast.slo import Slo
from kavier_twin.recordings.scenario import Scenario, load_scenario
from kavier_twin.scores.scorer import AlertScore
from kavier_twin.studies.backtest import Backtest, backtest
from kavier_twin.telemetry import RequestRecord

HORIZONS_SECONDS: Final = (60.0, 300.0, 900.0)
EVERY_SECONDS: Final = 60.0
FUTURES: Final = 9
LEADS: Final = (
    "lead: median, seconds, over all predicted violations; most: that of an alert which always stood; after a climb: "
    "predicted violations with ten minutes of forecasts and without a breach before them"
)
PARTS: Final = ("design", "climbs", "judge")
CLIMB_SECONDS: Final = 600.0  # without a breach: what load that climbs into one for ten minutes needs at least
SMALLEST_RATIO: Final = 0.01  # so that no ratio of nearly nothing decides a mean

# (seconds, factor) as for `kavier-twin backtest --shape`. Load of 1 is what a replica serves with room to spare.
SHAPES: Final[dict[str, tuple[tuple[float, float], ...]]] = {
    "steady": ((0, 1.0), (4200, 1.0)),
    "ramps x3 in 15 min": (
        (0, 1),
        (900, 1),
        (1800, 3),
        (2100, 3),
        (2300, 1),
        (2700, 1),
        (3600, 3),
        (3900, 3),
        (4000, 1),
    ),
    "ramp x4 in 30 min": ((0, 1), (1200, 1), (3000, 4), (3600, 4), (3800, 1), (4200, 1)),
    "ramps x2.5 in 10 min": (
        (0, 1),
        (900, 1),
        (1500, 2.5),
        (2100, 2.5),
        (2200, 1),
        (2800, 1),
        (3400, 2.5),
        (4200, 2.5),
    ),
    "bursts x3 of 12 min": (
        (0, 1),
        (1200, 1),
        (1230, 3),
        (1950, 3),
        (1980, 1),
        (3000, 1),
        (3030, 3),
        (3750, 3),
        (3780, 1),
    ),
    "bursts x2.5 of 10 min": (
        (0, 1),
        (1000, 1),
        (1060, 2.5),
        (1660, 2.5),
        (1700, 1),
        (2500, 1),
        (2560, 2.5),
        (3160, 2.5),
        (3200, 1),
        (4000, 1),
    ),
    "waves x2.5 in 15 min": (
        (0, 1),
        (900, 1),
        (1350, 2.5),
        (1800, 1),
        (2250, 2.5),
        (2700, 1),
        (3150, 2.5),
        (3600, 1),
        (4200, 1),
    ),
    "ramps x3 in 12 min": (
        (0, 1),
        (900, 1),
        (1620, 3),
        (1980, 3),
        (2100, 1),
        (2700, 1),
        (3420, 3),
        (3900, 3),
        (4000, 1),
        (4200, 1),
    ),
    "ramp x3.5 in 25 min": ((0, 1), (1000, 1), (2500, 3.5), (3000, 3.5), (3100, 1), (4200, 1)),
    "waves x3 in 24 min": ((0, 1), (700, 1), (1420, 3), (2140, 1), (2860, 3), (3580, 1), (4200, 1)),
    "waves x3 in 20 min": ((0, 1), (600, 1), (1200, 3), (1800, 1), (2400, 3), (3000, 1), (3600, 3), (4200, 1)),
}


CLIMB_SLOWLY: Final = (
    "ramps x3 in 15 min",
    "ramp x4 in 30 min",
    "ramps x2.5 in 10 min",
    "waves x3 in 20 min",
    "ramps x3 in 12 min",
    "ramp x3.5 in 25 min",
    "waves x3 in 24 min",
)
"""Ten minutes or more from the lowest load to the highest."""


class Case(NamedTuple):
    """One backtest."""

    part: str  # design, climbs (more of design, for alerts) or judge
    traces: str  # m: Mooncake, a: Azure, ma: both at once
    shape: str
    replicas: int
    requests_per_second: float  # where the shape is 1
    most_running: int = 256  # on each replica


CASES: Final = (
    Case("design", "m", "ramps x3 in 15 min", 2, 1.0),
    Case("design", "a", "ramps x3 in 15 min", 1, 2.5, 16),
    Case("design", "m", "steady", 2, 1.5),
    Case("design", "m", "bursts x2.5 of 10 min", 2, 1.2),
    Case("design", "m", "waves x2.5 in 15 min", 2, 1.2),
    Case("design", "a", "bursts x2.5 of 10 min", 1, 2.5, 16),
    Case("design", "a", "waves x2.5 in 15 min", 1, 2.5, 16),
    Case("design", "ma", "waves x2.5 in 15 min", 3, 2.5),
    Case("climbs", "m", "ramps x3 in 12 min", 2, 1.1),
    Case("climbs", "a", "waves x3 in 24 min", 1, 2.5, 16),
    Case("climbs", "m", "waves x3 in 24 min", 2, 1.1),
    Case("climbs", "ma", "ramp x3.5 in 25 min", 3, 2.2),
    Case("climbs", "a", "ramp x3.5 in 25 min", 1, 2.2, 16),
    Case("judge", "m", "steady", 2, 1.6),
    Case("judge", "m", "ramps x2.5 in 10 min", 2, 1.2),
    Case("judge", "m", "ramp x4 in 30 min", 3, 1.2),
    Case("judge", "m", "bursts x3 of 12 min", 2, 1.0),
    Case("judge", "m", "waves x3 in 20 min", 2, 1.0),
    Case("judge", "a", "steady", 1, 4.0, 16),
    Case("judge", "a", "ramps x2.5 in 10 min", 2, 5.0, 16),
    Case("judge", "a", "ramp x4 in 30 min", 1, 2.0, 16),
    Case("judge", "a", "bursts x3 of 12 min", 1, 2.5, 16),
    Case("judge", "ma", "ramps x3 in 15 min", 3, 2.5),
)
SLOS: Final = (
    Slo(name="ttft", metric="ttft_p99_seconds", threshold=4.0),
    Slo(name="e2e", metric="e2e_p95_seconds", threshold=20.0),
    Slo(name="queue", metric="queue_p95_seconds", threshold=2.0),
)


def main() -> None:
    """Run them all, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mooncake", type=Path)
    parser.add_argument("azure", type=Path)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--json", type=Path, help="write every score of every backtest there")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in (None, case.part)]
    run = partial(_run, traces={"m": args.mooncake, "a": args.azure})
    with ProcessPoolExecutor(2) as executor:
        found = list(zip(cases, executor.map(run, cases), strict=True))
    if args.json:
        args.json.write_text(
            json.dumps([[case._asdict(), [row._asdict() for row in one.kpis]] for case, one in found]), encoding="utf-8"
        )
    for part in PARTS:
        of_part = [(case, one) for case, one in found if case.part == part]
        if of_part:
            report(f"(k) predicted KPIs: {part}", _kpis([one for _, one in of_part]), "ratio: error to persistence's")
            report(
                f"(k) violations: {part}",
                _probabilities([one for _, one in of_part]),
                "Brier scores, 0 is perfect",
            )
            report(f"(k) alerts: {part}", _alerts(of_part), LEADS)


def _run(case: Case, traces: dict[str, Path]) -> Backtest:
    settings = ForecastSettings(
        every_seconds=EVERY_SECONDS, horizons_seconds=HORIZONS_SECONDS, scenarios=FUTURES, workers=1
    )
    return backtest(_scenario(case, traces), settings, SLOS, shape=SHAPES[case.shape], warm_up_seconds=300.0)


def _scenario(case: Case, traces: dict[str, Path]) -> Scenario:
    """The case's half of its traces, so many requests a second, on so many replicas of the default fleet."""
    read = [load_scenario(traces[name]) for name in case.traces]
    merged: list[RequestRecord] = []
    for name, scenario in zip(case.traces, read, strict=True):
        records = list(scenario.trace.records)
        half = records[len(records) // 2 :] if case.part == "judge" else records[: len(records) // 2]
        begin, span = half[0].time_seconds, half[-1].time_seconds - half[0].time_seconds
        pace = case.requests_per_second / len(case.traces) / (len(half) / span)
        merged += [
            record.model_copy(update={"id": f"{name}{record.id}", "time_seconds": (record.time_seconds - begin) / pace})
            for record in half
        ]
    merged.sort(key=lambda record: record.time_seconds)
    fleet = read[0].fleet
    engine = fleet.engine.model_copy(update={"max_num_seqs": case.most_running})
    shape = np.array(SHAPES[case.shape])
    asked = float(np.trapezoid(shape[:, 1], shape[:, 0]))  # seconds of the trace up to the end of the shape
    kept = [record for record in merged if record.time_seconds <= asked]
    return dataclasses.replace(
        read[0],
        trace=dataclasses.replace(read[0].trace, records=kept),
        fleet=fleet.model_copy(update={"replicas": case.replicas, "engine": engine}),
    )


def _kpis(runs: list[Backtest]) -> list[dict[str, Any]]:
    """By KPI and horizon."""
    rows = defaultdict(list)
    for run in runs:
        for score in run.scores.kpis:
            rows[score.kpi, score.horizon_seconds].append(score)
    table = []
    for (kpi, horizon), scores in sorted(rows.items()):
        erred = [one for one in scores if one.error_to_persistence_ratio > 0.0]
        forecasts = sum(one.forecasts for one in scores)
        coverage, served_coverage = (
            sum(one.forecasts * getattr(one, name) for one in scores) / forecasts
            for name in ("coverage_ratio", "widened_coverage_ratio")
        )
        table.append(
            {
                "KPI": kpi,
                "horizon s": horizon,
                "forecasts": forecasts,
                "ratio simulated": _mean([one.error_to_persistence_ratio for one in erred]),
                "ratio served": _mean([one.served_error_to_persistence_ratio for one in erred]),
                "better": f"{sum(one.served_error_to_persistence_ratio < 1.0 for one in erred)} of {len(erred)}",
                "covered simulated": coverage,
                "covered served": served_coverage,
            }
        )
    return table


def _probabilities(runs: list[Backtest]) -> list[dict[str, Any]]:
    """By horizon, over all objectives."""
    table = []
    for horizon in HORIZONS_SECONDS:
        scores = [one for run in runs for one in run.scores.breaches if one.horizon_seconds == horizon]
        forecasts = sum(one.forecasts for one in scores)
        row: dict[str, Any] = {"horizon s": horizon, "forecasts": forecasts}
        for name, field in (("served", "brier"), ("simulated", "simulated_brier"), ("as now", "persistence_brier")):
            told = [one for one in scores if math.isfinite(getattr(one, field))]
            row[name] = sum(one.forecasts * getattr(one, field) for one in told) / sum(one.forecasts for one in told)
        table.append(row)
    return table


def _mean(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(np.maximum(ratios, SMALLEST_RATIO))))) if ratios else math.nan


def _alerts(found: list[tuple[Case, Backtest]]) -> list[dict[str, Any]]:
    """By case and objective, where anything was breached or alerted; over those that climb slowly; over all."""
    told = [(case, one) for case, run in found for one in run.scores.alerts if one.alerts or one.breaches]
    table = [
        _alert_row(f"{case.traces}, {case.shape}, {case.replicas} replicas: {one.slo}", [one]) for case, one in told
    ]
    slow = [one for case, one in told if case.shape in CLIMB_SLOWLY]
    return [*table, _alert_row("climb for 10 min or more", slow), _alert_row("all", [one for _, one in told])]


def _alert_row(name: str, scores: list[AlertScore]) -> dict[str, Any]:
    alerts, breaches = sum(one.alerts for one in scores), sum(one.breaches for one in scores)
    right = sum(one.alerts * one.precision for one in scores if one.alerts)
    leads = [lead for one in scores for lead in one.lead_seconds]
    most = [lead for one in scores for lead in one.most_lead_seconds]
    climbed = [lead for lead, upper in zip(leads, most, strict=True) if upper >= CLIMB_SECONDS]
    return {
        "backtest": name,
        "alerts": alerts,
        "breaches": breaches,
        "precision": right / alerts if alerts else math.nan,
        "recall": len(leads) / breaches if breaches else math.nan,
        "lead": float(np.median(leads)) if leads else math.nan,
        "most": float(np.median(most)) if most else math.nan,
        "after a climb": len(climbed),
        "their lead": float(np.median(climbed)) if climbed else math.nan,
    }


if __name__ == "__main__":
    main()
