"""How fast a machine was over time, from vLLM's own log of its steps.

Decode-only steps of equal size do equal work, but for their contexts: how much longer they last at one time than at
another is the machine's speed. No request's timing is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

WINDOW_SECONDS = 10.0  # some hundred steps: shorter ones would take a stall for a speed
_LEAST_SECONDS = 0.25  # of decode-only steps in a window
_ROUNDS = 20
_TIME_ZONE_SECONDS = 900.0  # time zones differ from UTC by multiples of a quarter of an hour
_DAY_SECONDS = 86_400.0


class MachineClock(NamedTuple):
    """A clock that runs as fast as the machine does: by it, equal work always lasts equally long.

    The machine's time at `wall_seconds[i]` (since the start of the recording) is `machine_seconds[i]`, linear in
    between; in window i a step lasts `factor[i]` times what it lasts on average.
    """

    wall_seconds: Floats  # [n + 1]
    machine_seconds: Floats  # [n + 1]
    factor: Floats  # [n]

    def machine(self, wall_seconds: Floats) -> Floats:
        """Machine time of wall time; after the log's end at the speed of the last window."""
        return _along(wall_seconds, self.wall_seconds, self.machine_seconds)

    def wall(self, machine_seconds: Floats) -> Floats:
        """Wall time of machine time."""
        return _along(machine_seconds, self.machine_seconds, self.wall_seconds)


def _along(at: Floats, x: Floats, y: Floats) -> Floats:
    """Piecewise linear through (x, y), the first and the last piece going on."""
    piece = np.clip(np.searchsorted(x, at, side="right") - 1, 0, x.size - 2)
    return np.asarray(y[piece] + (y[piece + 1] - y[piece]) / (x[piece + 1] - x[piece]) * (at - x[piece]))


def machine_clock(steps: Sequence[Mapping[str, Any]], started_unix: float) -> MachineClock | None:
    """The machine's clock from the lines of a steps.jsonl; None if it has too few decode-only steps.

    A step of k requests in window w is taken to last a_k f_w: a and f are fitted in turn, each so that the sums of
    seconds agree (iterative proportional fitting), which counts every stall in full. A window with less decoding than
    _LEAST_SECONDS has the speed of its neighbours.
    """
    if not steps:
        return None
    try:
        elapsed = np.array([float(row["elapsed_ms"]) for row in steps]) / 1e3
        size = np.array([0 if row["prefill_requests"] else int(row["decode_requests"]) for row in steps])
        end = _ends(_clock_seconds([str(row["clock"]) for row in steps], started_unix), elapsed)
    except (KeyError, TypeError, ValueError, OverflowError, OSError):  # the last two: a time out of any calendar
        return None
    decode = (size > 0) & (elapsed > 0.0) & (end - elapsed >= 0.0)
    if not decode.any():
        return None
    end, elapsed = end[decode], elapsed[decode]
    _, size = np.unique(size[decode], return_inverse=True)
    count = int(end.max() / WINDOW_SECONDS) + 1
    # [windows, sizes]: how many steps of each size, and their seconds; a step on a border counts by its parts.
    steps_in, seconds_in = np.zeros((count, size.max() + 1)), np.zeros((count, size.max() + 1))
    for stop, length, kind in zip(end.tolist(), elapsed.tolist(), size.tolist(), strict=True):
        at = stop - length
        while at < stop - 1e-12:
            window = min(count - 1, int(at / WINDOW_SECONDS + 1e-12))
            part = min(stop, WINDOW_SECONDS * (window + 1)) - at if window < count - 1 else stop - at
            steps_in[window, kind] += part / length
            seconds_in[window, kind] += part
            at += part
    factor: Floats = np.ones(count)
    known = np.flatnonzero(seconds_in.sum(axis=1) >= _LEAST_SECONDS)
    if not known.size:
        return None
    for _ in range(_ROUNDS):
        typical = seconds_in.sum(axis=0) / (steps_in * factor[:, None]).sum(axis=0)
        found = seconds_in[known].sum(axis=1) / (steps_in[known] * typical).sum(axis=1)
        factor = np.interp(np.arange(count), known, found)
        factor /= factor.mean()
    wall = WINDOW_SECONDS * np.arange(count + 1, dtype=np.float64)
    machine = np.concatenate([[0.0], np.cumsum(WINDOW_SECONDS / factor)])
    return MachineClock(wall, np.asarray(machine, np.float64), factor)


def _ends(clock: Floats, elapsed: Floats) -> Floats:
    """When steps ended, from the whole second in which they did, their order and their lengths.

    A step ends within its second, and no sooner than its length after the one before it: the middle of what these
    allow.
    """
    earliest, latest = clock.copy(), clock + 1.0
    for at in range(1, clock.size):
        earliest[at] = max(earliest[at], earliest[at - 1] + elapsed[at])
    for at in range(clock.size - 2, -1, -1):
        latest[at] = min(latest[at], latest[at + 1] - elapsed[at + 1])
    return 0.5 * (earliest + latest)


def _clock_seconds(clocks: Sequence[str], started_unix: float) -> Floats:
    """Seconds since the start of the recording of wall-clock times HH:MM:SS, which tell no date and no time zone."""
    start = datetime.fromtimestamp(started_unix, UTC)
    start_of_day = 3600.0 * start.hour + 60.0 * start.minute + start.second + start.microsecond * 1e-6
    time = np.array([float(np.dot([3600.0, 60.0, 1.0], [int(part) for part in clock.split(":")])) for clock in clocks])
    days = np.concatenate([[0.0], np.cumsum(np.diff(time) < -0.5 * _DAY_SECONDS)])
    since = time + _DAY_SECONDS * days - start_of_day
    zone = _TIME_ZONE_SECONDS * round(float(since[0]) / _TIME_ZONE_SECONDS)
    return np.asarray(since - zone, np.float64)
