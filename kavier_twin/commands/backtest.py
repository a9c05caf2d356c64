"""`kavier-twin backtest`: the whole twin over a trace in fast time, its forecasts judged by what came."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from connectors.traces import FORMATS
from kavier_twin.backtest import Backtest, backtest
from kavier_twin.errors import UserError
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.forecast.scores import ALERT_PROBABILITY, Scores
from kavier_twin.forecast.slo import Slo
from kavier_twin.scenario import load_scenario
from kavier_twin.simulation.plain import plain
from kavier_twin.slo_file import read_slos

_DESCRIPTION = """Run the whole twin over a trace in fast time: at every step it knows what was known then, forecasts,
and is judged by what came. A recording tells how long its requests took; of any other trace reality is the simulation
of its requests on the fleet given.
"""
_EXAMPLES = """examples:
  kavier-twin backtest recording/ --slo slo.yaml --horizons 30,60,120 --every 10
  kavier-twin backtest mooncake.jsonl --fleet fleet.yaml --slo slo.yaml --plots plots/
  kavier-twin backtest azure.csv --slo slo.yaml --shape 0:1,1200:1,2400:3

slo.yaml:
  - {name: fast, metric: ttft_p99_seconds, threshold: 2.0}
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "backtest",
        help="run the whole twin over a trace and judge its forecasts",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a trace file or a recording")
    parser.add_argument("--slo", type=Path, required=True, metavar="SLO.yaml", help="the objectives")
    parser.add_argument("--format", choices=sorted(FORMATS), help="the trace's format (default: found by its content)")
    parser.add_argument("--fleet", type=Path, metavar="FLEET.yaml", help="the fleet, for a trace without latencies")
    parser.add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="between forecasts (default 60)")
    parser.add_argument(
        "--horizons", default="60,300,900", metavar="SECONDS,...", help="how far ahead (default 60,300,900)"
    )
    parser.add_argument("--futures", type=int, default=8, metavar="N", help="simulated for each forecast (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the futures (default 0)")
    parser.add_argument(
        "--warm-up", type=float, default=300.0, metavar="SECONDS", help="before the first forecast (default 300)"
    )
    parser.add_argument(
        "--shape",
        default="",
        metavar="SECONDS:FACTOR,...",
        help="make the load rise or burst: from each of these times on the requests come so many times as fast, "
        "straight in between; reality is then simulated",
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the forecast fan and the alert timeline there")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    slos = read_slos(args.slo)
    try:
        settings = ForecastSettings(
            every_seconds=args.every,
            horizons_seconds=tuple(_numbers(args.horizons, "--horizons")),
            futures=args.futures,
            seed=args.seed,
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = {"every_seconds": "every", "horizons_seconds": "horizons"}.get(str(first["loc"][0]), first["loc"][0])
        raise UserError(f"--{option}: {first['msg']}") from None
    shape = _shape(args.shape)
    if not (math.isfinite(args.warm_up) and args.warm_up >= 0.0):
        raise UserError(f"--warm-up {args.warm_up}: expected seconds, 0 or more")
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("reading", total=1.0)
        scenario = load_scenario(args.trace, trace_format=args.format, fleet_file=args.fleet)
        progress.update(bar, description="forecasting")
        found = backtest(
            scenario,
            settings,
            slos,
            shape=shape,
            warm_up_seconds=args.warm_up,
            progress=lambda share: progress.update(bar, completed=share),
        )
    if args.plots is not None:
        for path in _write_plots(found, slos, args.plots):
            console.print(f"plot: {path}", highlight=False, markup=False)
    if args.json:
        print(json.dumps(document(found)))
    else:
        output = wide_console()
        reality = "measured" if found.measured else f"simulated ({scenario.fleet_source})"
        output.print(f"{found.forecasts} forecasts over {found.requests} requests; reality is {reality}.")
        print_scores(output, found.scores)
    return 0


def wide_console() -> Console:
    """As wide as the terminal; where there is none, wide enough for the tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_scores(console: Console, scores: Scores) -> None:
    """The tables of all scores."""
    table = Table(title="KPIs foreseen", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("KPI", "horizon", "forecasts", "error", "persistence", "ratio", "covered", "widened", "width", "wide"):
        table.add_column(name, justify="left" if name == "KPI" else "right")
    for one in sorted(scores.kpis, key=lambda score: (score.kpi, score.horizon_seconds)):
        table.add_row(
            one.kpi,
            f"{one.horizon_seconds:g} s",
            str(one.forecasts),
            f"{one.error:.4g}",
            _number(one.persistence_error),
            _number(one.error_to_persistence_ratio, ".2f"),
            f"{one.coverage_ratio:.0%}",
            f"{one.widened_coverage_ratio:.0%}",
            f"{one.width:.3g}",
            f"{one.widened_width:.3g}",
        )
    console.print(table)
    table = Table(title="Breaches foreseen", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("objective", "horizon", "forecasts", "breached", "Brier", "persistence", "said -> came (forecasts)"):
        table.add_column(name, justify="left" if name == "objective" else "right")
    for breach in scores.breaches:
        table.add_row(
            breach.slo,
            f"{breach.horizon_seconds:g} s",
            str(breach.forecasts),
            str(breach.breached),
            f"{breach.brier:.3f}",
            _number(breach.persistence_brier, ".3f"),
            ", ".join(f"{b.probability:.0%} -> {b.breached_ratio:.0%} ({b.forecasts})" for b in breach.reliability),
        )
    console.print(table)
    table = Table(title=f"Alerts (odds from {ALERT_PROBABILITY:.0%} on)", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("objective", "alerts", "breaches", "precision", "recall", "median lead"):
        table.add_column(name, justify="left" if name == "objective" else "right")
    for alert in scores.alerts:
        lead = alert.median_lead_seconds
        table.add_row(
            alert.slo,
            str(alert.alerts),
            str(alert.breaches),
            _number(alert.precision, ".0%"),
            _number(alert.recall, ".0%"),
            f"{lead:.0f} s" if math.isfinite(lead) else "–",
        )
    console.print(table)
    if scores.unobserved:
        told = ", ".join(sorted(scores.unobserved))
        console.print(f"Not observed by any telemetry for some or all of the time, and not judged there: {told}.")
    unscored = ", ".join(f"{count} {reason}" for reason, count in scores.unscored.items())
    if scores.pending or unscored:
        note = f"; not judged: {unscored}" if unscored else ""
        console.print(f"{scores.pending} forecasts still open{note}.", style="dim")


def document(found: Backtest) -> dict[str, Any]:
    """Plain JSON types."""
    what = {"forecasts": found.forecasts, "requests": found.requests, "measured": found.measured}
    return {**what, **plain(asdict(found.scores))}


def _number(value: float, form: str = ".4g") -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: expected numbers, separated by commas") from None


def _shape(text: str) -> list[tuple[float, float]]:
    if not text:
        return []
    found = [(float(a), float(b)) for a, b in re.findall(r"([\d.]+):([\d.]+)(?:,|$)", text)]
    times = [time for time, _ in found]
    if len(found) != text.count(":") or times != sorted(set(times)) or min(factor for _, factor in found) <= 0.0:
        raise UserError(
            f"--shape {text}: expected SECONDS:FACTOR,... with ascending times and factors above 0, as 0:1,600:1,1200:3"
        )
    return found


# --- plots --------------------------------------------------------------------------------------------------------


def _write_plots(found: Backtest, slos: Sequence[Slo], folder: Path) -> list[Path]:
    """A fan for every KPI, one panel a horizon, and a timeline for every objective."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise UserError("--plots needs matplotlib: pip install 'kavier-twin[plot]'") from None
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kpi in sorted({row.kpi for row in found.kpis}):
            rows = [row for row in found.kpis if row.kpi == kpi]
            horizons = sorted({row.horizon_seconds for row in rows})
            figure = figures.Figure(figsize=(10.0, 2.6 * len(horizons)), layout="constrained")
            panels = np.atleast_1d(figure.subplots(len(horizons), 1, sharex=True))
            for axes, horizon in zip(panels, horizons, strict=True):
                _fan(axes, np.array([[row[0], *row[3:]] for row in rows if row.horizon_seconds == horizon]), horizon)
                for slo in slos:
                    if slo.metric == kpi:
                        axes.axhline(slo.threshold, color="tab:red", linewidth=0.8, linestyle="--", label=slo.name)
            panels[0].set_title(kpi)
            panels[0].legend(fontsize="x-small", ncols=4)
            panels[-1].set_xlabel("end of the horizon, s")
            written.append(_save(figure, folder / f"fan-{kpi}.png"))
        for slo in slos:
            moments = [moment for moment in found.moments if moment.slo == slo.name]
            if moments:
                figure = figures.Figure(figsize=(10.0, 2.6), layout="constrained")
                axes = figure.subplots()
                times = np.array([moment.time_seconds for moment in moments])
                broken = np.array([moment.breached for moment in moments])
                axes.fill_between(
                    times, 0.0, 1.0, where=broken, step="post", color="tab:red", alpha=0.3, label="broken"
                )
                axes.step(
                    times, [moment.probability for moment in moments], where="post", label="odds of a breach ahead"
                )
                axes.axhline(ALERT_PROBABILITY, color="black", linewidth=0.8, linestyle="--", label="alert")
                axes.set(title=f"{slo.name}: {slo.metric} {slo.threshold:g}", xlabel="s", ylim=(-0.02, 1.02))
                axes.legend(fontsize="x-small", ncols=3)
                written.append(_save(figure, folder / f"alerts-{re.sub(r'[^A-Za-z0-9]+', '-', slo.name)}.png"))
    except OSError as error:
        raise UserError(f"--plots {folder}: cannot be written: {error.strerror}") from None
    return written


def _fan(axes: Any, rows: Any, horizon: float) -> None:
    time, low, median, high, wide_low, wide_high, _, observed = rows.T
    end = time + horizon
    axes.fill_between(end, wide_low, wide_high, color="tab:blue", alpha=0.15, label="widened interval")
    axes.fill_between(end, low, high, color="tab:blue", alpha=0.35, label="interval of the futures")
    axes.plot(end, median, color="tab:blue", linewidth=1.0, label="median foreseen")
    axes.plot(end, observed, color="black", linewidth=1.0, label="what came")
    axes.set_ylabel(f"{horizon:g} s ahead")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=80, metadata={"Software": None})
    return path
