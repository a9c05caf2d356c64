"""`kavier-twin mirror`: a live recording played through the daemon's own path, and how right the mirror was."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kavier_twin.commands.figures import figure
from kavier_twin.commands.score_tables import wide_console
from kavier_twin.daemon.config import PoolFleet
from kavier_twin.daemon.played import REQUEST_KPIS, Minute, Played, name_of, play
from kavier_twin.errors import UserError
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.recordings.live_recording import KINDS, read_live_recording
from kavier_twin.simulation.kpi_table import GAUGES, KPIS
from kavier_twin.simulation.plain import plain

_DESCRIPTION = """Play a live recording through the daemon in fast time. Each record reaches the twin when it
really arrived. Prints mirrored and observed figures and trust by minute, and the clients' latencies if recorded.
"""
_EXAMPLES = """examples:
  kavier-twin mirror incident/
  kavier-twin mirror incident/ --without requests,kv_events
  kavier-twin mirror incident/ --fleet fleet.yaml --json > mirrored.json

files of DIR, plain or .gz, each optional but meta.json:
  kafka_requests.jsonl  {"kafka_ms": unix ms of arrival, "value": a telemetry record}
  metrics.jsonl         {"t": unix s, "text": a page of vLLM's /metrics}
  kv_events.jsonl       {"recv": unix s, "pod": ..., "seq": ..., "batch": [time, events, rank]}
  client.jsonl          {"t": unix s, "ttft": s, "e2e": s}: what clients saw
  meta.json             {"engine": {"num_gpu_blocks": ...}, "pod": ...}
"""
_POOL = "default"


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "mirror",
        help="play a live recording and compare the mirror with reality",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recording", type=Path, metavar="DIR", help="folder of the live recording")
    parser.add_argument("--fleet", type=Path, metavar="FLEET.yaml", help="fleet (default: the engine in meta.json)")
    parser.add_argument("--without", default="", metavar="KIND,...", help=f"sources to leave out: {', '.join(KINDS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    without = [kind for kind in args.without.split(",") if kind]
    for kind in without:
        if kind not in KINDS:
            raise UserError(f"--without {kind}: there is no such source; known: {', '.join(KINDS)}")
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("reading", total=1.0)
        recording = read_live_recording(args.recording, _POOL, without)
        fleet = PoolFleet(engine=recording.engine) if args.fleet is None else _fleet(args.fleet)
        progress.update(bar, description="mirroring")
        played = play(
            recording,
            fleet.settings(),
            MirrorSettings(pool=_POOL, prior=fleet.prior, floor=fleet.floor),
            calibrated=fleet.calibrated,
            given=fleet.engine_given,
            progress=lambda share: progress.update(bar, completed=share),
        )
    if args.json:
        print(json.dumps(document(played), allow_nan=False))
    else:
        _print(wide_console(), played)
    return 0


def document(played: Played) -> dict[str, Any]:
    """Plain JSON types; null where a value is not known."""
    found: dict[str, Any] = plain(asdict(played))
    return found


def _fleet(path: Path) -> PoolFleet:
    import yaml

    try:
        return PoolFleet.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--fleet {path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UserError(f"--fleet {path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--fleet {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _print(console: Console, played: Played) -> None:
    table = Table(title="mirrored / observed, by minute")
    every = dict.fromkeys([*((name, "") for name in GAUGES), *REQUEST_KPIS])
    columns = [one for one in every if any(name_of(*one) in minute.mirrored for minute in played.minutes)]
    headings = [f"{KPIS[kpi].label} {statistic}".strip() for kpi, statistic in columns]
    for heading in ("minute", *headings, "trusted", "clients TTFT p99, e2e p95"):
        table.add_column(heading, justify="right")
    for number, minute in enumerate(played.minutes):
        values = [_pair(minute, *column) for column in columns]
        seen = ", ".join(format(value, ".2f") for value in minute.clients.values())
        table.add_row(str(number), *values, f"{minute.pool_trusted:.0%}", seen)
    console.print(table)
    results = ", ".join(f"{name} {count}" for name, count in sorted(played.records.items()))
    console.print(f"{played.finished_requests} requests finished; records: {results}.", highlight=False)
    console.print(f"Prefix hits predicted to the token: {played.exact_cache_ratio:.1%} of the last requests.")


def _pair(minute: Minute, kpi: str, statistic: str) -> str:
    name = name_of(kpi, statistic)
    if name not in minute.mirrored:
        return "–"
    return f"{figure(kpi, minute.mirrored[name])} / {figure(kpi, minute.observed[name])}"
