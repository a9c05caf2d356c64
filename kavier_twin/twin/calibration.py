"""Step-time coefficients from observed request timings.

Every simulated request remembers the work its replica did between its first scheduling and its first token, and from
there to its last (`state.WORK`). Observed durations are that work times the coefficients, plus a constant frontend
time in TTFT (tokenisation, HTTP, IPC: vLLM's TTFT contains them). Work depends on the coefficients through batching,
so simulation and fit alternate until they agree.

The fit is non-negative least squares with each row weighted by 1 / sqrt(expected duration), re-weighted a few times:
a quasi-likelihood whose variance grows with the mean, under which predicted and observed means agree (an L1 or
relative-error fit would follow the median and be biased low, since stalls make the noise lopsided).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from kavier_twin.simulation.fleet import simulate
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.state import Records
from kavier_twin.simulation.workload import Workload

Floats = npt.NDArray[np.float64]

MINIMUM_REQUESTS = 30
_ROUNDS = 8
_REWEIGHTINGS = 6
_SMALLEST_SECONDS = 1e-4


class Observed(NamedTuple):
    """Finished requests in order of arrival, with what was measured of them (seconds; NaN where it was not)."""

    workload: Workload
    ttft_seconds: Floats
    e2e_seconds: Floats


@dataclass(frozen=True)
class Calibration:
    """Fitted coefficients and how well they explain the data they were fitted to (not a test of them)."""

    step_time: StepTime
    frontend_seconds: float
    requests: int
    mean_ttft_ratio: float  # predicted / observed
    mean_e2e_ratio: float


class CalibrationError(ValueError):
    """Too little was observed to fit anything."""


def calibrate(fleet: FleetSettings, observed: Observed) -> Calibration:
    """Fit the step-time coefficients of a fleet to observed requests.

    `fleet.step_time` is not used. Raises CalibrationError with fewer than MINIMUM_REQUESTS usable requests.
    """
    decode = observed.e2e_seconds - observed.ttft_seconds
    tokens = np.maximum(observed.workload.output - 1, 0)
    usable = np.isfinite(decode) & (decode > 0) & (tokens > 0)
    if int(usable.sum()) < MINIMUM_REQUESTS:
        raise CalibrationError(
            f"{int(usable.sum())} finished requests with TTFT and end-to-end latency; at least {MINIMUM_REQUESTS} "
            "are needed to fit step times"
        )
    # Coefficients in the order of state.WORK, then the frontend's seconds. Fit and simulation overshoot each other
    # (slower steps make larger batches, which explain more), so each round goes half the way.
    current = np.array([np.median(decode[usable] / tokens[usable]), 1e-6, 0.0, 0.0, 0.0, 0.0])
    for round_number in range(_ROUNDS):
        outcomes = _simulate(fleet, current, observed.workload)
        queue = outcomes["scheduled"] - outcomes["arrival"] - current[5]
        prefill = observed.ttft_seconds - queue
        # Where the simulated queue is most of the wait, its error would drown the prefill.
        calm = np.isfinite(prefill) & (queue < 0.5 * observed.ttft_seconds)
        rows = np.concatenate(
            [
                np.column_stack([outcomes["prefill_work"][calm], np.ones(int(calm.sum()))]),
                np.column_stack([outcomes["decode_work"][usable], np.zeros(int(usable.sum()))]),
            ]
        )
        fitted = _fit(rows, np.concatenate([prefill[calm], decode[usable]]))
        current = fitted if round_number == 0 else 0.5 * (current + fitted)
    outcomes = _simulate(fleet, current, observed.workload)
    return Calibration(
        step_time=_step_time(current),
        frontend_seconds=float(current[5]),
        requests=int(usable.sum()),
        mean_ttft_ratio=_mean_ratio(outcomes["first_token"] - outcomes["arrival"], observed.ttft_seconds),
        mean_e2e_ratio=_mean_ratio(outcomes["finish"] - outcomes["arrival"], observed.e2e_seconds),
    )


def _step_time(coefficients: Floats) -> StepTime:
    return StepTime(**dict(zip(StepTime.model_fields, coefficients[:5].tolist(), strict=True)))


def _simulate(fleet: FleetSettings, coefficients: Floats, workload: Workload) -> Records:
    settings = fleet.model_copy(update={"step_time": _step_time(coefficients)})
    outcomes = simulate(settings, with_frontend(workload, float(coefficients[5]))).collect()
    return outcomes[np.argsort(outcomes["index"], kind="stable")]


def _mean_ratio(predicted: Floats, observed: Floats) -> float:
    return float(np.nanmean(predicted) / np.nanmean(observed))


def _fit(rows: Floats, seconds: Floats) -> Floats:
    scale = np.maximum(rows.max(axis=0), 1e-30)
    scaled = rows / scale
    expected = np.maximum(seconds, _SMALLEST_SECONDS)
    coefficients = np.zeros(rows.shape[1])
    for _ in range(_REWEIGHTINGS):
        weight = 1.0 / np.sqrt(expected)
        coefficients, _residual = nnls(scaled * weight[:, None], seconds * weight)
        expected = np.maximum(scaled @ coefficients, _SMALLEST_SECONDS)
    if coefficients[0] <= 0.0:  # a step costs something: no data set without decodes may say otherwise
        coefficients[0] = 1e-6 / scale[0]
    return np.asarray(coefficients / scale, dtype=np.float64)


def with_frontend(workload: Workload, frontend_seconds: float) -> Workload:
    """The same requests, reaching the scheduler this long after their arrival."""
    return workload._replace(delivered=workload.arrival + frontend_seconds)


def single_engine(engine: EngineSettings, replicas: int = 1) -> FleetSettings:
    """A fleet whose step time is still to be fitted."""
    return FleetSettings(engine=engine, replicas=replicas, step_time=StepTime(fixed=0.01))
