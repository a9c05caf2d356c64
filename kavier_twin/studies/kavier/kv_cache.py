"""Experiment 2: hours on an A100 with the KV cache on and off, for four models."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kavier_twin.errors import UserError
from kavier_twin.recordings.scenario import load_scenario
from kavier_twin.simulation.kpis import Counters, Kpis, kpis
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.workload import Workload
from kavier_twin.studies.kavier.model import GPUS, PARAMETERS, decode_seconds, kavier_times, recompute_seconds
from kavier_twin.studies.kavier.paper import (
    HOUR_SECONDS,
    MARCONI_OUTPUT_TOKENS,
    MARCONI_PROMPT_TOKENS,
    MARCONI_REQUESTS,
    engine,
    longest,
    number,
    prefill_seconds_of_sums,
    read_table,
)


def kv_cache(console: Console, data: Path, trace: Path | None) -> None:
    """Print the paper's table from its trace's sums, and the same of another trace. Raises UserError."""
    published = {
        (row.get("LLM", "").lower(), row.get("KV")): row for row in read_table(data / "experiment2_kv_on_off.csv")
    }
    table = Table("model", "KV", "prefill h", "published", "decode h", "published", title="the paper's trace, A100")
    triangle = math.nan
    gpu = GPUS["A100"]
    for name, parameters in PARAMETERS.items():
        per_token = float(decode_seconds(1, parameters, gpu))
        prefill = prefill_seconds_of_sums(parameters, gpu)
        for kv in ("on", "off"):
            row = published.get((name.lower(), kv))
            if row is None:
                raise UserError(f"{data}/experiment2_kv_on_off.csv: no row of {name} with KV {kv}; add it")
            if kv == "off" and math.isnan(triangle):
                triangle = number(row, "decode_h") * HOUR_SECONDS / per_token
            tokens = MARCONI_OUTPUT_TOKENS if kv == "on" else triangle
            decode = "(taken)" if kv == "off" and name == "Llama-3-8B" else f"{tokens * per_token / HOUR_SECONDS:,.2f}"
            table.add_row(name, kv, f"{prefill / HOUR_SECONDS:,.2f}", row.get("prefill_h"), decode, row.get("decode_h"))
    console.print(table)
    console.print(
        f"From the trace's sums: {MARCONI_REQUESTS:,} requests, {MARCONI_PROMPT_TOKENS:,} prompt and "
        f"{MARCONI_OUTPUT_TOKENS:,} output tokens. The sum of n (n + 1) / 2 over its outputs is published nowhere: it "
        f"is taken from the first row ({triangle:.6g}), and the other rows follow."
    )
    if trace is not None:
        _on_trace(console, trace)


def _on_trace(console: Console, trace: Path) -> None:
    gpu = GPUS["A100"]
    workload = load_scenario(trace).observed.workload
    table = Table("model", title=f"{trace}, A100 (hours)")
    for column in ("prefill", "decode, KV on", "KV off", "off / on", "off, all recomputed", "off / on ", "our engine"):
        table.add_column(column, justify="right")
    for name, parameters in PARAMETERS.items():
        on = kavier_times(workload, parameters, gpu)
        off = kavier_times(workload, parameters, gpu, kv_cache=False)
        real_off = recompute_seconds(workload.prompt, workload.output, parameters, gpu)
        seconds = (on.decode_seconds, off.decode_seconds, real_off, on.prefill_seconds)
        hours = [float(each.sum()) / HOUR_SECONDS for each in seconds]
        with Console(stderr=True).status(f"simulating {workload.index.size:,} requests to {name}"):
            result, busy = _run_engine(engine("A100", name, longest(workload)), workload)
        table.add_row(
            name,
            f"{hours[3]:,.1f}",
            f"{hours[0]:,.1f}",
            f"{hours[1]:,.1f}",
            f"{hours[1] / hours[0]:.1f}",
            f"{hours[2]:,.1f}",
            f"{hours[2] / hours[0]:.1f}",
            f"{busy / HOUR_SECONDS:.2f}"
            + (f" ({result.requests_rejected} rejected)" if result.requests_rejected else ""),
        )
    console.print(table)
    console.print(
        "Kavier: one request after the other. All recomputed: each token a prefill of all tokens before it. Our "
        "engine: the time in which one GPU computed, prefill and decode, in batches as the trace's arrivals make them."
    )


def _run_engine(settings: FleetSettings, workload: Workload) -> tuple[Kpis, float]:
    """Its KPIs, and the seconds in which it computed."""
    fleet = simulate(settings, workload)
    after = Counters.of(fleet.state, fleet.now_seconds)
    result = kpis(fleet.collect(), None, after, start_seconds=float(workload.arrival[0]))
    return result, after.busy_seconds
