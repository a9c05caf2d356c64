"""What is known of an engine's step times before it was ever observed."""

from __future__ import annotations

from dataclasses import dataclass

from kavier_twin.catalog.deployment import Deployment
from kavier_twin.catalog.gpu import Gpu
from kavier_twin.catalog.model import ModelShape
from kavier_twin.hardware.operators import SiliconUnavailable, silicon_step_time
from kavier_twin.hardware.roofline import Roofline, step_time
from kavier_twin.simulation.settings import StepTime


@dataclass(frozen=True)
class Prior:
    """Step times, where they come from, and why from there."""

    step_time: StepTime
    source: str
    reason: str


def prior(gpu: Gpu, model: ModelShape, deployment: Deployment | None = None) -> Prior:
    """Step times from measured operators where there are any for this engine, else from the data sheet.

    Raises CatalogError where the model does not divide over the GPUs.
    """
    try:
        silicon = silicon_step_time(gpu, model, deployment)
    except SiliconUnavailable as error:
        own = Roofline.of(gpu) != Roofline()
        shares = "with shares measured on this card" if own else "with the shares usual on other cards"
        return Prior(step_time(gpu, model, deployment), f"roofline of {gpu.name}, {shares}", str(error))
    return Prior(
        silicon.step_time,
        silicon.source,
        f"measured operators are {silicon.measured_share:.0%} of a decode step's time",
    )
