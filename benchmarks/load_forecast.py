"""(i) The load to come: errors of the forecast arrival rate on real traces, beside persistence, and what it costs.

`python -m benchmarks.load_forecast TRACE ...`: from a minute of each trace after the other, the mean rate over the next
horizon as forecast, and as it came. Coverage: how often the number of requests that came lies in the middle 90 % of
those of 100 scenarios.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import report
from connectors.traces import read_trace
from kavier_twin.forecast.load import LoadForecaster
from kavier_twin.mirror.arrival_counts import RateHistory
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.workload import make_workload

HORIZONS_SECONDS = (60.0, 300.0, 900.0)
FIRST_SECONDS, EVERY_SECONDS = 600.0, 60.0
RECENT_SECONDS = 600.0
FUTURES = 100


def main() -> None:
    """Measure each trace at each horizon."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path)
    traces = parser.parse_args().traces
    rows = [_measure(trace, horizon) for trace in traces for horizon in HORIZONS_SECONDS]
    report(
        "(i) the load to come",
        rows,
        "errors: mean absolute error of the rate over the horizon, requests per second; CPU s: of one forecast",
    )


def _measure(trace: Path, horizon: float) -> dict[str, Any]:
    times = np.array([record.time_seconds for record in read_trace(trace).records])
    times -= times[0]
    forecaster = LoadForecaster()
    errors: dict[str, list[float]] = {"in use": [], "persistence": []}
    covered: list[bool] = []
    used: list[str] = []
    cpu = 0.0
    for now in np.arange(FIRST_SECONDS, times[-1] - horizon, EVERY_SECONDS):
        snapshot = _snapshot(times[times <= now], float(now))
        began = time.process_time()
        told = forecaster.forecast(snapshot, horizon)
        cpu += time.process_time() - began
        came = int(((times > now) & (times <= now + horizon)).sum())
        errors["in use"].append(abs(told.rate(horizon) - came / horizon))
        errors["persistence"].append(abs(told.rate(horizon, "persistence") - came / horizon))
        drawn = [told.draw_arrivals(horizon, np.random.default_rng((1, n))).size for n in range(FUTURES)]
        covered.append(bool(np.quantile(drawn, 0.05) <= came <= np.quantile(drawn, 0.95)))
        used.append(told.method)
    return {
        "trace": trace.stem,
        "horizon s": horizon,
        "forecasts": len(used),
        "error in use": float(np.mean(errors["in use"])),
        "error of persistence": float(np.mean(errors["persistence"])),
        "covered": float(np.mean(covered)),
        "persistence in use": used.count("persistence") / len(used),
        "CPU s": cpu / len(used),
    }


def _snapshot(past: npt.NDArray[np.float64], now: float) -> Snapshot:
    history = RateHistory()
    for at in past:
        history.add(float(at))
    recent = make_workload(past[past > now - RECENT_SECONDS], 1, 1)
    fleet = Fleet(DEFAULT_FLEET, start_seconds=now)
    return Snapshot("default", now, fleet, recent, RECENT_SECONDS, 0.0, True, arrivals=history.until(now))


if __name__ == "__main__":
    main()
