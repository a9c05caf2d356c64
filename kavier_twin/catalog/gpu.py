"""GPU data sheets: the files in `gpus/`, one per card, every number with its source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kavier_twin.catalog.errors import CatalogError
from kavier_twin.errors import problems_of

ComputeType = Literal["fp16", "bf16", "fp8", "int8", "fp4"]
PositiveNumber = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Bend = Annotated[float, Field(ge=1.0)]

# Words of a card's name that tell no two cards apart.
_NOISE = {"nvidia", "amd", "intel", "geforce", "instinct", "tensor", "core", "gpu", "accelerator", "edition"}


class DenseTflops(BaseModel):
    """Peak matrix throughput without sparsity, accumulating in FP32 (INT8: in INT32); None where the card has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fp16: PositiveNumber
    bf16: PositiveNumber
    fp8: PositiveNumber | None
    int8: PositiveNumber | None
    fp4: PositiveNumber | None


class Gpu(BaseModel):
    """One card. Its numbers are peaks of its data sheet; what is reached of them is the roofline's matter.

    `memory_bytes` is what is soldered on, `usable_memory_bytes` what the driver reports as the device's total, of
    which vLLM takes its share. `idle_watts` are those of a card that holds an engine with nothing to do, `max_watts`
    the board's limit. Link speeds are those of one direction. The shares and bends are the roofline's
    (kavier_twin/hardware/roofline.py) and go before its defaults where somebody measured them on the card. `sources`
    names each field's source.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    aliases: tuple[str, ...] = ()
    vendor: Literal["NVIDIA", "AMD", "Intel"]
    architecture: str
    dense_tflops: DenseTflops
    memory_bandwidth_bytes_per_second: PositiveNumber
    memory_bytes: Annotated[int, Field(gt=0)]
    usable_memory_bytes: Annotated[int, Field(gt=0)]
    gpu_link_bytes_per_second: PositiveNumber
    pcie_bytes_per_second: PositiveNumber
    idle_watts: PositiveNumber
    max_watts: PositiveNumber
    compute_share: Share | None = None
    bandwidth_share: Share | None = None
    bend: Bend | None = None
    narrow_compute_share: Share | None = None
    narrow_bend: Bend | None = None
    sources: Mapping[str, str]

    @model_validator(mode="after")
    def _is_plausible(self) -> Gpu:
        plain = {"name", "aliases", "vendor", "architecture", "sources"}
        unsourced = sorted(
            field
            for field in set(type(self).model_fields) - plain
            if getattr(self, field) is not None and not self.sources.get(field)
        )
        if unsourced:
            raise ValueError(f"sources: name where {', '.join(unsourced)} come from")
        if self.usable_memory_bytes > self.memory_bytes:
            raise ValueError("usable_memory_bytes: cannot be more than memory_bytes")
        if self.idle_watts >= self.max_watts:
            raise ValueError("idle_watts: must be less than max_watts")
        return self

    def flops_per_second(self, compute: ComputeType) -> float:
        """Dense peak in floating-point (or integer) operations per second.

        A type that the card lacks runs as 16 bit: vLLM then unpacks the weights on the fly (Marlin kernels,
        vllm/model_executor/layers/quantization/utils/marlin_utils.py).
        """
        return (getattr(self.dense_tflops, compute) or self.dense_tflops.bf16) * 1e12


def _words(name: str) -> frozenset[str]:
    words = re.findall(r"[a-z0-9]+", re.sub(r"sxm\d", "sxm", name.lower()))
    return frozenset(words) - _NOISE


def read_gpu(text: str, origin: str) -> Gpu:
    """A card from the text of a YAML file. Raises CatalogError naming `origin`, the field and the fix."""
    try:
        return Gpu.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise CatalogError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise CatalogError(f"{origin}: {problems_of(error)[0]}") from None


@cache
def gpus() -> Mapping[str, Gpu]:
    """The cards that ship, by the name of their file (`h100_sxm`)."""
    files = sorted((resources.files("kavier_twin.catalog") / "gpus").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(".yaml"): read_gpu(file.read_text(encoding="utf-8"), file.name)
        for file in files
        if file.name.endswith(".yaml")
    }


@cache
def _index() -> Mapping[frozenset[str], str]:
    return {_words(name): key for key, gpu in gpus().items() for name in (key, gpu.name, *gpu.aliases)}


def find_gpu(name: str) -> Gpu:
    """The card of that name: its file's, the driver's ("NVIDIA H100 80GB HBM3"), a common one ("H100 SXM 80GB"); or
    the path of a YAML file with a card of one's own. Case, punctuation, order of words and the vendor do not matter.

    Raises CatalogError for a name that is not known, listing those that are.
    """
    if name.endswith((".yaml", ".yml")):
        try:
            return read_gpu(Path(name).read_text(encoding="utf-8"), name)
        except OSError as error:
            raise CatalogError(f"{name}: cannot be read: {error.strerror}") from None
    key = _index().get(_words(name))
    if key is None:
        raise CatalogError(
            f"GPU {name!r} is not in the catalogue; known: {', '.join(gpus())}; or give the path of a YAML file like"
            " those in kavier_twin/catalog/gpus"
        )
    return gpus()[key]
