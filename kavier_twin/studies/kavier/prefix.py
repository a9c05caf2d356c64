"""Experiment 3: hit ratio and prefill hours of Kavier's caches of prompts, beside a real block cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kavier_twin.errors import UserError
from kavier_twin.recordings.scenario import load_scenario
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.state import FINISHED
from kavier_twin.simulation.workload import Workload
from kavier_twin.studies.kavier.model import (
    GPUS,
    PARAMETERS,
    Gpu,
    PrefixPolicy,
    Scope,
    kavier_times,
    prefill_seconds,
    prefix_hits,
    seen_before_tokens,
)
from kavier_twin.studies.kavier.paper import (
    HOUR_SECONDS,
    MARCONI_REQUESTS,
    Floats,
    engine,
    longest,
    number,
    prefill_seconds_of_sums,
    read_table,
)


def prefix(
    console: Console, data: Path, trace: Path | None, min_tokens: list[int], entries: list[int], scope: Scope
) -> None:
    """Print the published table, and both kinds of cache on another trace. Raises UserError."""
    gpu, parameters = GPUS["A10"], PARAMETERS["Llama-3-8B"]
    rows = read_table(data / "experiment3_prefix_policies.csv")
    off = prefill_seconds_of_sums(parameters, gpu) / HOUR_SECONDS
    table = Table("min tokens", "entries", "hit ratio", "prefill h", "prompt tokens of a hit", title="published, A10")
    for row in rows:
        hours, hit = number(row, "prefill_time [h]"), number(row, "hit_ratio [%]") / 100.0
        skipped = "-"
        if hit > 0.0:  # what a skipped prefill must have been for this many hits to save this much
            each = (off - hours) * HOUR_SECONDS / (hit * MARCONI_REQUESTS)
            skipped = f"{(each - float(prefill_seconds(0, parameters, gpu))) / _per_prompt_token(parameters, gpu):,.0f}"
        given = (row.get("prefix_cache_min_tokens"), row.get("max_cached_prompts"))
        table.add_row(*given, f"{hit:.2%}", f"{hours:.2f}", skipped)
    console.print(table)
    console.print(f"The model here, without a cache, from the trace's sums: {off:.2f} h.")
    if trace is not None:
        _on_trace(console, trace, min_tokens, entries, scope)


def _on_trace(console: Console, trace: Path, min_tokens: list[int], entries: list[int], scope: Scope) -> None:
    gpu, parameters = GPUS["A10"], PARAMETERS["Llama-3-8B"]
    workload = load_scenario(trace).observed.workload
    shared = seen_before_tokens(workload)
    if not shared.any():
        raise UserError(f"{trace}: no prompt shares hashed blocks with an earlier one: nothing to compare")
    alone = kavier_times(workload, parameters, gpu)
    total = float(alone.prefill_seconds.sum())
    table = Table(title=f"{trace}, A10, Llama-3-8B")
    table.add_column("policy", no_wrap=True)
    for column in ("requests that hit", "tokens skipped", "of them seen before", "prefill h", "saved"):
        table.add_column(column, justify="right")
    table.add_row("none", "0.00 %", "0.00 %", "-", f"{total / HOUR_SECONDS:.2f}", "0.0 %")
    prompt_tokens = int(workload.prompt.sum())
    for prompts in entries:
        for tokens in min_tokens:
            policy = PrefixPolicy("prefill", tokens, prompts, scope)
            try:
                hit = prefix_hits(workload, policy)
            except ValueError as error:
                raise UserError(f"--min-tokens {tokens}: {error}") from None
            skipped = int(workload.prompt[hit].sum())
            table.add_row(
                f"Kavier: {tokens} tokens, {prompts} prompts, {scope}",
                f"{hit.mean():.2%}",
                f"{skipped / prompt_tokens:.2%}",
                f"{shared[hit].sum() / skipped:.1%}" if skipped else "-",
                *_prefill_columns(np.where(hit, 0.0, alone.prefill_seconds), total),
            )
    table.add_section()
    with Console(stderr=True).status(f"simulating {workload.index.size:,} requests"):
        for label, settings in (
            ("block cache of one A10", engine("A10", "Llama-3-8B", longest(workload))),
            ("block cache that evicts nothing", _unlimited(workload)),
        ):
            outcomes = simulate(settings, workload).collect()
            done = outcomes[outcomes["status"] == FINISHED]
            computed = done["prompt"] - done["cached"]
            rejected = outcomes.size - done.size
            seconds = prefill_seconds(computed, parameters, gpu)
            of = float(prefill_seconds(done["prompt"], parameters, gpu).sum())
            table.add_row(
                label + (f" ({rejected:,} too large for it)" if rejected else ""),
                f"{(done['cached'] > 0).mean():.2%}",
                f"{done['cached'].sum() / done['prompt'].sum():.2%}",
                "100.0%",
                *_prefill_columns(seconds, of),
            )
    console.print(table)
    console.print("Hours by Kavier's prefill formula in every row; the block caches pay it for the tokens not cached.")


def _prefill_columns(seconds: Floats, total: float) -> tuple[str, str]:
    return f"{float(seconds.sum()) / HOUR_SECONDS:.2f}", f"{1.0 - float(seconds.sum()) / total:.1%}"


def _unlimited(workload: Workload) -> FleetSettings:
    """One A10 with room for every token of the workload."""
    settings = engine("A10", "Llama-3-8B", longest(workload))
    tokens = int((workload.prompt + workload.output).sum())
    blocks = tokens // settings.engine.block_size + workload.index.size + 2
    return settings.model_copy(update={"engine": settings.engine.model_copy(update={"num_gpu_blocks": blocks})})


def _per_prompt_token(parameters: float, gpu: Gpu) -> float:
    return float(prefill_seconds(1, parameters, gpu) - prefill_seconds(0, parameters, gpu))
