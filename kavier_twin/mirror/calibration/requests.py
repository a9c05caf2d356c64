"""Step-time coefficients from observed request timings.

Every simulated request remembers the work its replica did between its first scheduling and its first token, and from
there to its last (`state.WORK`). Observed durations are that work times the coefficients, plus a constant frontend
time in TTFT (tokenisation, HTTP, IPC: vLLM's TTFT contains them). Work depends on the coefficients through batching,
so simulation and fit alternate until they agree.

With a prior (the catalogue's roofline) the data moves only the coefficients it determines; see `fit`.
`step_log` has the same from vLLM's own log of steps, and from counters and histograms alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.mirror.calibration.fit import Fit, fit
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import COEFFICIENTS, EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.state import Records
from kavier_twin.simulation.workload import Workload

Floats = npt.NDArray[np.float64]

MINIMUM_REQUESTS = 30
FRONTEND = "frontend_seconds"
_ROUNDS = 8
_SECANTS = 4
_LARGEST_FACTOR = 0.1  # of the logarithm of the factor by which the mean latency may correct the steps'
_SMALLEST_FIXED_SECONDS = 1e-6
# Requests reach the engine within this time in any deployment worth the name; it is where calibration starts from.
_FRONTEND_PRIOR_SECONDS = 0.005


class Observed(NamedTuple):
    """Requests in order of arrival, with what was measured of them (seconds; NaN where it was not).

    Requests without measurements count as load: leave none out that shared an engine with the measured ones.
    """

    workload: Workload
    ttft_seconds: Floats
    e2e_seconds: Floats
    queue_seconds: Floats | None = None  # where the engine tells it: from its queue to its first step


class Coefficient(NamedTuple):
    """One fitted coefficient and how well it is known."""

    value: float
    deviation: float  # one standard deviation, a lower bound (see `fit`); infinite if unknown
    determined: bool  # by the data; if not, it is the prior's, or nothing is known of it


@dataclass(frozen=True)
class Calibration:
    """Fitted coefficients and how well they explain the data they were fitted to (not a test of them)."""

    step_time: StepTime
    frontend_seconds: float
    requests: int  # (or steps, or scrapes) that it was fitted to
    mean_ttft_ratio: float  # predicted / observed
    mean_e2e_ratio: float
    coefficients: dict[str, Coefficient] = field(default_factory=dict)

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "step_time": self.step_time.model_dump(mode="json"),
            "frontend_seconds": self.frontend_seconds,
            "requests": self.requests,
            "mean_ttft_ratio": self.mean_ttft_ratio,
            "mean_e2e_ratio": self.mean_e2e_ratio,
            "coefficients": {name: list(found) for name, found in self.coefficients.items()},
        }

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Calibration:
        """What `save` gave."""
        coefficients = {name: Coefficient(*found) for name, found in saved["coefficients"].items()}
        step_time = StepTime.model_validate(saved["step_time"])
        return cls(**{**saved, "step_time": step_time, "coefficients": coefficients})

    @property
    def undetermined(self) -> tuple[str, ...]:
        """Coefficients that the data could not tell."""
        return tuple(name for name, found in self.coefficients.items() if not found.determined)


class CalibrationError(ValueError):
    """Too little was observed to fit anything."""


def calibrate(
    fleet: FleetSettings, observed: Observed, *, prior: StepTime | None = None, floor: StepTime | None = None
) -> Calibration:
    """Fit the step-time coefficients of a fleet to observed requests.

    `fleet.step_time` is not used. `floor` bounds the coefficients from below: what the hardware's peak allows. Raises
    CalibrationError with fewer than MINIMUM_REQUESTS usable requests.
    """
    decode = observed.e2e_seconds - observed.ttft_seconds
    tokens = np.maximum(observed.workload.output - 1, 0)
    usable = np.isfinite(decode) & (decode > 0) & (tokens > 0)
    if int(usable.sum()) < MINIMUM_REQUESTS:
        raise CalibrationError(
            f"{int(usable.sum())} finished requests with TTFT and end-to-end latency; at least {MINIMUM_REQUESTS} "
            "are needed to fit step times"
        )
    start = prior or StepTime(fixed=float(np.median(decode[usable] / tokens[usable])), per_prefill_token=1e-6)

    def rows(outcomes: Records, frontend: float) -> tuple[Floats, Floats]:
        return _request_rows(outcomes, observed, usable, frontend)

    return _alternate(fleet, observed, start, prior, floor, rows, int(usable.sum()))


def calibrate_means(
    fleet: FleetSettings, workload: Workload, ttft_seconds: float, e2e_seconds: float, *, prior: StepTime
) -> Calibration:
    """Fit to the mean latencies of a whole run, all that a benchmark's summary or a pair of histograms tells.

    Two numbers determine two directions at most: along all others the coefficients stay at the prior.
    """
    count = workload.index.size

    def rows(outcomes: Records, frontend: float) -> tuple[Floats, Floats]:
        queue = float((outcomes["scheduled"] - outcomes["arrival"]).mean()) - frontend
        work = np.array([np.append(outcomes[name].mean(axis=0), 0.0) for name in ("prefill_work", "decode_work")])
        work[0, -1] = 1.0
        # Each mean stands for all its requests: it outweighs the prior.
        seconds = np.array([max(ttft_seconds - queue, _SMALLEST_FIXED_SECONDS), e2e_seconds - ttft_seconds])
        return np.repeat(work, MINIMUM_REQUESTS, axis=0), np.repeat(seconds, MINIMUM_REQUESTS)

    means = Observed(workload, np.full(count, ttft_seconds), np.full(count, e2e_seconds))
    return _alternate(fleet, means, prior, prior, None, rows, count)


def _alternate(
    fleet: FleetSettings,
    observed: Observed,
    start: StepTime,
    prior: StepTime | None,
    floor: StepTime | None,
    rows_of: Callable[[Records, float], tuple[Floats, Floats]],
    requests: int,
) -> Calibration:
    """Simulate, fit to what the simulation did, and again.

    Fit and simulation overshoot each other (slower steps make larger batches, which explain more), so each round goes
    half the way.
    """
    current = np.append(start.coefficients(), _FRONTEND_PRIOR_SECONDS if prior else 0.0)
    for round_number in range(_ROUNDS):
        outcomes = _simulate(fleet, start, current, observed.workload)
        rows, seconds = rows_of(outcomes, float(current[-1]))
        found = fit(rows, seconds, prior=_with_frontend(prior), floor=at_least(floor))
        current = found.values if round_number == 0 and prior is None else 0.5 * (current + found.values)
    current, outcomes = _match_latency(fleet, start, current, observed)
    return Calibration(
        step_time=_step_time(start, current),
        frontend_seconds=float(current[-1]),
        requests=requests,
        mean_ttft_ratio=_mean_ratio(outcomes["first_token"] - outcomes["arrival"], observed.ttft_seconds),
        mean_e2e_ratio=_mean_ratio(outcomes["finish"] - outcomes["arrival"], observed.e2e_seconds),
        coefficients=named(found, current, (*COEFFICIENTS, FRONTEND), start),
    )


def _match_latency(
    fleet: FleetSettings, layers: StepTime, values: Floats, observed: Observed
) -> tuple[Floats, Records]:
    """One common factor on the engine's coefficients, so that the mean end-to-end latency agrees, queues included.

    A queue multiplies a small error of the step time; it also shows it more clearly than the steps do. Secant steps on
    the logarithms; the best of all tried is taken.
    """
    tried: list[tuple[float, float, Floats, Records]] = []  # log factor, log of predicted / observed
    factor = 0.0
    for _ in range(_SECANTS):
        scaled = np.append(values[:-1] * math.exp(factor), values[-1])
        outcomes = _simulate(fleet, layers, scaled, observed.workload)
        error = math.log(_mean_ratio(outcomes["finish"] - outcomes["arrival"], observed.e2e_seconds))
        tried.append((factor, error, scaled, outcomes))
        elasticity = 1.0
        if len(tried) > 1 and factor != tried[-2][0]:
            elasticity = max(0.5, (error - tried[-2][1]) / (factor - tried[-2][0]))
        factor = min(_LARGEST_FACTOR, max(-_LARGEST_FACTOR, factor - error / elasticity))
    _, _, best, outcomes = min(tried, key=lambda attempt: abs(attempt[1]))
    return best, outcomes


def named(found: Fit, values: Floats, names: tuple[str, ...], layers: StepTime) -> dict[str, Coefficient]:
    """A fit's coefficients by name, with the values that were taken in the end."""
    columns = zip(names, values.tolist(), found.deviations.tolist(), found.determined.tolist(), strict=True)
    return {
        name: Coefficient(value, deviation, known)
        for name, value, deviation, known in columns
        if name != "linear_scale" or layers.linear_layers
    }


def _request_rows(
    outcomes: Records, observed: Observed, usable: npt.NDArray[np.bool_], frontend: float
) -> tuple[Floats, Floats]:
    """Work and seconds of every prefill and decode that can be used."""
    decode = observed.e2e_seconds - observed.ttft_seconds
    queue = outcomes["scheduled"] - outcomes["arrival"] - frontend
    if observed.queue_seconds is not None:
        queue = np.where(np.isfinite(observed.queue_seconds), observed.queue_seconds, queue)
    prefill = observed.ttft_seconds - queue
    # Where the queue is most of the wait, its error would drown the prefill.
    calm = np.isfinite(prefill) & (queue < 0.5 * observed.ttft_seconds)
    work = np.concatenate([outcomes["prefill_work"][calm], outcomes["decode_work"][usable]])
    in_front = np.concatenate([np.ones(int(calm.sum())), np.zeros(int(usable.sum()))])
    return np.column_stack([work, in_front]), np.concatenate([prefill[calm], decode[usable]])


def _with_frontend(prior: StepTime | None) -> Floats | None:
    return None if prior is None else np.append(prior.coefficients(), np.nan)


def at_least(floor: StepTime | None) -> Floats:
    """The least that each coefficient and the frontend's seconds may be."""
    values = np.zeros(len(COEFFICIENTS) + 1) if floor is None else np.append(floor.coefficients(), 0.0)
    values[0] = max(values[0], _SMALLEST_FIXED_SECONDS)  # a step costs something, whatever the data says
    return values


def _step_time(layers: StepTime, values: Floats) -> StepTime:
    return layers.with_coefficients(values[: len(COEFFICIENTS)])


def _simulate(fleet: FleetSettings, layers: StepTime, values: Floats, workload: Workload) -> Records:
    settings = fleet.model_copy(update={"step_time": _step_time(layers, values)})
    outcomes = simulate(settings, with_frontend(workload, float(values[-1]))).collect()
    return outcomes[np.argsort(outcomes["index"], kind="stable")]


def _mean_ratio(predicted: Floats, observed: Floats) -> float:
    both = np.isfinite(predicted) & np.isfinite(observed)
    return float(predicted[both].mean() / observed[both].mean())


def with_frontend(workload: Workload, frontend_seconds: float) -> Workload:
    """The same requests, reaching the scheduler this long after their arrival."""
    return workload._replace(delivered=workload.arrival + frontend_seconds)


def single_engine(engine: EngineSettings, replicas: int = 1) -> FleetSettings:
    """A fleet whose step time is still to be fitted."""
    return FleetSettings(engine=engine, replicas=replicas, step_time=StepTime(fixed=0.01))
