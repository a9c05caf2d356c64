"""How fast a machine was over time, from vLLM's own log of its steps.

Decode-only steps of equal size do equal work, but for their contexts: how long they take at one time, relative to
what they took in another, is the machine's speed. No request timing is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

WINDOW_SECONDS = 5.0
_LEAST_STEPS = 20  # of a size in the reference, or of any in a window
_LONGEST_STALL = 20.0  # times the median: what `twin.fit` also takes a stall for
_TIME_ZONE_SECONDS = 900.0  # time zones differ from UTC by multiples of a quarter of an hour
_DAY_SECONDS = 86_400.0


class Drift(NamedTuple):
    """From `start_seconds[i]` on steps last `factor[i]` times what they lasted in the reference."""

    start_seconds: Floats  # since the start of the recording
    factor: Floats


def drift(steps: Sequence[Mapping[str, Any]], started_unix: float, reference_seconds: float) -> Drift | None:
    """The machine's speed in windows of WINDOW_SECONDS, relative to the time before `reference_seconds`.

    `steps` are lines of steps.jsonl (`clock`, `prefill_requests`, `decode_requests`, `elapsed_ms`); a window with few
    decode-only steps keeps the factor before it. None if the log has too few of them.
    """
    rows = [row for row in steps if row.get("prefill_requests") == 0 and row.get("decode_requests")]
    try:
        time = _seconds_since(steps, [str(row["clock"]) for row in rows], started_unix)
        size = np.array([int(row["decode_requests"]) for row in rows])
        elapsed = np.array([float(row["elapsed_ms"]) for row in rows]) / 1e3
    except (KeyError, TypeError, ValueError):
        return None
    before = (time >= 0.0) & (time < reference_seconds)
    expected = np.full(time.size, np.nan)
    for count in np.unique(size):
        known = elapsed[before & (size == count)]
        if known.size >= _LEAST_STEPS:
            expected[size == count] = np.minimum(known, _LONGEST_STALL * np.median(known)).mean()
    usable = np.isfinite(expected) & (time >= 0.0)
    if not usable.any():
        return None
    elapsed = np.minimum(elapsed, _LONGEST_STALL * expected)
    windows = np.arange(0.0, float(time[usable].max()) + WINDOW_SECONDS, WINDOW_SECONDS)
    factors, last = [], 1.0
    for start in windows:
        here = usable & (time >= start) & (time < start + WINDOW_SECONDS)
        if int(here.sum()) >= _LEAST_STEPS:
            last = float(elapsed[here].sum() / expected[here].sum())
        factors.append(last)
    return Drift(windows, np.array(factors))


def _seconds_since(steps: Sequence[Mapping[str, Any]], clocks: Sequence[str], started_unix: float) -> Floats:
    """Seconds since the start of the recording, of wall-clock times HH:MM:SS without a date or a time zone."""
    start = datetime.fromtimestamp(started_unix, UTC)
    start_of_day = 3600.0 * start.hour + 60.0 * start.minute + start.second + start.microsecond * 1e-6

    def since(clock: str) -> float:
        hours, minutes, seconds = map(int, clock.split(":"))
        return 3600.0 * hours + 60.0 * minutes + seconds - start_of_day

    first = since(str(steps[0]["clock"]))
    zone = _TIME_ZONE_SECONDS * round(first / _TIME_ZONE_SECONDS)
    found, days, last = [], 0.0, first
    for clock in clocks:
        time = since(clock)
        if time < last - 0.5 * _DAY_SECONDS:
            days += _DAY_SECONDS
        last = time
        found.append(time + days - zone + 0.5)  # whole seconds: half of one is lost on average
    return np.array(found) if found else np.full(0, math.nan)
