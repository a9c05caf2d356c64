"""From what an operator knows, the GPU and the model, to what the simulation needs: cache blocks and step times."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from connectors.series import CARBON_COLUMN, HIGHEST_CARBON, SeriesError, read_series
from kavier_twin.catalog.deployment import Deployment, check, largest_batch
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.gpu import Gpu, find_gpu
from kavier_twin.catalog.memory import num_gpu_blocks
from kavier_twin.catalog.model import ModelShape, QuantizationName
from kavier_twin.catalog.models import find_model
from kavier_twin.errors import UserError
from kavier_twin.hardware.operators import Prior, prior
from kavier_twin.hardware.roofline import Roofline, step_time
from kavier_twin.simulation.footprint import Footprint
from kavier_twin.simulation.settings import FleetSettings, StepTime

Fleet = TypeVar("Fleet", bound=FleetSettings)


class Hardware(BaseModel):
    """What one engine runs on and what it serves.

    `gpu` and `model` are names of the catalogue or paths of a card's YAML and a model's `config.json`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    gpu: str = Field(examples=["H100 SXM 80GB"])
    """A name of the catalogue, or the path of a card's YAML."""

    model: str = Field(examples=["meta-llama/Llama-3.1-8B"])
    """A name of the catalogue, or the path of a model's config.json."""

    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that share each layer (`--tensor-parallel-size`)."""

    data_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Ranks with requests of their own (`--data-parallel-size`)."""

    enable_expert_parallel: bool = False
    """Whether whole experts are spread over the GPUs (`--enable-expert-parallel`)."""

    quantization: QuantizationName | None = Field(default=None, examples=["fp8"])
    """How weights are kept; as published unless given."""

    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.92
    """Share of the GPU's memory that vLLM takes (`--gpu-memory-utilization`)."""

    @field_validator("gpu")
    @classmethod
    def _known_gpu(cls, name: str) -> str:
        _or_value_error(find_gpu, name)
        return name

    @field_validator("model")
    @classmethod
    def _known_model(cls, name: str) -> str:
        _or_value_error(find_model, name)
        return name

    @model_validator(mode="after")
    def _divides(self) -> Hardware:
        _or_value_error(check, self.shape, self.deployment())
        return self

    @property
    def card(self) -> Gpu:
        """The GPU's data sheet."""
        return find_gpu(self.gpu)

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return find_model(self.model)

    def deployment(self, kv_cache_dtype: Any = "auto") -> Deployment:
        """As the catalogue takes it."""
        return Deployment(
            tensor_parallel_size=self.tensor_parallel_size,
            data_parallel_size=self.data_parallel_size,
            enable_expert_parallel=self.enable_expert_parallel,
            quantization=self.quantization,
            kv_cache_dtype=kv_cache_dtype,
        )

    def step_time(self, kv_cache_dtype: Any = "auto") -> StepTime:
        """Step times before anything was observed: from measured operators where there are any, else data sheets."""
        return _prior(self, kv_cache_dtype).step_time

    def floor(self, kv_cache_dtype: Any = "auto") -> StepTime:
        """Coefficients at the dense peak of everything: a calibration below would claim more than the GPU has."""
        peak = step_time(self.card, self.shape, self.deployment(kv_cache_dtype), Roofline.peak())
        prior = self.step_time(kv_cache_dtype)
        scale = max(peak.linear_seconds(tokens) / usual for tokens, usual in prior.linear_layers)
        least = peak.model_copy(update={"linear_scale": scale}).coefficients()
        # What measured operators have elsewhere than the data sheet's roofline has no floor of its own.
        return prior.with_coefficients(np.minimum(least, prior.coefficients()))

    def footprint(self, given: Any) -> Any:
        """Footprint settings with the card's watts and the GPUs of an engine, `given` ones first; null stays null.

        An engine is one data-parallel rank: it has the GPUs of its tensor parallelism to itself.
        """
        if not isinstance(given, Mapping):
            return given
        watts = {"idle_watts": self.card.idle_watts, "max_watts": self.card.max_watts}
        power = given.get("power", {})
        power = {**watts, **power} if isinstance(power, Mapping) else power
        return {"gpus_per_replica": self.tensor_parallel_size, **given, "power": power}

    def engine(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Engine settings as vLLM would choose them here, `given` ones first. Raises CatalogError if nothing fits."""
        shape = self.shape
        kv_dtype = given.get("kv_cache_dtype", "auto")
        if kv_dtype == "auto":  # vLLM takes it from the checkpoint
            kv_dtype = shape.kv_cache_dtype
        deployment = self.deployment(kv_dtype)
        check(shape, deployment)
        gpus = self.tensor_parallel_size
        length = given.get("max_model_len", shape.max_model_len)
        tokens, sequences = largest_batch(self.card, max_model_len=length)
        engine = {
            "max_num_batched_tokens": tokens,
            "max_num_seqs": sequences,
            "max_model_len": length,
            "block_size": 16,
            # What vLLM's offloading counts: the bytes on every GPU of the engine (v1/kv_offload/cpu/spec.py).
            "kv_bytes_per_token": gpus * shape.kv_bytes_per_token("fp8" if kv_dtype == "fp8" else "auto", gpus),
            **given,
            "kv_cache_dtype": kv_dtype,
        }
        if "num_gpu_blocks" not in given:
            engine["num_gpu_blocks"] = num_gpu_blocks(
                self.card,
                shape,
                deployment,
                gpu_memory_utilization=self.gpu_memory_utilization,
                block_size=engine["block_size"],
                max_num_batched_tokens=engine["max_num_batched_tokens"],
                max_num_seqs=engine["max_num_seqs"],
            )
        return engine


class FleetFile(FleetSettings):
    """A fleet as a user describes it: with `hardware`, the number of blocks, vLLM's limits, the step times and the
    GPUs' power follow where they are not given."""

    hardware: Hardware | None = Field(
        default=None, examples=[{"gpu": "H100 SXM 80GB", "model": "meta-llama/Llama-3.1-8B"}]
    )
    """What an engine runs on; what follows from it need not be given."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or not isinstance(content.get("hardware"), Mapping):
            return content
        try:
            hardware = Hardware.model_validate(content["hardware"])
        except ValidationError:
            # Told when the field itself is checked; what would have followed from it is not missing.
            stand_in = {"engine": {"num_gpu_blocks": 2}, "step_time": {"fixed": 1.0}, **content}
            if isinstance(content.get("footprint"), Mapping):
                stand_in["footprint"] = {"power": {"idle_watts": 0.0, "max_watts": 0.0}, **content["footprint"]}
            return stand_in
        given = content.get("engine")
        try:
            engine = hardware.engine(given if isinstance(given, Mapping) else {})
        except (CatalogError, TypeError) as error:
            raise ValueError(str(error)) from None
        footprint = hardware.footprint(content.get("footprint", {}))
        filled = {**content, "hardware": hardware, "engine": engine, "footprint": footprint}
        if "step_time" not in content:  # seconds of reading where measured operators are installed
            filled["step_time"] = hardware.step_time(engine.get("kv_cache_dtype", "auto"))
        return filled

    @property
    def prior(self) -> StepTime | None:
        """What data sheets say of the step time; None without `hardware`."""
        return None if self.hardware is None else self.hardware.step_time(self.engine.kv_cache_dtype)

    @property
    def step_time_source(self) -> str:
        """Where the step times come from, for a report."""
        if self.hardware is None or self.step_time != self.prior:
            return "as given"
        found = _prior(self.hardware, self.engine.kv_cache_dtype)
        rule = self.hardware.shape.rule
        return f"{found.source} ({found.reason})" + (f"; {rule}" if rule else "")

    @property
    def floor(self) -> StepTime | None:
        """What no step can be faster than."""
        return None if self.hardware is None else self.hardware.floor(self.engine.kv_cache_dtype)

    def settings(self) -> FleetSettings:
        """As the simulation takes it."""
        return FleetSettings(**{name: getattr(self, name) for name in FleetSettings.model_fields})


@cache
def _prior(hardware: Hardware, kv_cache_dtype: str) -> Prior:
    return prior(hardware.card, hardware.shape, hardware.deployment(kv_cache_dtype))


def _or_value_error(look: Any, *what: Any) -> None:
    """Pydantic reports a ValueError at its field."""
    try:
        look(*what)
    except CatalogError as error:
        raise ValueError(str(error)) from None


def with_carbon_read(footprint: Footprint, directory: Path) -> Footprint:
    """The footprint with its carbon file, if any, read; a relative path counts from `directory`. Raises UserError."""
    if footprint.carbon.file is None:
        return footprint
    path = directory / footprint.carbon.file
    try:
        points = read_series(path, CARBON_COLUMN, HIGHEST_CARBON)
    except SeriesError as error:
        raise UserError(str(error)) from None
    carbon = footprint.carbon.model_copy(update={"file": path, "points": points})
    return footprint.model_copy(update={"carbon": carbon})


def fleet_with_carbon_read(fleet: Fleet, directory: Path) -> Fleet:
    """The same for the footprint of a fleet, if it has one. Raises UserError."""
    if fleet.footprint is None:
        return fleet
    return fleet.model_copy(update={"footprint": with_carbon_read(fleet.footprint, directory)})
