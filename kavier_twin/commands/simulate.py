"""`kavier-twin simulate`: what a fleet makes of a trace."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from connectors.traces import FORMATS
from kavier_twin.commands.closed_loop_option import FORM, ClosedLoop, parse_closed_loop
from kavier_twin.commands.figures import figure
from kavier_twin.errors import UserError
from kavier_twin.recordings.pinned import replay_pinned
from kavier_twin.recordings.scenario import CalibrateFrom, Scenario, load_scenario, read_footprint, without_trace
from kavier_twin.simulation.closed_loop import simulate_closed_loop
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.impact import Impact, impact_of_run
from kavier_twin.simulation.kpi_table import GAUGES, KPIS, LATENCIES
from kavier_twin.simulation.kpis import Counters, Distribution, Kpis, Slo, kpis
from kavier_twin.simulation.policies import POLICY_NAMES, PolicyError, apply_overrides, parse_override
from kavier_twin.simulation.runs import simulate_parts
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import FINISHED, REJECTED_KV_CAPACITY, REJECTED_LENGTH, Records
from kavier_twin.studies.export_opendc import write_opendc

_SAMPLES = 200  # points of the series over time
_SLOS = tuple(field.name for field in fields(Slo))

_FITTED_ON = {"requests": "requests that ended", "steps": "logged steps", "metrics": "scrapes with decoding"}

_EXAMPLES = f"""examples:
  kavier-twin simulate golden/chat-async --requests out.jsonl
  kavier-twin simulate mooncake.jsonl --fleet fleet.yaml --policy replicas=8 --policy router=prefix_aware
  kavier-twin simulate recording/ --policy prefix_caching=false --slo ttft_seconds=0.5 --json
  kavier-twin simulate recording/ --pin
  kavier-twin simulate --closed-loop users=64,prompt=1024,output=128,requests=640

policy settings (a number with x multiplies the fleet's own, e.g. num_gpu_blocks=0.5x):
  {", ".join(POLICY_NAMES)}
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "simulate",
        help="simulate a trace on a fleet",
        description="Simulate a trace on a fleet and report its KPIs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", nargs="?", help="trace file, golden run or recording")
    parser.add_argument("--format", choices=sorted(FORMATS), help="format of the trace (default: detected)")
    parser.add_argument("--fleet", type=Path, metavar="FLEET.yaml", help="fleet: engine, step_time, replicas, router")
    parser.add_argument(
        "--policy", action="append", default=[], metavar="NAME=VALUE", help="override a setting; can be repeated"
    )
    parser.add_argument(
        "--footprint",
        type=Path,
        metavar="FOOTPRINT.yaml",
        help="data for energy, carbon and cost: power (idle_watts, max_watts), pue, carbon, price_per_gpu_hour",
    )
    parser.add_argument(
        "--reference", action="store_true", help="use the slow reference simulation that computes each engine step"
    )
    parser.add_argument("--pin", action="store_true", help="end each request when it really ended (recordings only)")
    parser.add_argument(
        "--closed-loop",
        metavar="NAME=VALUE,...",
        help="load from users who wait for an answer before they ask again, in place of arrival times: users (how "
        "many), think (seconds, or exponential:MEAN), ramp (seconds within which they start), and, without a TRACE to "
        f"take them from, prompt and output (tokens, or LOW-HIGH), requests, seed; such as {FORM}",
    )
    parser.add_argument(
        "--calibrate-until",
        type=float,
        default=0.33,
        metavar="SHARE",
        help="fit step times to this first share of a recording (default 0.33)",
    )
    parser.add_argument(
        "--calibrate-from",
        choices=get_args(CalibrateFrom),
        default="requests",
        help="fit step times to a recording's request timings (default), its step log, or its scrapes of /metrics",
    )
    parser.add_argument(
        "--slo", action="append", default=[], metavar="NAME=SECONDS", help=f"objective for goodput: {', '.join(_SLOS)}"
    )
    parser.add_argument("--requests", type=Path, metavar="OUT.jsonl", help="write one JSON line for each request")
    parser.add_argument(
        "--export",
        nargs=2,
        metavar=("FORMAT", "DIR"),
        help="write the run for another simulator: opendc (tasks.parquet and fragments.parquet; docs/kavier.md)",
    )
    parser.add_argument("--json", action="store_true", help="print the KPIs as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if not 0.0 < args.calibrate_until <= 1.0:
        raise UserError(f"--calibrate-until {args.calibrate_until}: expected a share between 0 and 1")
    if args.pin and args.reference:
        raise UserError(
            "--pin and --reference exclude each other: a pinned run follows the recording, not the step clock"
        )
    if args.export is not None and args.export[0] != "opendc":
        raise UserError(f"--export {args.export[0]}: expected opendc, for example --export opendc workload/")
    loop = _loop(args)
    slo = _slo(args.slo)
    console = Console(stderr=True)
    with console.status("reading the trace (the first run compiles kernels)"):
        if args.trace is None:
            scenario = without_trace("closed-loop", args.fleet)
        else:
            scenario = load_scenario(
                args.trace,
                trace_format=args.format,
                fleet_file=args.fleet,
                calibrate_until=args.calibrate_until,
                calibrate_from=args.calibrate_from,
            )
        try:
            fleet_settings = apply_overrides(scenario.fleet, dict(map(parse_override, args.policy)))
            if args.footprint is not None:
                fleet_settings = fleet_settings.model_copy(update={"footprint": read_footprint(args.footprint)})
        except PolicyError as error:
            raise UserError(f"--policy: {error}") from None
    _report_rejected_lines(console, scenario)
    with console.status("simulating"):
        if loop is not None:
            fleet, outcomes = _simulate_loop(scenario, fleet_settings, loop, reference=args.reference)
        else:
            fleet, outcomes = simulate_scenario(scenario, fleet_settings, reference=args.reference, pin=args.pin)
    start = float(outcomes["arrival"].min())
    result = kpis(
        outcomes,
        None,
        Counters.of(fleet.state, fleet.now_seconds),
        start_seconds=start,
        frontend_seconds=scenario.frontend_seconds,
        samples=fleet.samples if fleet.samples.time_seconds else None,
        slo=slo,
        impact=impact_of_run(fleet, start),
    )
    if args.requests is not None:
        _write_requests(args.requests, outcomes)
    if args.export is not None:
        tasks, fragments = write_opendc(Path(args.export[1]), outcomes)
        console.print(f"{args.export[1]}: {tasks:,} tasks, {fragments:,} fragments for OpenDC")
    if args.json:
        print(json.dumps(_document(scenario, fleet, outcomes, result), allow_nan=False))
    else:
        _print(Console(), scenario, fleet_settings, outcomes, result)
    return 0


def simulate_scenario(
    scenario: Scenario, settings: FleetSettings, *, reference: bool = False, pin: bool = False
) -> tuple[Fleet, Records]:
    """The fleet at the end, sampled over time, and the outcomes in the order in which they ended. Raises UserError."""
    if pin:
        if not np.isfinite(scenario.observed.e2e_seconds).any():
            raise UserError(f"{scenario.trace.path}: --pin needs a recording that tells when each request ended")
        fleet = replay_pinned(settings, scenario.observed, scenario.frontend_seconds)
        return fleet, fleet.collect()
    records = scenario.trace.records
    span = records[-1].time_seconds - records[0].time_seconds
    return simulate_parts(settings, scenario.parts(settings), stepping=reference, sample_seconds=span / _SAMPLES)


def _loop(args: argparse.Namespace) -> ClosedLoop | None:
    if args.closed_loop is None:
        if args.trace is None:
            raise UserError("nothing to simulate: give a TRACE, or --closed-loop")
        return None
    loop = parse_closed_loop(args.closed_loop)
    if args.trace is not None and (loop.prompt or loop.output):
        raise UserError("--closed-loop: prompt and output are the TRACE's; leave them or the TRACE out")
    if args.pin:
        raise UserError("--pin and --closed-loop exclude each other: a pinned run follows the recording's arrivals")
    return loop


def _simulate_loop(
    scenario: Scenario, settings: FleetSettings, loop: ClosedLoop, *, reference: bool
) -> tuple[Fleet, Records]:
    workload = loop.started(scenario.observed.workload) if scenario.trace.records else loop.workload()
    think = loop.think_seconds(workload.index.size)
    try:
        fleet = simulate_closed_loop(
            settings,
            workload,
            loop.users,
            think,
            frontend_seconds=scenario.frontend_seconds,
            stepping=reference,
        )
    except ValueError as error:
        raise UserError(f"--closed-loop: {error}") from None
    return fleet, fleet.collect()


def _slo(texts: list[str]) -> Slo | None:
    values = {}
    for text in texts:
        name, _, seconds = text.partition("=")
        try:
            value = float(seconds)
        except ValueError:
            value = math.nan
        if name not in _SLOS or not value > 0.0:
            raise UserError(f"--slo {text}: expected NAME=SECONDS with NAME one of {', '.join(_SLOS)}")
        values[name] = value
    return Slo(**values) if values else None


def _report_rejected_lines(console: Console, scenario: Scenario) -> None:
    trace = scenario.trace
    if not trace.rejected_count:
        return
    console.print(f"[yellow]{trace.rejected_count} malformed line(s) left out:[/]")
    for line in trace.rejected[:5]:
        console.print(f"  {line.file}:{line.line}: {line.reason}: {line.detail}", highlight=False, markup=False)
    if trace.rejected_count > 5:
        console.print(f"  and {trace.rejected_count - 5} more: {dict(trace.rejected_by_reason)}", markup=False)


def _seconds(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _write_requests(path: Path, outcomes: Records) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for at in np.argsort(outcomes["index"], kind="stable"):
                row = outcomes[at]
                done = row["status"] == FINISHED
                line = {
                    "index": int(row["index"]),
                    "replica": int(row["replica"]),
                    "prompt_tokens": int(row["prompt"]),
                    "output_tokens": int(row["output"]),
                    "cached_tokens": int(row["cached"]),
                    "arrival_seconds": float(row["arrival"]),
                    "scheduled_seconds": _seconds(row["scheduled"]),
                    "first_token_seconds": _seconds(row["first_token"]),
                    "finish_seconds": float(row["finish"]) if done else None,
                    "preemptions": int(row["preemptions"]),
                }
                file.write(json.dumps(line) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--requests {path}: {error.strerror}") from None


def _rejections(outcomes: Records) -> dict[str, int]:
    return {
        "prompt_longer_than_max_model_len": int((outcomes["status"] == REJECTED_LENGTH).sum()),
        "larger_than_the_kv_cache": int((outcomes["status"] == REJECTED_KV_CAPACITY).sum()),
    }


def _document(scenario: Scenario, fleet: Fleet, outcomes: Records, result: Kpis) -> dict[str, Any]:
    calibration, samples = scenario.calibration, fleet.samples
    return {
        "trace": str(scenario.trace.path),
        "format": scenario.trace.format,
        "malformed_lines": scenario.trace.rejected_count,
        **result.to_dict(),
        "rejections": _rejections(outcomes),
        "over_time": {
            "time_seconds": samples.time_seconds,
            **dict(zip(GAUGES, (samples.running, samples.waiting, samples.kv_usage_ratio), strict=True)),
        },
        "fleet": fleet.settings.model_dump(mode="json", exclude={"footprint": {"carbon": {"points"}}}),
        "calibration": None
        if calibration is None
        else {
            "fitted_to": scenario.calibrated_from,
            "requests": calibration.requests,
            "frontend_seconds": calibration.frontend_seconds,
            "step_time": calibration.step_time.model_dump(),
            "coefficients": {
                name: {
                    "value": found.value,
                    "standard_deviation": found.deviation if math.isfinite(found.deviation) else None,
                    "determined": found.determined,
                }
                for name, found in calibration.coefficients.items()
            },
        },
    }


def _print(console: Console, scenario: Scenario, fleet: FleetSettings, outcomes: Records, result: Kpis) -> None:
    console.print(
        f"[bold]{scenario.trace.path}[/] ({scenario.trace.format}): {result.requests:,} requests, "
        f"{fleet.replicas} replica(s), {fleet.engine.num_gpu_blocks:,} blocks of {fleet.engine.block_size}; "
        f"fleet from {scenario.fleet_source}"
    )
    if scenario.calibration is not None:
        console.print(
            f"step times fitted to the first {scenario.calibration.requests} {_FITTED_ON[scenario.calibrated_from]}",
            style="dim",
        )
        if scenario.calibration.undetermined:
            console.print(
                f"not determined by these: {', '.join(scenario.calibration.undetermined)}", style="dim", highlight=False
            )
    latencies = Table("seconds", "mean", "p50", "p90", "p95", "p99", title=None)
    for name in LATENCIES:
        latencies.add_row(KPIS[name].label, *_row(getattr(result, name)))
    console.print(latencies)
    facts = Table(show_header=False)
    hits = "prefix_cache_hit_ratio"
    facts.add_row(KPIS[hits].title, f"{figure(hits, result.prefix_cache_hit_ratio)} of prompt tokens")
    facts.add_row(
        "throughput",
        f"{result.output_tokens_per_second:,.1f} output tokens/s, "
        f"{result.prompt_tokens_per_second:,.1f} prompt tokens/s, {result.requests_per_second:.3f} requests/s",
    )
    facts.add_row(
        "running / waiting", f"{result.requests_running:.2f} / {result.requests_waiting:.2f} mean" + _peaks(result)
    )
    facts.add_row(
        "KV usage",
        f"{result.kv_cache_usage_ratio:.1%} mean"
        + ("" if result.kv_cache_usage_peak_ratio is None else f", {result.kv_cache_usage_peak_ratio:.1%} peak"),
    )
    facts.add_row("preemptions, evictions", f"{result.preemptions:,}, {result.evictions:,} blocks")
    facts.add_row("engine steps", f"{result.engine_steps:,} in {result.duration_seconds:,.1f} s")
    if result.requests_rejected:
        facts.add_row(
            "rejected", ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in _rejections(outcomes).items() if n)
        )
    if result.goodput_ratio is not None:
        facts.add_row("goodput", f"{result.goodput_requests_per_second:.3f} requests/s ({result.goodput_ratio:.1%})")
    if result.impact is not None:
        for name, text in _impact_rows(result.impact):
            facts.add_row(name, text)
    console.print(facts)
    if result.impact is not None and result.impact.assumed:
        console.print(f"assumed: {'; '.join(result.impact.assumed)}", style="dim")


def _impact_rows(impact: Impact) -> Iterator[tuple[str, str]]:
    """Energy, carbon and cost for a person: what is not known is left out."""
    yield "power", f"{impact.power_watts:,.0f} W mean, PUE included"
    yield (
        "energy",
        f"{impact.energy_watt_hours_per_million_tokens:,.1f} Wh ({impact.energy_joules_per_million_tokens:,.0f} J) per "
        f"million tokens, {impact.energy_joules_per_million_output_tokens:,.0f} J per million output tokens",
    )
    if math.isfinite(impact.carbon_grams_per_million_tokens):
        yield "carbon", f"{impact.carbon_grams_per_million_tokens:,.2f} gCO2 per million tokens"
    if math.isfinite(impact.cost_per_million_tokens):
        yield "cost", f"{impact.cost_per_million_tokens:,.4f} {impact.currency} per million tokens"


def _peaks(result: Kpis) -> str:
    return (
        ""
        if result.requests_running_peak is None
        else f", {result.requests_running_peak} / {result.requests_waiting_peak} peak"
    )


def _row(values: Distribution) -> list[str]:
    numbers = (values.mean, values.p50, values.p90, values.p95, values.p99)
    return ["-" if math.isnan(number) else f"{number:.4f}" for number in numbers]
