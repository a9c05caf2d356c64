"""What the paper's experiments share: its tables, what is known of its trace, and our engine on its machines."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kavier_twin.errors import UserError
from kavier_twin.hardware.fleet_file import Hardware
from kavier_twin.hardware.roofline import step_time
from kavier_twin.simulation.settings import EngineSettings, FleetSettings
from kavier_twin.simulation.workload import Workload
from kavier_twin.studies.kavier.model import Gpu, prefill_seconds

Floats = npt.NDArray[np.float64]

HOUR_SECONDS: Final = 3600.0
# The paper's trace ("Marconi") is not published with the capsule. Its sums are:
# requests and prompt tokens printed by experiment3/figures_generation/experiment_3_mf10-mf13.ipynb; output tokens from
# the rate of 0.0003107908 printed there (to 172 tokens).
MARCONI_REQUESTS: Final = 96_870
MARCONI_PROMPT_TOKENS: Final = 1_041_916_164
MARCONI_OUTPUT_TOKENS: Final = 30_616_657
MODELS: Final = {  # Kavier's names, and the catalogue's
    "Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    "Llama-2-13B": "meta-llama/Llama-2-13b",
    "Granite-20B": "ibm-granite/granite-20b-code-base-8k",
    "MPT-30B": "mosaicml/mpt-30b",
}
CARDS: Final = {"A10": "a10", "A100": "a100 pcie 80gb"}


def prefill_seconds_of_sums(parameters: float, gpu: Gpu) -> float:
    """All prefills of the paper's trace by Kavier's formula: it is affine in the tokens, so the sums suffice."""
    each = float(prefill_seconds(0, parameters, gpu))
    return MARCONI_REQUESTS * each + MARCONI_PROMPT_TOKENS * (float(prefill_seconds(1, parameters, gpu)) - each)


def engine(gpu: str, model: str, max_model_len: int) -> FleetSettings:
    """One vLLM with the catalogue's blocks and the roofline's step times, whatever else is installed.

    Its context is longer than the model's own where the experiment needs that.
    """
    hardware = Hardware(gpu=CARDS[gpu], model=MODELS[model])
    settings = hardware.engine({"max_model_len": max(max_model_len, hardware.shape.max_model_len)})
    return FleetSettings(
        engine=EngineSettings(**settings), step_time=step_time(hardware.card, hardware.shape, hardware.deployment())
    )


def longest(workload: Workload) -> int:
    """A `max_model_len` that takes every request."""
    return int((workload.prompt + workload.output).max()) + 1


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of one of the paper's tables. Raises UserError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                {(name or "").strip(): (value or "").strip() for name, value in row.items() if isinstance(value, str)}
                for row in csv.DictReader(file)
            ]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: {why}; give the folder of the paper's tables as DATA") from None


def column(rows: Iterable[dict[str, str]], name: str) -> Floats:
    """The numbers of a column. Raises UserError."""
    return np.array([number(row, name) for row in rows])


def number(row: dict[str, str], name: str) -> float:
    """The number in a column of one row. Raises UserError."""
    try:
        return float(row[name])
    except (KeyError, ValueError):
        raise UserError(f"the paper's table has no number in column {name!r} of {row}; correct it there") from None
