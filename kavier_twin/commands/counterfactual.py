"""`kavier-twin counterfactual`: predict a recorded run from another one with other settings."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kavier_twin.studies.counterfactual import Counterfactual, predict, read_recording

_DESCRIPTION = """Take two recordings of the same users on the same server with different settings. Predict each from
the other: prefix-cache hit ratio, mean TTFT and mean end-to-end latency.

The next turn of a session arrives after the simulated end of its previous turn and the recorded think time. Latencies
are given unscaled, and scaled by the ratio of step times of equal batches in the step logs of both runs, because the
speed of a machine differs between runs.
"""
_EXAMPLES = """examples:
  kavier-twin counterfactual recordings/cached recordings/uncached
  kavier-twin counterfactual monday tuesday --json
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "counterfactual",
        help="predict a recorded run from another one with other settings",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "first", type=Path, metavar="RECORDING_A", help="folder with requests, meta.json and steps.jsonl.gz"
    )
    parser.add_argument("second", type=Path, metavar="RECORDING_B", help="folder of the other recording")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    with Console(stderr=True).status("simulating (the first run compiles kernels)"):
        first, second = read_recording(args.first), read_recording(args.second)
        found = [predict(first, second), predict(second, first)]
    if args.json:
        print(json.dumps({"predictions": [_document(one) for one in found]}))
    else:
        console = Console(highlight=False)
        for one in found:
            _print(console, one)
    return 0


def _print(console: Console, found: Counterfactual) -> None:
    changed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in found.changed.items())
    source, target = found.source.path, found.target.path
    table = Table(
        title=f"From {source.name} alone: {target.name} ({changed or 'the same settings'})", title_justify="left"
    )
    for name in ("", "hit ratio", "error", "mean TTFT", "error", "mean e2e", "error"):
        table.add_column(name, justify="right" if name else "left")
    for name, means in ((source.name, found.source.measured), (target.name, found.target.measured)):
        ttft, e2e = _seconds(means.ttft_seconds), _seconds(means.e2e_seconds)
        table.add_row(name, f"{means.hit_ratio:.2%}", "", ttft, "", e2e, "")
    for one in found.predictions:
        means, errors = one.means, one.errors
        table.add_row(
            one.basis,
            f"{means.hit_ratio:.2%}",
            f"{errors.hit_ratio:+.2f} pts",
            _seconds(means.ttft_seconds),
            f"{errors.ttft_seconds:+.1%}",
            _seconds(means.e2e_seconds),
            f"{errors.e2e_seconds:+.1%}",
        )
    console.print(table)
    ratio = f"{found.step_ratio:.3f} times" if math.isfinite(found.step_ratio) else "an unknown number of times"
    console.print(
        f"Steps of {target.name} last {ratio} as long as those of {source.name} for equal batches; "
        f"{found.same_requests} of {len(found.target.identities)} requests have the same content in both.\n",
        style="dim",
    )


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1.0 else f"{1000.0 * value:.1f} ms"


def _document(found: Counterfactual) -> dict[str, Any]:
    return {
        "source": str(found.source.path),
        "target": str(found.target.path),
        "changed": {name: [str(old), str(new)] for name, (old, new) in found.changed.items()},
        "requests": len(found.target.identities),
        "same_requests": found.same_requests,
        "step_ratio": found.step_ratio if math.isfinite(found.step_ratio) else None,
        "measured": asdict(found.target.measured),
        "predicted": {
            one.basis: {"means": asdict(one.means), "errors": asdict(one.errors)} for one in found.predictions
        },
    }
