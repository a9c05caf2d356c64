"""`kavier-twin compare`: policies side by side on one trace."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from connectors.traces import FORMATS
from kavier_twin.errors import UserError
from kavier_twin.mirror.calibration.requests import with_frontend
from kavier_twin.recordings.scenario import Scenario, load_scenario
from kavier_twin.simulation.policies import DEFAULT_POLICIES, POLICY_NAMES
from kavier_twin.studies.comparison import Compared, Point, as_document, compare, read_policies

DEFAULT_FACTORS: Final = "0.25,0.5,1,2,4"

_EPILOG = f"""examples:
  kavier-twin compare trace.jsonl --fleet fleet.yaml
  kavier-twin compare recording/ --policies policies.yaml --capacities 0.5,1,2 --plot hits.png

a file of policies, each a sparse override of the fleet (a number with x multiplies the fleet's own):
  - {{name: today}}
  - {{name: fp8, overrides: {{kv_cache_dtype: fp8}}}}
  - {{name: small, overrides: {{num_gpu_blocks: 0.5x, max_num_seqs: 64}}}}
  - {{name: four, overrides: {{replicas: 4, router: session_affinity}}}}

settings: {", ".join(POLICY_NAMES)}

Without a file: {", ".join(policy.name for policy in DEFAULT_POLICIES)}.
The plot needs matplotlib: pip install 'kavier-twin[plot]'.
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "compare",
        help="compare policies on one trace",
        description="Simulate a trace under each policy, also at multiples of its KV cache size. Prints a table and "
        "writes a plot.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="trace file, golden run or recording")
    parser.add_argument("--policies", type=Path, metavar="POLICIES.yaml", help="policies (default: see below)")
    parser.add_argument("--fleet", type=Path, metavar="FLEET.yaml", help="fleet that the policies change")
    parser.add_argument("--format", choices=sorted(FORMATS), help="format of the trace (default: detected)")
    parser.add_argument(
        "--capacities",
        default=DEFAULT_FACTORS,
        metavar="FACTORS",
        help=f"multiples of a policy's own KV blocks to run it at (default {DEFAULT_FACTORS})",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="OUT.png", help="plot of the hit ratio against KV capacity (default compare.png)"
    )
    parser.add_argument("--no-plot", action="store_true", help="skip the plot and the runs at other capacities")
    parser.add_argument("--workers", type=int, metavar="N", help="concurrent simulations (default: number of cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    workers = (os.cpu_count() or 1) if args.workers is None else args.workers
    if workers < 1:
        raise UserError(f"--workers {workers}: expected 1 or more")
    if args.no_plot and args.plot is not None:
        raise UserError("--plot and --no-plot exclude each other; leave one out")
    factors = [] if args.no_plot else _factors(args.capacities)
    figures = None if args.no_plot else _figures(required=args.plot is not None)
    console = Console(stderr=True)
    with console.status("reading the trace (the first run compiles kernels)"):
        scenario = load_scenario(args.trace, trace_format=args.format, fleet_file=args.fleet)
        policies = DEFAULT_POLICIES if args.policies is None else read_policies(args.policies, scenario.fleet)
        workload = with_frontend(scenario.observed.workload, scenario.frontend_seconds)
    if scenario.trace.rejected_count:
        console.print(f"[yellow]{scenario.trace.rejected_count} malformed line(s) left out[/]")
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=None)
        compared = compare(
            scenario.fleet,
            workload,
            policies,
            factors,
            workers=workers,
            done=lambda done, of: progress.update(task, completed=done, total=of),
        )
    plot = None
    if figures is not None:
        plot = args.plot or Path("compare.png")
        _draw(figures, plot, compared, str(args.trace))
    elif not args.no_plot:
        console.print("[yellow]no plot: it needs matplotlib; install it with: pip install 'kavier-twin\\[plot]'[/]")
    if args.json:
        print(json.dumps(_document(scenario, compared, plot), allow_nan=False))
    else:
        _print(Console(width=None if sys.stdout.isatty() else 160), scenario, compared, plot)
    return 0


def _factors(text: str) -> list[float]:
    factors = []
    for part in text.split(","):
        try:
            factor = float(part.strip().removesuffix("x"))
        except ValueError:
            factor = math.nan
        if not 0.0 < factor <= 1e6:
            raise UserError(
                f"--capacities {text}: expected factors above 0 with commas between, e.g. {DEFAULT_FACTORS}"
            )
        factors.append(factor)
    return sorted(set(factors))


def _figures(*, required: bool) -> Any:
    """matplotlib's figures; None without it. Raises UserError without it if `required`."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        if required:
            raise UserError("--plot needs matplotlib; install it with: pip install 'kavier-twin[plot]'") from None
        return None


def _draw(figures: Any, path: Path, compared: Sequence[Compared], title: str) -> None:
    figure = figures.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, one in enumerate(compared):
        tokens, ratios = _columns(one.points)
        name = one.policy.name + (" (hypothetical)" if one.hypothetical else "")
        width = 1.5 + 1.5 * (len(compared) - 1 - number)  # a line below another stays in sight
        line = axes.plot(tokens, ratios, linewidth=width, marker="o", markersize=width + 3, label=name)[0]
        short = [point for point in one.points if point.rejected]
        axes.plot(*_columns(short), linestyle="", marker="o", color="white", markeredgecolor=line.get_color(), zorder=9)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:,.3g} Ki")
    axes.set_xlabel("KV capacity of a replica (tokens)")
    axes.set_ylabel("hit ratio of prompt tokens (GPU and tiers)")
    axes.set_ylim(bottom=0.0)
    rejecting = any(point.rejected for one in compared for point in one.points)
    axes.set_title(title + ("\nwhite: some requests were larger than the cache" if rejecting else ""))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"--plot {path}: {error.strerror}") from None


def _columns(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    return [point.capacity_tokens for point in points], [point.hit_ratio for point in points]


def _document(scenario: Scenario, compared: Sequence[Compared], plot: Path | None) -> dict[str, Any]:
    return {
        "trace": str(scenario.trace.path),
        "format": scenario.trace.format,
        "malformed_lines": scenario.trace.rejected_count,
        "fleet": scenario.fleet.model_dump(mode="json", exclude={"footprint": {"carbon": {"points"}}}),
        "fleet_source": scenario.fleet_source,
        "plot": None if plot is None else str(plot),
        "policies": [as_document(one) for one in compared],
    }


def _print(console: Console, scenario: Scenario, compared: Sequence[Compared], plot: Path | None) -> None:
    console.print(
        f"[bold]{scenario.trace.path}[/] ({scenario.trace.format}): {compared[0].kpis.requests:,} requests; "
        f"fleet from {scenario.fleet_source}"
    )
    impact = compared[0].kpis.impact
    priced = impact is not None and math.isfinite(impact.cost_per_million_tokens)
    rejecting = any(one.kpis.requests_rejected for one in compared)
    table = Table()
    table.add_column("policy", no_wrap=True)
    for name in ("hit ratio", "TTFT p50 s", "TTFT p99 s", "output tok/s"):
        table.add_column(name, justify="right")
    if impact is not None:
        table.add_column("Wh/Mtok", justify="right")
    if priced and impact is not None:
        table.add_column(f"{impact.currency}/Mtok", justify="right")
    if rejecting:
        table.add_column("rejected", justify="right")
    table.add_column("deployable", no_wrap=True)
    for one in compared:
        result = one.kpis
        row = [
            one.policy.name,
            f"{result.cache_hit_ratio:.4f}",
            _number(result.ttft_seconds.p50, ".3f"),
            _number(result.ttft_seconds.p99, ".3f"),
            f"{result.output_tokens_per_second:,.1f}",
        ]
        if result.impact is not None:
            row.append(_number(result.impact.energy_watt_hours_per_million_tokens, ",.1f"))
            row += [_number(result.impact.cost_per_million_tokens, ",.3f")] if priced else []
        row += [f"{result.requests_rejected:,}"] if rejecting else []
        table.add_row(*row, "hypothetical" if one.hypothetical else "yes")
    console.print(table)
    for one in compared:
        console.print(f"{one.policy.name}: {_to_deploy(one)}", markup=False, highlight=False, soft_wrap=True)
    short = sum(point.rejected > 0 for one in compared for point in one.points)
    if short:
        console.print(f"{short} point(s) of the plot reject requests larger than their cache: hit ratios of the others")
    if plot is not None:
        console.print(f"hit ratio against KV capacity: {plot}")


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _to_deploy(one: Compared) -> str:
    flags = " ".join(one.flags)
    if one.hypothetical:
        return "hypothetical: " + "; ".join(one.hypothetical) + (f"; with {flags}" if flags else "")
    return f"vllm serve {flags}" if flags else "as it is"
