"""`kavier-twin backtest`: the whole twin over a trace in fast time, its forecasts judged by what came."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from connectors.traces import FORMATS
from kavier_twin.commands.backtest_plots import write_plots
from kavier_twin.commands.score_tables import print_scores, wide_console
from kavier_twin.commands.slo_file import read_slos
from kavier_twin.errors import UserError, problems_of
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.recordings.scenario import load_scenario
from kavier_twin.simulation.plain import plain
from kavier_twin.studies.backtest import Backtest, backtest

_DESCRIPTION = """Run the whole twin over a trace in fast time and score its forecasts. At each step the twin knows only
the past. For a recording, reality is what was recorded. For any other trace, reality is a simulation of the trace on
the given fleet.
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
        help="run the twin over a trace and score its forecasts",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="trace file or recording")
    parser.add_argument("--slo", type=Path, required=True, metavar="SLO.yaml", help="the objectives")
    parser.add_argument("--format", choices=sorted(FORMATS), help="format of the trace (default: detected)")
    parser.add_argument("--fleet", type=Path, metavar="FLEET.yaml", help="fleet, for a trace without latencies")
    parser.add_argument(
        "--every", type=float, default=60.0, metavar="SECONDS", help="interval between forecasts (default 60)"
    )
    parser.add_argument(
        "--horizons", default="60,300,900", metavar="SECONDS,...", help="horizons of the forecasts (default 60,300,900)"
    )
    parser.add_argument("--scenarios", type=int, default=8, metavar="N", help="scenarios for each forecast (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenarios (default 0)")
    parser.add_argument(
        "--warm-up", type=float, default=300.0, metavar="SECONDS", help="time before the first forecast (default 300)"
    )
    parser.add_argument(
        "--shape",
        default="",
        metavar="SECONDS:FACTOR,...",
        help="change the load: multiply the arrival rate by FACTOR at each SECONDS, with linear interpolation "
        "in between; reality is then simulated",
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots of forecasts and alerts to this folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    slos = read_slos(args.slo)
    try:
        settings = ForecastSettings(
            every_seconds=args.every,
            horizons_seconds=tuple(_numbers(args.horizons, "--horizons")),
            scenarios=args.scenarios,
            seed=args.seed,
        )
    except ValidationError as error:
        options = {"every_seconds": "every", "horizons_seconds": "horizons"}
        problem, *_ = problems_of(error, lambda place: f"--{options.get(str(place[0]), place[0])}")
        raise UserError(problem) from None
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
        for path in write_plots(found, slos, args.plots):
            console.print(f"plot: {path}", highlight=False, markup=False)
    if args.json:
        print(json.dumps(document(found)))
    else:
        output = wide_console()
        reality = "measured" if found.measured else f"simulated ({scenario.fleet_source})"
        output.print(f"{found.forecasts} forecasts over {found.requests} requests; reality is {reality}.")
        print_scores(output, found.scores)
    return 0


def document(found: Backtest) -> dict[str, Any]:
    """Plain JSON types."""
    what = {"forecasts": found.forecasts, "requests": found.requests, "measured": found.measured}
    return {**what, **plain(asdict(found.scores))}


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
