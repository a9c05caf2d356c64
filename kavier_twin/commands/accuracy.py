"""`kavier-twin accuracy`: how true the simulation's seconds are, on every measured data set of a folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kavier_twin.errors import UserError
from kavier_twin.studies.accuracy.find import Skipped, find
from kavier_twin.studies.accuracy.report import HEADER, rows, write_report
from kavier_twin.studies.accuracy.result import SetResult

_DESCRIPTION = """Predict every measured data set in a folder, from the catalogue alone and after calibration on its
first part, and report the errors.

The format of a data set is detected: recordings of a server, LLMServingSim benchmarks, load-test summaries
(stages.json), tables of benchmarks at a fixed concurrency (AIConfigurator), Kavier's table. Other entries are listed
and skipped.
"""
_EXAMPLES = """examples:
  kavier-twin accuracy
  kavier-twin accuracy recordings/monday --report monday.md
  kavier-twin accuracy ../shared/data --json
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "accuracy",
        help="compare predictions with measured data sets",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("../shared/data"),
        metavar="FOLDER",
        help="folder of data sets, or one data set (default ../shared/data)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("docs/accuracy.md"),
        metavar="FILE.md",
        help="file for the report; plots are written to a folder of the same name (default docs/accuracy.md)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it: 0 if any data set could be evaluated."""
    sets, skipped = find(args.folder)
    if not sets:
        raise UserError(f"{args.folder}: no measured data set in it; `kavier-twin accuracy --help` names the formats")
    progress = Console(stderr=True)
    results: list[SetResult] = []
    failed: list[Skipped] = []
    with progress.status("") as status:
        for number, data in enumerate(sets, 1):
            place = f"{number} of {len(sets)}, {data.name}"
            status.update(place)
            try:
                results.append(data.run(data.path, data.name, lambda step, at=place: status.update(f"{at}: {step}")))  # type: ignore[misc]
            except UserError as error:
                failed.append(Skipped(data.name, str(error)))
                progress.print(f"{data.name}: left out: {error}", style="yellow", highlight=False, markup=False)
            else:
                progress.print(f"{place}: done", style="dim", highlight=False, markup=False)
    for entry in skipped:
        progress.print(f"{entry.name}: left out: {entry.reason}", style="dim", highlight=False, markup=False)
    if args.json:
        print(json.dumps(_document(args.folder, results, failed, skipped)))
    else:
        _print(Console(), results)
    warning = write_report(args.report, results, failed, skipped)
    if warning is not None:
        progress.print(warning, style="yellow", markup=False)
    if not args.json:
        progress.print(f"report: {args.report}", highlight=False, markup=False)
    return 0 if results else 1


def _print(console: Console, results: list[SetResult]) -> None:
    for result in results:
        console.print(f"[bold]{escape(result.name)}[/]: {escape(result.measured)}", highlight=False)
        for trial in result.trials:
            table = Table(*HEADER)
            for row in rows(trial):
                table.add_row(*row)
            what = f"{trial.basis}, {trial.predicted}; fitted on: {trial.fitted_on}"
            console.print(what, highlight=False, markup=False)
            console.print(table)
        for note in result.notes:
            console.print(f"  {note}", style="dim", highlight=False, markup=False)


def _document(folder: Path, results: list[SetResult], failed: list[Skipped], skipped: list[Skipped]) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "sets": [result.document() for result in results],
        "failed": [entry._asdict() for entry in failed],
        "skipped": [entry._asdict() for entry in skipped],
    }
