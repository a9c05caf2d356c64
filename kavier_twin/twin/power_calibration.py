"""The coefficients of a GPU's power model from measured watts, such as DCGM's `DCGM_FI_DEV_POWER_USAGE`.

Over each stretch of time the mean draw of a GPU is idle watts, plus compute watts for the share of time in which it
computes, plus memory watts for the share in which it reads memory: linear in the three (see `PowerModel`). They are
fitted as the step-time coefficients are (`fit.py`), with the power model in use as the prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.footprint import PowerModel
from kavier_twin.simulation.power import Reading, phase_seconds
from kavier_twin.simulation.settings import StepTime
from kavier_twin.twin.calibration import CalibrationError
from kavier_twin.twin.fit import fit

Floats = npt.NDArray[np.float64]

MINIMUM_STRETCHES: Final = 10
COEFFICIENTS: Final = ("idle_watts", "compute_load", "memory_load")


class ObservedPower(NamedTuple):
    """Stretches of time, [n] each: mean watts of a GPU, and the shares of time (0..1) it computed and read memory."""

    watts: Floats
    computing: Floats
    reading: Floats


@dataclass(frozen=True)
class PowerCalibration:
    """The fitted model. `undetermined` coefficients are the prior's, as far as the data does not speak against it."""

    power: PowerModel
    deviations_watts: dict[str, float]  # standard deviation of idle, compute and memory watts
    undetermined: tuple[str, ...]
    stretches: int
    mean_ratio: float  # modelled / observed, over the data fitted to (not a test of it)


def observe_power(readings: Sequence[Reading], step_time: StepTime, times: Floats, watts: Floats) -> ObservedPower:
    """Measured watts (mean of a GPU) beside what the simulated fleet did between readings.

    A stretch lies between two readings; its watts are the mean of the measurements (`times` on the stream's clock,
    seconds) within it, and stretches without one are left out. The GPUs of a replica work in step: its shares are theirs.
    """
    rows = []
    for before, after in pairwise(readings):
        within = (times > before.time_seconds) & (times <= after.time_seconds)
        alive = after.alive_seconds - before.alive_seconds
        if alive > 0.0 and within.any():
            phases = phase_seconds(before, after, step_time)
            computing, reading = (phases.prefill + phases.decode) / alive, phases.reading / alive
            rows.append((float(watts[within].mean()), computing, reading))
    return ObservedPower(*np.array(rows, np.float64).reshape(-1, 3).T)


def calibrate_power(prior: PowerModel, observed: ObservedPower) -> PowerCalibration:
    """Fit idle power and loads; `max_watts` stays. What the data cannot tell stays at the prior.

    Loads are bounded by 0 and 1 and idle by 0 and `max_watts`: no draw above the limit. Raises CalibrationError with
    fewer than MINIMUM_STRETCHES stretches.
    """
    if observed.watts.size < MINIMUM_STRETCHES:
        raise CalibrationError(
            f"watts known for {observed.watts.size} stretches of the simulated time; {MINIMUM_STRETCHES} are needed"
        )
    rows = np.column_stack([np.ones_like(observed.watts), observed.computing, observed.reading])
    before = np.array([prior.idle_watts, prior.compute_watts, prior.memory_watts])
    found = fit(rows, observed.watts, prior=before)
    idle = min(float(found.values[0]), prior.max_watts)
    span = prior.max_watts - idle
    compute, memory = (min(1.0, float(value) / span) if span > 0.0 else 0.0 for value in found.values[1:])
    power = PowerModel(idle_watts=idle, max_watts=prior.max_watts, compute_load=compute, memory_load=memory)
    modelled = rows @ np.array([power.idle_watts, power.compute_watts, power.memory_watts])
    return PowerCalibration(
        power=power,
        deviations_watts=dict(zip(COEFFICIENTS, map(float, found.deviations), strict=True)),
        undetermined=tuple(name for name, known in zip(COEFFICIENTS, found.determined, strict=True) if not known),
        stretches=int(observed.watts.size),
        mean_ratio=float(modelled.mean() / observed.watts.mean()),
    )
