"""What is needed to turn the work of a fleet into energy, carbon and money. See docs/energy.md."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from kavier_twin.simulation.carbon import EU_2023_GCO2_PER_KWH, CarbonIntensity

Watts = Annotated[float, Field(ge=0.0, le=1e5)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

# Uptime Institute, Global Data Center Survey 2025: average annual power usage effectiveness reported.
MEAN_PUE_2025: Final = 1.54

# Prefill draws close to the limit and decode far less: Patel et al., "Characterizing Power Management Opportunities for
# LLMs in the Cloud" (POLCA, ASPLOS 2024), and "Splitwise" (ISCA 2024). Of 700 W, a decode that mostly reads draws about
# 300 W: H100, batch 1 (Chung et al., ML.ENERGY benchmark v3, 2025); H200, at most, in four models (arXiv 2605.11999).
# Under full compute H100 and H200 are reported at 600 to 680 W.
COMPUTE_LOAD: Final = 0.9
MEMORY_LOAD: Final = 0.36


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PowerModel(_Settings):
    """Watts that one GPU board draws, linear in how its time is spent.

    watts = idle_watts + (max_watts - idle_watts) * (compute_load * c + memory_load * m)

    where c is the share of time in which it computes (nearly all of prefill, and decoded tokens in the linear layers)
    and m that in which it reads weights and KV cache (most of a decode step); at most max_watts. Linear between idle
    and maximal power as Fan, Weber and Barroso (ISCA 2007) found servers to be, and as OpenDC's `linear` model; a load
    for each of the two bottlenecks, because the phases of inference do not draw alike.
    """

    idle_watts: Watts = Field(examples=[70.0])
    """Draw of an idle GPU; from `hardware` unless given."""

    max_watts: Watts = Field(examples=[700.0])
    """The GPU's power limit; from `hardware` unless given."""

    compute_load: Share = COMPUTE_LOAD
    """Share of the way from idle to maximal draw while computing."""

    memory_load: Share = MEMORY_LOAD
    """Share of the way from idle to maximal draw while reading memory."""

    @model_validator(mode="after")
    def _more_than_idle(self) -> PowerModel:
        if self.max_watts < self.idle_watts:
            raise ValueError(f"max_watts {self.max_watts:g} is below idle_watts {self.idle_watts:g}")
        return self

    @property
    def compute_watts(self) -> float:
        """Watts above idle while it computes."""
        return (self.max_watts - self.idle_watts) * self.compute_load

    @property
    def memory_watts(self) -> float:
        """Watts above idle while it reads memory."""
        return (self.max_watts - self.idle_watts) * self.memory_load


class Footprint(_Settings):
    """The fleet's hardware and site, as far as energy, carbon and cost depend on them.

    There is no default for the GPU's power: without it nothing is reported. `pue` and `carbon` default to published
    averages, which `assumed` names. Without `price_per_gpu_hour` no cost is reported. `time_zero` is the moment that
    0 s of the stream stands for, for carbon that changes with time: the unix epoch for live streams (the default).
    """

    power: PowerModel = Field(examples=[{"idle_watts": 70, "max_watts": 700}])
    """What a GPU draws."""

    gpus_per_replica: Annotated[int, Field(ge=1, le=1024)] = 1
    """GPUs of an engine; from `hardware` unless given."""

    pue: Annotated[float, Field(ge=1.0, le=10.0)] = MEAN_PUE_2025
    """Power usage effectiveness of the site: all its energy per energy of the machines."""

    carbon: CarbonIntensity = Field(default=CarbonIntensity(gco2_per_kwh=EU_2023_GCO2_PER_KWH), examples=[210])
    """Carbon intensity of the site's electricity; a plain number will do."""

    price_per_gpu_hour: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = Field(
        default=None, examples=[2.5]
    )
    """Price of a GPU for an hour, in `currency`; without it there is no cost."""

    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = "EUR"
    """ISO 4217."""

    time_zero: AwareDatetime = Field(default=datetime.fromtimestamp(0, UTC), examples=["2026-01-31T23:00:00Z"])
    """What 0 s of a trace stands for; live streams are in unix time already."""

    def assumed(self) -> tuple[str, ...]:
        """What nobody gave and the defaults stand for, each with its value and source."""
        found = []
        if not {"compute_load", "memory_load"} <= self.power.model_fields_set:
            found.append("loads of the phases from published measurements")
        if "pue" not in self.model_fields_set:
            found.append(f"PUE {self.pue:g} (Uptime Institute's global average, 2025)")
        if "carbon" not in self.model_fields_set:
            found.append(f"{EU_2023_GCO2_PER_KWH:g} gCO2e/kWh (European Environment Agency, EU average, 2023)")
        return tuple(found)
