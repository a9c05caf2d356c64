"""Joules of a fleet's GPUs, from the work that its state accumulates. See docs/energy.md.

The step-time coefficients turn work (`state.WORK`) into seconds; which of them, says what the GPU did in that time.
They tell shares: the amount is the time in which a replica had a live request, when vLLM takes step after step. So
neither a pace that changed on the way nor a request that waits for its end from outside distorts it.

Computing is what a token costs: `per_prefill_token`, `per_prefill_attention`, `per_decode_sequence`, and of the linear
layers the seconds that a token adds where compute bounds them. The rest of a step reads memory: the weights (`fixed`,
and what else the linear layers take) and the KV cache (`per_context_token`). Linear layers do both at once: they take
the longer time of the two, and the energy of both (Choi et al., "A roofline model of energy", IPDPS 2013).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.footprint import PowerModel
from kavier_twin.simulation.settings import COEFFICIENTS, StepTime
from kavier_twin.simulation.state import FleetState, Records

Floats = npt.NDArray[np.float64]

JOULES_PER_KWH: Final = 3.6e6
JOULES_PER_WH: Final = 3.6e3

_FIXED, _PREFILL, _DECODE, _CONTEXT, _ATTENTION, _LINEAR = range(6)  # places in `state.WORK`


class Reading(NamedTuple):
    """A fleet's cumulative work at one moment; the difference of two tells what lay between."""

    time_seconds: float
    work: Floats  # [parts of state.WORK] of all replicas, those gone included
    busy_seconds: float  # of all replicas, with a live request
    alive_seconds: float  # of all replicas, from joining to leaving or failing
    seconds_per_work: Floats  # [parts] the coefficients in force

    @staticmethod
    def of(state: FleetState, time_seconds: float) -> Reading:
        """The fleet now. It is a pool of identical engines: the first one's coefficients hold for all."""
        return Reading(
            time_seconds,
            state.replicas["work"].sum(axis=0),
            float(state.replicas["busy_seconds"].sum()),
            alive_seconds(state.replicas, time_seconds),
            np.array([state.engines[name][0] for name in COEFFICIENTS]),
        )

    def at_start(self, state: FleetState, time_seconds: float) -> Reading:
        """Before any work was done, at a time no later than this reading."""
        return self._replace(
            time_seconds=time_seconds,
            work=np.zeros_like(self.work),
            busy_seconds=0.0,
            alive_seconds=alive_seconds(state.replicas, time_seconds),
        )


class PhaseSeconds(NamedTuple):
    """How long a busy fleet was computing prompts, computing decoded tokens, and reading memory.

    The three add up to `busy` or, where the linear layers compute and read at once, to more.
    """

    busy: float
    prefill: float
    decode: float
    reading: float


class Energy(NamedTuple):
    """Joules by what they were drawn for; they add up. `idle` is what is drawn in any case."""

    idle: float
    prefill: float
    decode: float
    reading: float


def alive_seconds(replicas: Records, time_seconds: float) -> float:
    """Seconds that the replicas were there until `time_seconds`, summed over them.

    One that was asked to leave stays until its last batch is done.
    """
    empty = replicas["running"] + replicas["waiting"] == 0
    gone = np.where(empty, np.maximum(replicas["left"], replicas["last_completion"]), np.inf)
    gone = np.where(np.isfinite(replicas["left"]), gone, np.inf)
    return float(np.maximum(np.minimum(gone, time_seconds) - replicas["joined"], 0.0).sum())


def phase_seconds(before: Reading, after: Reading, step_time: StepTime) -> PhaseSeconds:
    """How all replicas spent the time between two readings in which they were busy.

    Shares are those of the coefficients in force at the second reading; `step_time` tells the shape of the linear
    layers. Zero where no step was completed.
    """
    work = after.work - before.work
    seconds = after.seconds_per_work * work
    tokens = work[_PREFILL] + work[_DECODE]
    weights, slope = after.seconds_per_work[_LINEAR] * _linear_shape(step_time)
    computing = min(seconds[_LINEAR], slope * tokens)
    reading = max(seconds[_LINEAR] - computing, weights * work[_FIXED])
    prefilled = work[_PREFILL] / tokens if tokens > 0.0 else 0.0
    busy, total = after.busy_seconds - before.busy_seconds, float(seconds.sum())
    scale = busy / total if total > 0.0 else 0.0
    return PhaseSeconds(
        busy=busy,
        prefill=scale * float(seconds[_PREFILL] + seconds[_ATTENTION] + computing * prefilled),
        decode=scale * float(seconds[_DECODE] + computing * (1.0 - prefilled)),
        reading=scale * float(seconds[_FIXED] + seconds[_CONTEXT] + reading),
    )


def _linear_shape(step_time: StepTime) -> Floats:
    """Of the linear layers: seconds of the smallest step, which reads the weights and computes next to nothing, and
    seconds that a token adds to the largest, which compute bounds (the slope of the last two points)."""
    if not step_time.linear_layers:
        return np.zeros(2)
    slope = 0.0
    if len(step_time.linear_layers) > 1:
        (tokens, seconds), (more_tokens, more_seconds) = step_time.linear_layers[-2:]
        slope = (more_seconds - seconds) / (more_tokens - tokens)
    return np.array([step_time.linear_layers[0][1], slope])


def energy(power: PowerModel, alive: float, phases: PhaseSeconds) -> Energy:
    """Joules of GPUs that were on for `alive` seconds and spent their busy time like this, by `PowerModel`.

    Both count GPU-seconds: a replica's seconds times its GPUs, which work in step with each other. Computing and
    reading at once draw no more than `max_watts`.
    """
    drawn = (
        power.compute_watts * phases.prefill,
        power.compute_watts * phases.decode,
        power.memory_watts * phases.reading,
    )
    most = (power.max_watts - power.idle_watts) * phases.busy
    capped = min(1.0, most / sum(drawn)) if sum(drawn) > 0.0 else 1.0
    return Energy(power.idle_watts * alive, *(capped * joules for joules in drawn))
