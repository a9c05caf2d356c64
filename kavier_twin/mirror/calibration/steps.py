"""Step-time coefficients where no request timing is known: from vLLM's log of steps, or from counters alone.

Both come down to rows of work and seconds (`fit`). Either gives the engine's coefficients only; the frontend's time
does not show in them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.mirror.calibration.fit import fit
from kavier_twin.mirror.calibration.requests import Calibration, CalibrationError, at_least, named
from kavier_twin.simulation.settings import COEFFICIENTS, StepTime

Floats = npt.NDArray[np.float64]

MINIMUM_STEPS = 100
MINIMUM_WINDOWS = 10


class StepLog(NamedTuple):
    """Engine steps as vLLM logs them with --enable-logging-iteration-details; one entry a step."""

    prefill_requests: Floats
    prefill_tokens: Floats
    decode_sequences: Floats
    context_tokens: Floats  # of all live requests: KV usage times capacity
    seconds: Floats


class Counted(NamedTuple):
    """Differences of vLLM's counters over windows in which the engine was busy; one entry a window."""

    steps: Floats  # vllm:iteration_tokens_total_count
    prefill_tokens: Floats  # vllm:prompt_tokens_by_source{source="local_compute"}
    decode_tokens: Floats  # vllm:inter_token_latency_seconds_count
    context_tokens: Floats  # mean of KV usage times capacity
    latency_seconds: Floats  # vllm:inter_token_latency_seconds_sum


def calibrate_steps(log: StepLog, *, prior: StepTime | None = None, floor: StepTime | None = None) -> Calibration:
    """Fit to single steps.

    The log does not tell how far each prefill has come: its attention is that of prompts computed in one go, each of
    its step's share. Raises CalibrationError with fewer than MINIMUM_STEPS steps.
    """
    usable = np.isfinite(log.seconds) & (log.seconds > 0) & (log.prefill_tokens + log.decode_sequences > 0)
    if int(usable.sum()) < MINIMUM_STEPS:
        raise CalibrationError(
            f"{int(usable.sum())} logged steps; at least {MINIMUM_STEPS} are needed to fit step times"
        )
    prefill, decode = log.prefill_tokens[usable], log.decode_sequences[usable]
    attention = 0.5 * prefill**2 / np.maximum(log.prefill_requests[usable], 1.0)
    # Prefilling requests hold KV too, but decodes read only their own: share it by head.
    share = decode / np.maximum(decode + log.prefill_requests[usable], 1.0)
    return _calibration(
        np.ones(prefill.size),
        prefill,
        decode,
        share * log.context_tokens[usable],
        attention,
        log.seconds[usable],
        prior,
        floor,
    )


def calibrate_counters(
    counted: Counted, *, prior: StepTime | None = None, floor: StepTime | None = None
) -> Calibration:
    """Fit to what two scrapes of `/metrics` differ by.

    Every decoding request sees each step as one inter-token latency, so their mean times the steps is the time that
    the steps took. Raises CalibrationError with fewer than MINIMUM_WINDOWS windows that decoded.
    """
    usable = (counted.steps > 0) & (counted.decode_tokens > 0) & np.isfinite(counted.latency_seconds)
    if int(usable.sum()) < MINIMUM_WINDOWS:
        raise CalibrationError(
            f"{int(usable.sum())} scrapes with decoding; at least {MINIMUM_WINDOWS} are needed to fit step times"
        )
    steps, decode = counted.steps[usable], counted.decode_tokens[usable]
    seconds = counted.latency_seconds[usable] / decode * steps
    context = counted.context_tokens[usable] * steps
    return _calibration(
        steps, counted.prefill_tokens[usable], decode, context, np.zeros(steps.size), seconds, prior, floor
    )


def _calibration(
    steps: Floats,
    prefill: Floats,
    decode: Floats,
    context: Floats,
    attention: Floats,
    seconds: Floats,
    prior: StepTime | None,
    floor: StepTime | None,
) -> Calibration:
    layers = prior or StepTime(fixed=1.0)
    linear = steps * np.array([layers.linear_seconds(tokens) for tokens in (prefill + decode) / steps])
    rows = np.column_stack([steps, prefill, decode, context, attention, linear])
    found = fit(
        rows, seconds, prior=None if prior is None else prior.coefficients(), floor=at_least(floor)[: len(COEFFICIENTS)]
    )
    ratio = float((rows @ found.values).mean() / seconds.mean())
    return Calibration(
        step_time=layers.with_coefficients(found.values),
        frontend_seconds=0.0,
        requests=seconds.size,
        mean_ttft_ratio=np.nan,
        mean_e2e_ratio=ratio,
        coefficients=named(found, found.values, COEFFICIENTS, layers),
    )
