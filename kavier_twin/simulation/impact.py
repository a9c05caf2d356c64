"""Energy, carbon and cost of a stretch of simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.footprint import Footprint
from kavier_twin.simulation.power import (
    JOULES_PER_KWH,
    JOULES_PER_WH,
    Energy,
    PhaseSeconds,
    Reading,
    energy,
    phase_seconds,
)
from kavier_twin.simulation.settings import FleetSettings

_MILLION = 1e6


@dataclass(frozen=True)
class Impact:
    """All of it at the site's meter: GPU boards times PUE. NaN: not known, or no token to divide by.

    Tokens are those served: prompts (cached tokens included, counted at the first token) and outputs.
    `energy_joules` is the sum of the four after it.
    """

    power_watts: float
    energy_joules: float
    energy_idle_joules: float
    energy_prefill_joules: float
    energy_decode_joules: float
    energy_reading_joules: float
    energy_joules_per_million_tokens: float
    energy_watt_hours_per_million_tokens: float
    energy_joules_per_million_output_tokens: float
    carbon_grams: float
    carbon_grams_per_million_tokens: float
    gpu_hours: float
    cost: float
    cost_per_million_tokens: float
    currency: str
    assumed: tuple[str, ...]


def impact(
    settings: FleetSettings, readings: Sequence[Reading], prompt_tokens: int, output_tokens: int
) -> Impact | None:
    """From the first reading to the last (at least two, ascending); None where the fleet's footprint is not told.

    Carbon is summed between readings: the mean intensity there times the energy there. More readings follow a changing
    intensity more closely.
    """
    footprint = settings.footprint
    if footprint is None:
        return None
    parts = [_energy(settings, footprint, before, after) for before, after in pairwise(readings)]
    total = Energy(*map(sum, zip(*parts, strict=True)))
    joules = sum(total)
    grams = sum(_grams(footprint, *pair, sum(part)) for pair, part in zip(pairwise(readings), parts, strict=True))
    first, last = readings[0], readings[-1]
    gpu_hours = footprint.gpus_per_replica * (last.alive_seconds - first.alive_seconds) / 3600.0
    cost = math.nan if footprint.price_per_gpu_hour is None else footprint.price_per_gpu_hour * gpu_hours
    tokens = prompt_tokens + output_tokens
    return Impact(
        power_watts=_ratio(joules, last.time_seconds - first.time_seconds),
        energy_joules=joules,
        energy_idle_joules=total.idle,
        energy_prefill_joules=total.prefill,
        energy_decode_joules=total.decode,
        energy_reading_joules=total.reading,
        energy_joules_per_million_tokens=_MILLION * _ratio(joules, tokens),
        energy_watt_hours_per_million_tokens=_MILLION * _ratio(joules / JOULES_PER_WH, tokens),
        energy_joules_per_million_output_tokens=_MILLION * _ratio(joules, output_tokens),
        carbon_grams=grams,
        carbon_grams_per_million_tokens=_MILLION * _ratio(grams, tokens),
        gpu_hours=gpu_hours,
        cost=cost,
        cost_per_million_tokens=_MILLION * _ratio(cost, tokens),
        currency=footprint.currency,
        assumed=footprint.assumed(),
    )


def impact_of_run(fleet: Fleet, start_seconds: float) -> Impact | None:
    """Of all that a cold fleet did, from `start_seconds` (before its first request) to its present."""
    last = Reading.of(fleet.state, fleet.now_seconds)
    between = [sample for sample in fleet.samples.readings if start_seconds < sample.time_seconds < last.time_seconds]
    replicas = fleet.state.replicas
    return impact(
        fleet.settings,
        [last.at_start(fleet.state, start_seconds), *between, last],
        int(replicas["prompt_tokens"].sum()),
        int(replicas["output_tokens"].sum()),
    )


def _energy(settings: FleetSettings, footprint: Footprint, before: Reading, after: Reading) -> Energy:
    """Joules at the site's meter between two readings."""
    gpus = footprint.gpus_per_replica
    phases = PhaseSeconds(*(gpus * seconds for seconds in phase_seconds(before, after, settings.step_time)))
    boards = energy(footprint.power, gpus * (after.alive_seconds - before.alive_seconds), phases)
    return Energy(*(footprint.pue * joules for joules in boards))


def _grams(footprint: Footprint, before: Reading, after: Reading, joules: float) -> float:
    zero = footprint.time_zero.timestamp()
    intensity = footprint.carbon.mean_gco2_per_kwh(zero + before.time_seconds, zero + after.time_seconds)
    return intensity * joules / JOULES_PER_KWH


def _ratio(amount: float, of: float) -> float:
    return amount / of if of > 0 else math.nan
