"""What `capacity` and `misses` share: one simulated run of a trace, passed through the recency stacks."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, Final

from connectors.traces import FORMATS
from kavier_twin.errors import UserError
from kavier_twin.mirror.calibration.requests import with_frontend
from kavier_twin.recordings.scenario import Scenario, load_scenario
from kavier_twin.reuse.simulated import watch_run
from kavier_twin.reuse.watch import ReuseWatch
from kavier_twin.simulation.runs import simulate

_ALL: Final = 2**62  # a trace is remembered whole


def add_command(commands: Any, name: str, says: str, description: str, examples: str) -> None:
    """Declare one of them: both take the same arguments."""
    parser = commands.add_parser(
        name,
        help=says,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="trace file, golden run or recording")
    parser.add_argument("--fleet", type=Path, metavar="FLEET.yaml", help="fleet that serves the trace")
    parser.add_argument("--format", choices=sorted(FORMATS), help="format of the trace (default: detected)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def watched(args: argparse.Namespace) -> tuple[Scenario, ReuseWatch]:
    """Simulate the trace once on the fleet as it is, and follow what each replica used last."""
    scenario = load_scenario(args.trace, trace_format=args.format, fleet_file=args.fleet)
    fleet = scenario.fleet
    workload = with_frontend(scenario.observed.workload, scenario.frontend_seconds)
    if not workload.chain.size:
        raise UserError(f"{args.trace}: no request has block hashes, so nothing is known of shared prefixes")
    watch = ReuseWatch(
        fleet.engine.block_size,
        fleet.engine.num_gpu_blocks,
        prefix_caching=fleet.engine.prefix_caching,
        follows_prefixes=fleet.router == "prefix_aware" and fleet.replicas > 1,
        window_seconds=math.inf,
        most_keys=_ALL,
        most_blocks=_ALL,
    )
    watch_run(watch, workload, simulate(fleet, workload).collect())
    if not watch.misses.total.requests:
        raise UserError(f"{args.trace}: the fleet finished no request; give it more KV blocks with --fleet")
    return scenario, watch
