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

WINDOW_SECONDS = 1.0  # what the log's clock resolves
NEIGHBOURHOOD_SECONDS = 20.0  # some hundred steps: what they took together is a speed, not one stall
_ROUNDS = 20
_SLOWEST = 0.01  # of a window's length passes on the machine's clock at least: it never stands still
_TIME_ZONE_SECONDS = 900.0  # time zones differ from UTC by multiples of a quarter of an hour
_DAY_SECONDS = 86_400.0


class MachineClock(NamedTuple):
    """A clock that runs as fast as the machine does: by it, equal work always lasts equally long.

    The machine's time at `wall_seconds[i]` (since the start of the recording) is `machine_seconds[i]`, linear in
    between; around window i steps last `speed[i]` times what they last on average.
    """

    wall_seconds: Floats  # [n + 1]
    machine_seconds: Floats  # [n + 1]
    speed: Floats  # [n]

    def machine(self, wall_seconds: Floats) -> Floats:
        """Machine time of wall time; after the log's end as in its last window."""
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

    A step of k requests at speed f is taken to last a_k f: a, and f of the neighbourhood of each window, are fitted in
    turn so that the sums of seconds agree (iterative proportional fitting). Then, in each window, the time that
    decode-only steps took counts as what such steps usually take: a stall that hit one of them is known, and told of
    no other step. The rest of the window (prefills, pauses) passed at the speed of the neighbourhood.
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
    steps_in, seconds_in = _by_window(end, elapsed, size, count)
    speed: Floats = np.ones(count)
    for _ in range(_ROUNDS):
        usual = seconds_in.sum(axis=0) / (steps_in * speed[:, None]).sum(axis=0)
        speed = _around(seconds_in.sum(axis=1)) / _around(steps_in @ usual)
        # Where nobody decoded for so long, nothing is known: as before.
        for quiet in np.flatnonzero(~np.isfinite(speed)):
            speed[quiet] = speed[quiet - 1] if quiet else 1.0
        speed /= speed.mean()
    rest = np.maximum(WINDOW_SECONDS - seconds_in.sum(axis=1), 0.0)
    passed = np.maximum(steps_in @ usual + rest / speed, _SLOWEST * WINDOW_SECONDS)
    wall = WINDOW_SECONDS * np.arange(count + 1, dtype=np.float64)
    return MachineClock(wall, np.concatenate([[0.0], np.cumsum(passed)]), speed)


def _by_window(end: Floats, elapsed: Floats, size: npt.NDArray[np.int64], count: int) -> tuple[Floats, Floats]:
    """[windows, sizes]: how many steps of each size, and their seconds. A step over a border counts by its parts."""
    steps, seconds = np.zeros((count, int(size.max()) + 1)), np.zeros((count, int(size.max()) + 1))
    for stop, length, kind in zip(end.tolist(), elapsed.tolist(), size.tolist(), strict=True):
        first, last = int((stop - length) / WINDOW_SECONDS), min(count - 1, int(stop / WINDOW_SECONDS))
        for window in range(first, last + 1):
            begins, ends = WINDOW_SECONDS * window, WINDOW_SECONDS * (window + 1)
            part = max(0.0, min(stop, ends) - max(stop - length, begins))
            steps[window, kind] += part / length
            seconds[window, kind] += part
    return steps, seconds


def _around(values: Floats) -> Floats:
    """Of each window the sum over its neighbourhood; NaN where it is zero."""
    reach = round(0.5 * NEIGHBOURHOOD_SECONDS / WINDOW_SECONDS)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(values.size)
    sums = total[np.minimum(at + reach + 1, values.size)] - total[np.maximum(at - reach, 0)]
    return np.where(sums > 1e-9, sums, np.nan)


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
