"""What the catalogue alone says of a deployment: the engine's step times and its number of KV blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from kavier_twin.catalog.errors import CatalogError
from kavier_twin.errors import UserError
from kavier_twin.simulation.settings import EngineSettings, StepTime

# Client to engine and back, where a client over HTTP measured.
FRONTEND_SECONDS: Final = 0.005
# Where neither the data nor the catalogue tells the number of KV blocks: so many that memory never decides anything.
PLENTY_OF_BLOCKS: Final = 1 << 18


class Deployment(NamedTuple):
    """A model on GPUs behind one engine, as far as a data set tells. `engine` has `EngineSettings` by name."""

    model: str | None
    gpu: str | None
    engine: Mapping[str, Any]
    tensor_parallel: int = 1
    quantization: str | None = None  # None: as the model is published
    gpu_memory_utilization: float = 0.9


class Prior(NamedTuple):
    """The engine with its blocks, its step times, and the least that each coefficient can be at the GPU's peak."""

    engine: EngineSettings
    step_time: StepTime
    floor: StepTime | None


def engine_settings(deployment: Deployment, num_gpu_blocks: int, where: str) -> EngineSettings:
    """The engine as the data tells it; `num_gpu_blocks` is used where it does not. Raises UserError naming `where`."""
    told = {name: value for name, value in deployment.engine.items() if name in EngineSettings.model_fields}
    if told.get("kv_cache_dtype") not in ("auto", "fp8", None):
        told["kv_cache_dtype"] = "fp8" if str(told["kv_cache_dtype"]).startswith("fp8") else "auto"
    try:
        return EngineSettings(**{"num_gpu_blocks": num_gpu_blocks} | told)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: engine.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def from_catalogue(deployment: Deployment, where: str) -> Prior:
    """Raises CatalogError where the model or the GPU is unknown, saying which."""
    raise CatalogError("no roofline yet")
