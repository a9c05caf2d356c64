"""Experiment 1: seconds of prefill and decode on an A10, beside the measured ones."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from kavier_twin.errors import UserError
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.workload import make_workload
from kavier_twin.studies.kavier.model import GPUS, PARAMETERS, decode_seconds, prefill_seconds
from kavier_twin.studies.kavier.paper import Floats, column, engine, read_table

_DECODE_PROMPT_TOKENS: Final = 7  # of every row of input_decode_accuracy.csv


def accuracy(console: Console, data: Path) -> None:
    """Print both tables. Raises UserError."""
    points = read_table(data / "prefill_decode_accuracy.csv")
    inputs = read_table(data / "input_decode_accuracy.csv")
    sizes = column(points, "prompt_size").astype(np.int64)
    by_size = dict(zip(column(inputs, "session_id"), column(inputs, "num_output_tokens"), strict=True))
    missing = [str(size) for size in sizes if size not in by_size]
    if missing:
        raise UserError(f"{data}/input_decode_accuracy.csv: no session_id {', '.join(missing)}; add the rows")
    outputs = np.array([by_size[size] for size in sizes]).astype(np.int64)
    gpu, parameters = GPUS["A10"], PARAMETERS["Llama-3-8B"]
    again_prefill = prefill_seconds(sizes, parameters, gpu)
    again_decode = prefill_seconds(_DECODE_PROMPT_TOKENS, parameters, gpu) + decode_seconds(outputs, parameters, gpu)
    with Console(stderr=True).status("simulating (the first run compiles kernels)"):
        ours_prefill, ours_decode = _alone(sizes, outputs)
    for name, again, ours in (("prefill", again_prefill, ours_prefill), ("decode", again_decode, ours_decode)):
        published, real = column(points, f"kavier_{name}"), column(points, f"reality_{name}")
        of = "prompt" if name == "prefill" else "output"
        table = Table(f"{of} tokens", "measured s", "Kavier's s", "its model here", "our engine", title=name)
        for row in zip(sizes if name == "prefill" else outputs, real, published, again, ours, strict=True):
            table.add_row(f"{row[0]:,}", *(f"{value:.3f}" for value in row[1:]))
        table.add_row("MAPE", "", *(f"{_mape(values, real):.2f} %" for values in (published, again, ours)))
        console.print(table)
        same = int((np.floor(again * 1000.0 + 1e-6) == np.round(published * 1000.0)).sum())
        console.print(f"{same} of {sizes.size} published figures are the model's here, cut to milliseconds")
    slope = np.polyfit(outputs, column(points, "reality_decode"), 1)[0]
    console.print(
        f"measured: {1000 * slope:.2f} ms a decoded token; reading 16 GB of weights at 600 GB/s takes 26.67 ms, "
        f"so the share of the bandwidth is {0.016 / 0.6 / slope:.1%}"
    )


def _alone(prompts: npt.NDArray[np.int64], outputs: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """What our engine makes of prompts alone (time to the first token), and of outputs after a short prompt (e2e)."""
    longest = int(max(prompts.max(), outputs.max())) + _DECODE_PROMPT_TOKENS + 1
    settings = engine("A10", "Llama-3-8B", longest)
    prompt = np.concatenate([prompts, np.full(outputs.size, _DECODE_PROMPT_TOKENS)])
    output = np.concatenate([np.ones(prompts.size, np.int64), outputs])
    workload = make_workload(np.arange(prompt.size) * 1e4, prompt, output)
    outcomes = simulate(settings, workload).collect()
    outcomes = outcomes[np.argsort(outcomes["index"])]
    seconds = outcomes["finish"] - outcomes["arrival"]
    return seconds[: prompts.size], seconds[prompts.size :]


def _mape(predicted: Floats, real: Floats) -> float:
    """Mean absolute percentage error, as the capsule's notebook takes it."""
    return float(np.mean(np.abs((real - predicted) / real)) * 100.0)
