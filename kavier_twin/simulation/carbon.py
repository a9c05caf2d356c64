"""How much carbon dioxide a kilowatt-hour of the site's electricity emits: a number, a daily schedule, or a series."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

HOUR_SECONDS: Final = 3_600.0
POINTS_KEPT: Final = 10_000  # of a series that grows: more than a year of hours

# European Environment Agency, greenhouse gas emission intensity of electricity generation, EU-27, estimate for 2023.
EU_2023_GCO2_PER_KWH: Final = 210.0

Intensity = Annotated[float, Field(ge=0.0, le=10_000.0)]
UnixSeconds = Annotated[float, Field(allow_inf_nan=False)]


class CarbonIntensity(BaseModel):
    """Grams of CO2 (or its equivalent: whatever the figures given count) per kilowatt-hour, over unix time in seconds.

    One of: `gco2_per_kwh` (a plain number may stand for all of this), `by_hour_utc` (24 values, the first for the hour
    that begins at midnight UTC, the same every day), or a series: `points` (unix seconds, value) or a `file` of them,
    which whoever reads the settings reads too. In a series a value holds until the next point, but no longer than
    `longest_gap_seconds`: later, and before the first point, the intensity is not known (NaN).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    gco2_per_kwh: Intensity | None = Field(default=None, examples=[210.0])
    """Grams of CO2 per kilowatt-hour, always."""

    by_hour_utc: Annotated[tuple[Intensity, ...], Field(min_length=24, max_length=24)] | None = Field(
        default=None, examples=[[210.0] * 24]
    )
    """Grams per kilowatt-hour of each hour of the day, 24 values from midnight UTC on."""

    file: Path | None = Field(default=None, examples=["carbon.csv"])
    """A CSV or JSON file of times and grams per kilowatt-hour."""

    points: tuple[tuple[UnixSeconds, Intensity], ...] = Field(default=(), examples=[[[1790000000.0, 210.0]]])
    """Pairs of unix seconds and grams per kilowatt-hour."""

    longest_gap_seconds: Annotated[float, Field(gt=0.0)] = 2 * HOUR_SECONDS
    """How long a point holds where no other follows."""

    @model_validator(mode="before")
    @classmethod
    def _a_number_will_do(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"gco2_per_kwh": value} if is_number else value

    @model_validator(mode="after")
    def _one_kind(self) -> CarbonIntensity:
        series = self.file is not None or bool(self.points)
        if (self.gco2_per_kwh is not None) + (self.by_hour_utc is not None) + series != 1:
            raise ValueError("give one of gco2_per_kwh, by_hour_utc, file or points")
        for (earlier, _), (later, _) in pairwise(self.points):
            if later <= earlier:
                raise ValueError(f"points: time {later:.15g} follows {earlier:.15g}; times must increase")
        return self

    def mean_gco2_per_kwh(self, start: float, end: float) -> float:
        """Mean over [start, end], unix seconds; NaN where any of it is not known.

        Raises ValueError for a file that nobody has read into `points`.
        """
        if self.gco2_per_kwh is not None:
            return self.gco2_per_kwh
        edges, values = self._daily(start, end) if self.by_hour_utc is not None else self._series(start, end)
        widths = np.diff(edges)
        if end <= start:
            return float(values[-1])
        return float(widths @ values) / (end - start)

    def with_point(self, time_seconds: float, gco2_per_kwh: float) -> CarbonIntensity:
        """The series with one more point, in its place in time; a point at the same time is replaced.

        Of anything but a series nothing stays: from its first point on, a series is all that is known.
        """
        others = [point for point in self.points if point[0] != time_seconds]
        points = sorted([*others, (time_seconds, gco2_per_kwh)])[-POINTS_KEPT:]
        return CarbonIntensity(points=tuple(points), longest_gap_seconds=self.longest_gap_seconds)

    def _daily(self, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        """Edges and values of the hours that cover [start, end]."""
        assert self.by_hour_utc is not None
        first = math.floor(start / HOUR_SECONDS)
        last = max(math.ceil(end / HOUR_SECONDS), first + 1)
        edges = np.clip(np.arange(first, last + 1) * HOUR_SECONDS, start, max(start, end))
        return edges, np.array(self.by_hour_utc)[np.arange(first, last) % 24]

    def _series(self, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        """Edges and values of the points that cover [start, end], NaN where none does."""
        if not self.points:
            raise ValueError(f"the carbon intensity's file {self.file} was not read")
        times, values = np.array(self.points).T
        first = int(np.searchsorted(times, start, side="right")) - 1
        last = max(first + 1, int(np.searchsorted(times, end, side="left")))
        if first < 0:
            return np.array([start, end]), np.array([np.nan])
        edges = np.append(times[first:last], end)
        known = np.diff(edges) <= self.longest_gap_seconds
        edges[0] = start
        return edges, np.where(known, values[first:last], np.nan)
