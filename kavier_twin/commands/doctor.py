"""`kavier-twin doctor`: whether what a settings file names can be reached and gives what the twin needs."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kavier_twin import __version__
from kavier_twin.commands.duration import seconds_of
from kavier_twin.daemon.config import read_settings
from kavier_twin.daemon.findings import Finding, examine

_EPILOG = """examples:
  kavier-twin doctor --config twin.yaml
  kavier-twin doctor --config twin.yaml --strict    in CI: warnings fail too

Each source is read as `kavier-twin run` would read it. Nothing is written, committed or served.
exit status: 0 no error, 1 an error (with --strict: or a warning), 2 wrong use
"""
_STYLE = {"ok": "green", "warning": "yellow", "error": "red"}


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="check the sources of a settings file: reach, selection, freshness, missing series, clocks",
        description="Check a settings file and each source in it, and say what is wrong and how to fix it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, default=Path("twin.yaml"), metavar="TWIN.yaml", help="the settings file (twin.yaml)"
    )
    parser.add_argument(
        "--seconds",
        type=seconds_of,
        default=20.0,
        metavar="TIME",
        help="how long to wait for the first records of a source (20s)",
    )
    parser.add_argument("--strict", action="store_true", help="fail at warnings too")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    logging.disable(logging.WARNING)  # what sources log is in the table
    try:
        settings = read_settings(args.config)
        console = Console()
        found = [Finding("ok", str(args.config), f"valid for Kavier Twin {__version__}")]
        with console.status("Reading the sources ..."):
            found += examine(settings, args.seconds)
    finally:
        logging.disable(logging.NOTSET)
    table = Table("", "where", "found", "fix", show_lines=True)
    for finding in found:
        severity = Text(finding.severity, style=_STYLE[finding.severity])
        table.add_row(severity, Text(finding.where), Text(finding.what), Text(finding.fix))
    console.print(table)
    bad = ("error", "warning") if args.strict else ("error",)
    return int(any(finding.severity in bad for finding in found))
