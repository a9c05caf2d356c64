"""The coefficients of a GPU's power model from measured watts, such as DCGM's `DCGM_FI_DEV_POWER_USAGE`.

Over each stretch of time the mean draw of a GPU is idle watts, plus compute watts for the share of time in which it
computes, plus memory watts for the share in which it reads memory: linear in the three (see `PowerModel`). They are
fitted by least squares, and the power model in use is the prior of what the measurements do not tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

from kavier_twin.mirror.calibration.requests import CalibrationError
from kavier_twin.simulation.footprint import PowerModel
from kavier_twin.simulation.power import Reading, phase_seconds
from kavier_twin.simulation.settings import StepTime

Floats = npt.NDArray[np.float64]

MINIMUM_STRETCHES: Final = 10
DETERMINED_SHARE: Final = 0.05  # a coefficient is known when its deviation is below this share of the maximal power
SMALLEST_NOISE_WATTS: Final = 1.0  # that measurements are taken to have
_OUTLIER_SIGMAS = 2.5
_REWEIGHTINGS = 8
COEFFICIENTS: Final = ("idle_watts", "compute_load", "memory_load")


class ObservedPower(NamedTuple):
    """Stretches of time, [n] each: mean watts of a GPU, and the shares of time (0..1) it computed and read memory."""

    watts: Floats
    computing: Floats
    reading: Floats


@dataclass(frozen=True)
class PowerCalibration:
    """The fitted model. Coefficients that are `undetermined` have the prior's values."""

    power: PowerModel
    deviations_watts: dict[str, float]  # standard deviation of idle, compute and memory watts, by coefficient
    undetermined: tuple[str, ...]
    stretches: int
    mean_ratio: float  # modelled / observed, over the data fitted to (not a test of it)


def observe_power(readings: Sequence[Reading], step_time: StepTime, times: Floats, watts: Floats) -> ObservedPower:
    """Measured watts (mean of a GPU) beside what the simulated fleet did between readings.

    A stretch lies between two readings; its watts are the mean of the measurements (`times` on the stream's clock,
    seconds) within it, and stretches without one are left out. A replica's GPUs work in step: its shares are theirs.
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
    """Fit idle power and the two loads; `max_watts` stays. What the data cannot determine keeps the prior's value.

    Loads are bounded by 0 and 1 and idle by 0 and `max_watts`: no draw above the limit. Raises CalibrationError with
    fewer than MINIMUM_STRETCHES stretches.
    """
    watts = observed.watts
    if watts.size < MINIMUM_STRETCHES:
        raise CalibrationError(
            f"watts known for {watts.size} stretches of the simulated time; {MINIMUM_STRETCHES} are needed"
        )
    rows = np.column_stack([np.ones_like(watts), observed.computing, observed.reading])
    values = np.array([prior.idle_watts, prior.compute_watts, prior.memory_watts])
    _, deviations = _fit(rows, watts, prior.max_watts)
    known = deviations <= DETERMINED_SHARE * prior.max_watts
    if known.any():
        values[known], _ = _fit(rows[:, known], watts - rows[:, ~known] @ values[~known], prior.max_watts)
    fitted = {"idle_watts": float(values[0])}
    span = prior.max_watts - fitted["idle_watts"]
    for name, value, is_known in zip(COEFFICIENTS[1:], values[1:], known[1:], strict=True):
        if is_known:
            fitted[name] = min(1.0, float(value) / span) if span > 0.0 else 0.0
    power = PowerModel(**(prior.model_dump() | fitted))
    modelled = rows @ np.array([power.idle_watts, power.compute_watts, power.memory_watts])
    return PowerCalibration(
        power=power,
        deviations_watts=dict(zip(COEFFICIENTS, map(float, deviations), strict=True)),
        undetermined=tuple(name for name, is_known in zip(COEFFICIENTS, known, strict=True) if not is_known),
        stretches=int(watts.size),
        mean_ratio=float(modelled.mean() / watts.mean()) if watts.any() else math.nan,
    )


def _fit(rows: Floats, watts: Floats, max_watts: float) -> tuple[Floats, Floats]:
    """Least squares [k] within 0 and `max_watts`, robust against outliers (Huber 1964), and standard deviations [k].

    Deviations take the stretches as independent and come out huge along what the rows say nothing of.
    """
    weights = np.ones(watts.size)
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        values = lsq_linear(rows * root[:, None], watts * root, bounds=(0.0, max_watts), method="bvls").x
        residuals = np.abs(watts - rows @ values)
        # The median of |residual| is 0.6745 standard deviations of a Gaussian.
        sigma = max(float(np.median(residuals)) / 0.6745, SMALLEST_NOISE_WATTS)
        weights = np.minimum(1.0, _OUTLIER_SIGMAS * sigma / np.maximum(residuals, 1e-12))
    eigenvalues, vectors = np.linalg.eigh((rows * weights[:, None]).T @ rows)
    variances = vectors**2 @ (1.0 / np.maximum(eigenvalues, 1e-12 * eigenvalues.max()))
    return values, sigma * np.sqrt(variances)
