"""What the catalogue alone says of a server: the engine's step times and its number of KV blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from kavier_twin.catalog.deployment import Deployment, check
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.gpu import find_gpu, gpus
from kavier_twin.catalog.models import find_model
from kavier_twin.errors import UserError, problems_of
from kavier_twin.hardware.fleet_file import Hardware
from kavier_twin.hardware.operators import SiliconUnavailable, silicon_step_time
from kavier_twin.hardware.roofline import step_time
from kavier_twin.simulation.settings import EngineSettings, StepTime

# From a client over HTTP to the engine and back, where nothing was measured.
FRONTEND_SECONDS: Final = 0.005
# Where neither the data nor the catalogue tells the number of KV blocks: so many that memory never decides anything.
PLENTY_OF_BLOCKS: Final = 1 << 18
# vLLM's default was 0.9 before 0.92 came with version 0.22; data sets that tell nothing are older.
_GPU_MEMORY_UTILIZATION: Final = 0.9


CATALOGUE: Final = "from the catalogue alone"
OPERATORS: Final = "from measured operators"


class Server(NamedTuple):
    """A model on GPUs behind one engine, as far as a data set tells; `engine` has `EngineSettings` by name."""

    model: str | None
    gpu: str | None
    deployment: Deployment
    engine: Mapping[str, Any]
    gpu_memory_utilization: float | None = None


class Prior(NamedTuple):
    """The engine with its blocks, its step times by what they follow from, and what no step can be faster than."""

    engine: EngineSettings
    step_times: dict[str, StepTime]  # the better the later
    floor: StepTime

    @property
    def best(self) -> StepTime:
        """Where calibration starts."""
        return list(self.step_times.values())[-1]


def from_catalogue(server: Server, where: str) -> Prior:
    """Raises CatalogError where the catalogue does not know model or GPU or they do not fit, UserError for a setting
    that cannot be."""
    if server.model is None or server.gpu is None:
        raise CatalogError(f"the data names no {'model' if server.model is None else 'GPU'} of the catalogue")
    check(find_model(server.model), server.deployment)
    find_gpu(server.gpu)
    hardware = Hardware(
        gpu=server.gpu,
        model=server.model,
        tensor_parallel_size=server.deployment.tensor_parallel_size,
        data_parallel_size=server.deployment.data_parallel_size,
        enable_expert_parallel=server.deployment.enable_expert_parallel,
        quantization=server.deployment.quantization,
        gpu_memory_utilization=server.gpu_memory_utilization or _GPU_MEMORY_UTILIZATION,
    )
    told = told_settings(server.engine)
    engine_settings({"num_gpu_blocks": PLENTY_OF_BLOCKS, **told}, where)  # what is told is sound
    engine = engine_settings(hardware.engine(told), where)
    deployment = hardware.deployment(engine.kv_cache_dtype).model_copy(
        update={"async_scheduling": engine.async_scheduling}
    )
    step_times = {CATALOGUE: step_time(hardware.card, hardware.shape, deployment)}
    measured = _measured(server.gpu, server.model, deployment)
    if measured is not None:
        step_times[OPERATORS] = measured
    return Prior(engine, step_times, hardware.floor(engine.kv_cache_dtype))


@cache
def _measured(gpu: str, model: str, deployment: Deployment) -> StepTime | None:
    """From the database of measured operators, None where it is not installed or does not know them."""
    try:
        return silicon_step_time(find_gpu(gpu), find_model(model), deployment).step_time
    except SiliconUnavailable:
        return None


def told_settings(engine: Mapping[str, Any]) -> dict[str, Any]:
    """What of a server's configuration the simulation has a name for."""
    known = {name: value for name, value in engine.items() if name in EngineSettings.model_fields}
    if str(known.get("kv_cache_dtype", "auto")).startswith("fp8"):
        known["kv_cache_dtype"] = "fp8"
    elif "kv_cache_dtype" in known:
        known["kv_cache_dtype"] = "auto"
    return known


def engine_settings(told: Mapping[str, Any], where: str) -> EngineSettings:
    """The engine as it was configured. Raises UserError."""
    try:
        return EngineSettings(**told_settings(told))
    except ValidationError as error:
        raise UserError(f"{where}: engine.{problems_of(error)[0]}") from None


def gpus_named_in(text: str) -> list[str]:
    """Cards of the catalogue that a word of a name, such as a folder's, begins: `RTX4090-Llama` tells of `rtx_4090`."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    words += [first + second for first, second in pairwise(words)]
    telling = [word for word in words if len(word) > 2 and re.search(r"[a-z]", word) and re.search(r"\d", word)]
    names = {key: re.sub(r"[^a-z0-9]", "", key) for key in gpus()}
    found = {key: max((len(w) for w in telling if name.startswith(w)), default=0) for key, name in names.items()}
    longest = max(found.values(), default=0)
    return [key for key, length in found.items() if length == longest > 0]
