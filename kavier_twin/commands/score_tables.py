"""The tables of scores, as `backtest` and `scores` print them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table

from kavier_twin.commands.figures import figure, place
from kavier_twin.scores.alerts import ALERT_PROBABILITY
from kavier_twin.scores.scorer import Bin, KpiScore, Scores
from kavier_twin.simulation.kpi_table import label_of

_WIDE: Final = 100  # columns from which all figures have room


def wide_console() -> Console:
    """As wide as the terminal; where there is none, wide enough for the tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_scores(console: Console, scores: Scores) -> None:
    """All of them."""
    wide = console.width >= _WIDE
    console.print(_kpis(scores, wide=wide))
    console.print(_breaches(scores, wide=wide))
    console.print(_alerts(scores))
    console.print(
        "Error: mean absolute error of simulated medians. Ratio: error divided by that of persistence, "
        "as served (in a wide table: as simulated, and as served); below 1 is better. Covered: share of "
        "observed values inside the 90 % interval, as simulated and as served; the target is 90 %.",
        style="dim",
    )
    if scores.unobserved:
        names = ", ".join(label_of(metric) for metric in sorted(scores.unobserved, key=place))
        console.print(f"Not scored for some or all of the time, for lack of telemetry: {names}.")
    unscored = ", ".join(f"{count} {reason}" for reason, count in scores.unscored.items())
    if scores.pending or unscored:
        note = f"; not scored: {unscored}" if unscored else ""
        console.print(f"{scores.pending} forecasts pending{note}.", style="dim")


def _kpis(scores: Scores, *, wide: bool) -> Table:
    widths = ("width", "widened") if wide else ()
    names = ("KPI", "ahead", "n", "error", "persistence" if wide else "persist.", "ratio", "covered", *widths)
    table = _table("Predicted KPIs", names, left=1)
    before = ""
    for one in sorted(scores.kpis, key=lambda score: (place(score.kpi), score.horizon_seconds)):
        name = label_of(one.kpi)
        table.add_row(
            "" if name == before else name,
            f"{one.horizon_seconds:g} s",
            str(one.forecasts),
            figure(one.kpi, one.error),
            figure(one.kpi, one.persistence_error),
            _ratio(one, wide=wide),
            f"{one.coverage_ratio:.0%}, {one.widened_coverage_ratio:.0%}",
            *((figure(one.kpi, one.width), figure(one.kpi, one.widened_width)) if wide else ()),
        )
        before = name
    return table


def _ratio(one: KpiScore, *, wide: bool) -> str:
    served = _number(one.served_error_to_persistence_ratio, ".2f")
    return f"{_number(one.error_to_persistence_ratio, '.2f')}, {served}" if wide else served


def _breaches(scores: Scores, *, wide: bool) -> Table:
    said = "predicted -> observed (forecasts)" if wide else "predicted -> observed"
    names = ("objective", "ahead", "n", "breached", "Brier", "persistence" if wide else "persist.", said)
    table = _table("Predicted SLO violations", names, left=1)
    table.columns[-1].no_wrap = True
    before = ""
    for one in sorted(scores.breaches, key=lambda score: (score.slo, score.horizon_seconds)):
        table.add_row(
            "" if one.slo == before else one.slo,
            f"{one.horizon_seconds:g} s",
            str(one.forecasts),
            str(one.breached),
            f"{one.brier:.3f}",
            _number(one.persistence_brier, ".3f"),
            _reliability(one.reliability, ", " if wide else "\n"),
        )
        before = one.slo
    return table


def _reliability(bins: Iterable[Bin], between: str) -> str:
    return between.join(f"{b.probability:.0%} -> {b.breached_ratio:.0%} ({b.forecasts})" for b in bins)


def _alerts(scores: Scores) -> Table:
    names = (
        "objective",
        "alerts",
        "breaches",
        "precision",
        "recall",
        "median lead",
        "false a day",
        "healthy min a day",
    )
    table = _table(f"Alerts (probability from {ALERT_PROBABILITY:.0%} on)", names, left=1)
    for one in scores.alerts:
        lead = one.median_lead_seconds
        table.add_row(
            one.slo,
            str(one.alerts),
            str(one.breaches),
            _number(one.precision, ".0%"),
            _number(one.recall, ".0%"),
            f"{lead:.0f} s" if math.isfinite(lead) else "–",
            _number(one.false_alerts_per_day, ".1f"),
            _number(one.healthy_alert_minutes_per_day, ".0f"),
        )
    return table


def _table(title: str, names: Iterable[str], *, left: int) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    return table


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"
