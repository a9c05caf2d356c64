"""`kavier-twin calibrate-power`: a GPU's power model from measured watts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from connectors.series import HIGHEST_WATTS, WATTS_COLUMN, SeriesError, read_series
from connectors.traces import FORMATS
from kavier_twin.commands.simulate import simulate_scenario
from kavier_twin.errors import UserError
from kavier_twin.mirror.calibration.power import PowerCalibration, calibrate_power, observe_power
from kavier_twin.mirror.calibration.requests import CalibrationError
from kavier_twin.recordings.scenario import load_scenario, read_footprint

_EPILOG = """examples:
  kavier-twin calibrate-power trace.jsonl --watts watts.csv --fleet fleet.yaml > power.yaml

format of the watts file: CSV with the columns time and watts (the mean of a GPU), for example
  time,watts
  2026-01-31T23:00:00Z,412.5
from Prometheus: avg by (pod) (DCGM_FI_DEV_POWER_USAGE). What is printed on standard output goes into the fleet's or the
footprint's settings.
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "calibrate-power",
        help="fit a GPU's power model to measured watts",
        description="Simulate a trace on a fleet and fit the power model of its GPUs to measured watts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="trace that the fleet served during the measurement")
    parser.add_argument(
        "--watts", type=Path, required=True, metavar="WATTS.csv", help="measured power of a GPU over time"
    )
    parser.add_argument("--format", choices=sorted(FORMATS), help="format of the trace (default: detected)")
    parser.add_argument("--fleet", type=Path, metavar="FLEET.yaml", help="fleet that served the trace")
    parser.add_argument("--footprint", type=Path, metavar="FOOTPRINT.yaml", help="initial power model")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    console = Console(stderr=True)
    with console.status("simulating (the first run compiles kernels)"):
        scenario = load_scenario(args.trace, trace_format=args.format, fleet_file=args.fleet)
        settings = scenario.fleet
        if args.footprint is not None:
            settings = settings.model_copy(update={"footprint": read_footprint(args.footprint)})
        if settings.footprint is None:
            raise UserError("the GPU's idle and maximum power are unknown; give them with --footprint FOOTPRINT.yaml")
        try:
            points = np.array(read_series(args.watts, WATTS_COLUMN, HIGHEST_WATTS))
        except SeriesError as error:
            raise UserError(f"--watts: {error}") from None
        fleet, _ = simulate_scenario(scenario, settings)
    times = points[:, 0] - settings.footprint.time_zero.timestamp()
    try:
        observed = observe_power(fleet.samples.readings, settings.step_time, times, points[:, 1])
        found = calibrate_power(settings.footprint.power, observed)
    except CalibrationError as error:
        raise UserError(
            f"--watts {args.watts}: {error}; check that its times match the trace's; time_zero in the "
            "footprint is the time of the trace's 0 s"
        ) from None
    _report(console, found)
    rounded = {name: float(f"{value:.4g}") for name, value in found.power.model_dump().items()}
    print(yaml.safe_dump({"power": rounded}, sort_keys=False), end="")
    return 0


def _report(console: Console, found: PowerCalibration) -> None:
    console.print(
        f"fitted to {found.stretches} stretches of time; modelled / measured energy {found.mean_ratio:.4f}", style="dim"
    )
    for name, deviation in found.deviations_watts.items():
        console.print(f"{name}: standard deviation {deviation:.1f} W", style="dim", highlight=False)
    if found.undetermined:
        console.print(
            f"[yellow]not determined by this data, the initial value is kept:[/] {', '.join(found.undetermined)}. "
            "Fitting needs periods with different shares of idle time, prefill and decode."
        )
