"""The machine's clock finds in a step log how fast the machine was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kavier_twin.recordings.machine_clock import machine_clock

STARTED = 1_795_391_356.74  # 23:49:16.74 UTC


def step_log(slowdown: Any, seconds: float, rng: np.random.Generator, zone_seconds: int = 0) -> list[dict[str, Any]]:
    """Steps back to back on a machine that is `slowdown(t)` times slower at t; a step of n requests takes 8 + n ms."""
    rows, time = [], 0.0
    while time < seconds:
        size, prefills = int(rng.integers(1, 7)), int(rng.random() < 0.1)
        length = slowdown(time) * (0.008 + 0.001 * size + 0.05 * prefills) * rng.uniform(0.9, 1.1)
        time += length
        clock = int(STARTED + time) + zone_seconds
        rows.append(
            {
                "clock": f"{clock // 3600 % 24:02d}:{clock // 60 % 60:02d}:{clock % 60:02d}",
                "prefill_requests": prefills,
                "decode_requests": size,
                "elapsed_ms": 1e3 * length,
            }
        )
    return rows


@pytest.mark.parametrize("zone_seconds", [0, 3600, -5 * 3600 - 1800])
def test_a_machine_that_slows_down(zone_seconds: int) -> None:
    """The log runs past midnight and may be in any time zone."""
    log = step_log(lambda t: 1.0 if t < 400 else 2.0, 800.0, np.random.default_rng(1), zone_seconds)
    clock = machine_clock(log, STARTED)
    assert clock is not None
    fast, slow = np.diff(clock.machine(np.array([100.0, 300.0, 500.0, 700.0])))[[0, 2]]
    assert fast / slow == pytest.approx(2.0, rel=0.02)


def test_wall_time_and_machine_time_are_each_other() -> None:
    clock = machine_clock(step_log(lambda t: 1.0 + 0.5 * np.sin(t / 30), 200.0, np.random.default_rng(2)), STARTED)
    assert clock is not None
    times = np.linspace(0.0, 400.0, 999)  # also beyond the log's end
    assert np.all(np.diff(clock.machine(times)) > 0.0)
    assert clock.wall(clock.machine(times)) == pytest.approx(times, abs=1e-9)
    assert np.isnan(clock.machine(np.array([np.nan]))).all()


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"clock": "00:00:01", "prefill_requests": 1, "decode_requests": 3, "elapsed_ms": 9.0}],
        [{"clock": "late", "prefill_requests": 0, "decode_requests": 3, "elapsed_ms": 9.0}],
        [{"prefill_requests": 0}],
    ],
)
def test_a_log_that_tells_nothing(log: list[dict[str, Any]]) -> None:
    assert machine_clock(log, STARTED) is None
