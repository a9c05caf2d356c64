"""`kavier-twin kavier`: the experiments of the Kavier paper, repeated (docs/kavier.md)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final, get_args

from rich.console import Console

from kavier_twin.errors import UserError
from kavier_twin.studies.kavier.accuracy import accuracy
from kavier_twin.studies.kavier.kv_cache import kv_cache
from kavier_twin.studies.kavier.model import Scope
from kavier_twin.studies.kavier.prefix import prefix

_EXPERIMENTS: Final = {
    "accuracy": "experiment 1: seconds of prefill and decode on an A10, against measurements",
    "kv-cache": "experiment 2: hours on an A100 with the KV cache on and off, four models",
    "prefix": "experiment 3: hit ratio and prefill hours of prompt caches, against a real block cache",
}


_EXAMPLES = """examples:
  kavier-twin kavier accuracy DATA
  kavier-twin kavier kv-cache DATA
  kavier-twin kavier prefix DATA --trace TRACE --scope global

DATA is the folder of the paper's tables, from Kavier's repository.
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "kavier",
        help="repeat the experiments of the Kavier paper",
        description="Repeat the experiments of the Kavier paper (arXiv 2605.25247): its model's figures, ours, and "
        "the published ones. See docs/kavier.md for what can be compared.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    experiments = parser.add_subparsers(dest="experiment", metavar="EXPERIMENT", required=True)
    for name, what in _EXPERIMENTS.items():
        experiment = experiments.add_parser(name, help=what, description=what)
        experiment.add_argument("data", type=Path, metavar="DATA", help="the folder of the paper's tables (CSV)")
        if name == "accuracy":
            continue
        experiment.add_argument("--trace", type=Path, help="a trace to run both models on: the paper's is not public")
        if name == "prefix":
            experiment.add_argument("--min-tokens", default="1024,2048,4096", help="default 1024,2048,4096")
            experiment.add_argument("--entries", default="8,16", help="cached prompts (default 8,16)")
            experiment.add_argument("--scope", choices=get_args(Scope), default="session")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    if args.experiment == "accuracy":
        accuracy(console, args.data)
    elif args.experiment == "kv-cache":
        kv_cache(console, args.data, args.trace)
    else:
        min_tokens = _whole_numbers("--min-tokens", args.min_tokens)
        entries = _whole_numbers("--entries", args.entries)
        prefix(console, args.data, args.trace, min_tokens, entries, args.scope)
    return 0


def _whole_numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text}: expected whole numbers above 0 with commas between")
    return [int(part) for part in parts]
