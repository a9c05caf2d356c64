"""`kavier-twin capacity`: the hit ratio that other KV cache sizes would have had."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from kavier_twin.commands.reuse_tables import add_command, watched
from kavier_twin.commands.score_tables import wide_console
from kavier_twin.reuse.curve import SHOWN_FACTORS

_DESCRIPTION = """Print the prefix-cache hit ratio of a trace against KV cache size. One simulated run and one pass of
LRU stack distances give all sizes. `kavier-twin compare` simulates each size and also prints latency and cost.
"""
_EXAMPLES = """examples:
  kavier-twin capacity trace.jsonl --fleet fleet.yaml
  kavier-twin capacity recording/ --json
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    add_command(commands, "capacity", "hit ratio of a trace against KV cache size", _DESCRIPTION, _EXAMPLES)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    with Console(stderr=True).status("simulating (the first run compiles kernels)"):
        scenario, watch = watched(args)
    points = watch.points()
    if args.json:
        document = {
            "trace": str(args.trace),
            "fleet_source": scenario.fleet_source,
            "requests": watch.misses.total.requests,
            "block_size": watch.block_size,
            "points": [point._asdict() for point in points],
        }
        print(json.dumps(document, allow_nan=False))
        return 0
    console = wide_console()
    console.print(f"{args.trace}: {watch.misses.total.requests:,} requests; fleet from {scenario.fleet_source}")
    table = Table()
    for name in ("KV cache of a replica", "blocks", "tokens", "hit ratio", "gain"):
        table.add_column(name, justify="left" if name.startswith("KV") else "right")
    today = next(point for point in points if point.factor == 1.0)
    for point in points:
        if point.factor in SHOWN_FACTORS:
            gain = 100.0 * (point.hit_ratio - today.hit_ratio)
            table.add_row(
                "today" if point is today else f"{point.factor:g} x",
                f"{point.blocks:,}",
                f"{point.blocks * watch.block_size:,}",
                f"{point.hit_ratio:.2%}",
                "" if point is today else f"{gain:+.2f} points",
            )
    console.print(table)
    return 0
