"""What the catalogue alone says of a server: the engine's step times and its number of KV blocks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from kavier_twin.catalog.deployment import Deployment, largest_batch
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.gpu import Gpu, find_gpu, gpus
from kavier_twin.catalog.memory import num_gpu_blocks
from kavier_twin.catalog.models import find_model
from kavier_twin.errors import UserError
from kavier_twin.simulation.roofline import Roofline, step_time
from kavier_twin.simulation.settings import EngineSettings, StepTime

# From a client over HTTP to the engine and back; vLLM's documentation and published fits tell a few milliseconds.
FRONTEND_SECONDS: Final = 0.005
# Where neither the data nor the catalogue tells the number of KV blocks: so many that memory never decides anything.
PLENTY_OF_BLOCKS: Final = 1 << 18
# vLLM's default since 0.22 is 0.92, before that it was 0.9; data sets that tell nothing are older.
_GPU_MEMORY_UTILIZATION: Final = 0.9

# Kernels at the dense peak, with nothing around them: what no calibration may go below.
_PEAK = Roofline(
    compute_share=1.0,
    bandwidth_share=1.0,
    bend=10.0,
    narrow_compute_share=1.0,
    narrow_bend=10.0,
    attention_share=1.0,
    expert_share=1.0,
    seconds_per_step=0.0,
    seconds_per_layer=0.0,
    seconds_per_narrow_layer=0.0,
    seconds_per_expert_layer=0.0,
    seconds_per_sequence=0.0,
    seconds_per_all_reduce=0.0,
    seconds_per_all_reduce_rank=0.0,
    link_share=1.0,
)


class Server(NamedTuple):
    """A model on GPUs behind one engine, as far as a data set tells; `engine` has `EngineSettings` by name."""

    model: str | None
    gpu: str | None
    deployment: Deployment
    engine: Mapping[str, Any]
    gpu_memory_utilization: float | None = None


class Prior(NamedTuple):
    """The engine with its blocks, its step times, and the least that each coefficient can be at the GPU's peak."""

    engine: EngineSettings
    step_time: StepTime
    floor: StepTime


def from_catalogue(server: Server, where: str) -> Prior:
    """Raises CatalogError where the catalogue does not know model or GPU or they do not fit, UserError for a setting
    that cannot be."""
    if server.model is None or server.gpu is None:
        raise CatalogError(f"the data names no {'model' if server.model is None else 'GPU'} of the catalogue")
    model, gpu = find_model(server.model), find_gpu(server.gpu)
    tokens, sequences = largest_batch(gpu, max_model_len=model.max_model_len)
    defaults = {
        "num_gpu_blocks": PLENTY_OF_BLOCKS,
        "max_model_len": model.max_model_len,
        "max_num_batched_tokens": tokens,
        "max_num_seqs": sequences,
    }
    engine = engine_settings(defaults | dict(server.engine), where)
    if "num_gpu_blocks" not in server.engine:
        blocks = num_gpu_blocks(
            gpu,
            model,
            server.deployment,
            gpu_memory_utilization=server.gpu_memory_utilization or _GPU_MEMORY_UTILIZATION,
            block_size=engine.block_size,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_num_seqs=engine.max_num_seqs,
        )
        engine = engine.model_copy(update={"num_gpu_blocks": blocks})
    expected = step_time(gpu, model, server.deployment)
    return Prior(engine, expected, _floor(expected, gpu, server))


def engine_settings(told: Mapping[str, Any], where: str) -> EngineSettings:
    """The engine as it was configured; what the simulation has no name for is passed over. Raises UserError."""
    known = {name: value for name, value in told.items() if name in EngineSettings.model_fields}
    if str(known.get("kv_cache_dtype", "auto")) not in ("auto", "fp8"):
        known["kv_cache_dtype"] = "fp8" if str(known["kv_cache_dtype"]).startswith("fp8") else "auto"
    try:
        return EngineSettings(**known)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: engine.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _floor(expected: StepTime, gpu: Gpu, server: Server) -> StepTime:
    assert server.model is not None
    peak = step_time(gpu, find_model(server.model), server.deployment, _PEAK)
    shares = [
        fastest / seconds
        for (_, fastest), (_, seconds) in zip(peak.linear_layers, expected.linear_layers, strict=True)
        if seconds > 0.0
    ]
    return peak.model_copy(update={"linear_scale": max(shares, default=0.0), "linear_layers": expected.linear_layers})


def gpus_named_in(text: str) -> list[str]:
    """Cards of the catalogue that a word of a name, such as a folder's, begins: `RTX4090-Llama` tells of `rtx_4090`."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    words += [first + second for first, second in itertools.pairwise(words)]
    telling = [word for word in words if len(word) > 2 and re.search(r"[a-z]", word) and re.search(r"\d", word)]
    names = {key: re.sub(r"[^a-z0-9]", "", key) for key in gpus()}
    found = {key: max((len(w) for w in telling if name.startswith(w)), default=0) for key, name in names.items()}
    longest = max(found.values(), default=0)
    return [key for key, length in found.items() if length == longest > 0]
