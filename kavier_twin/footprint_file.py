"""Footprint settings from files: the settings themselves, and the carbon intensity that they point at."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from connectors.series import CARBON_COLUMN, HIGHEST_CARBON, SeriesError, read_series
from kavier_twin.errors import UserError
from kavier_twin.simulation.footprint import Footprint
from kavier_twin.simulation.settings import FleetSettings

Fleet = TypeVar("Fleet", bound=FleetSettings)


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
