"""(ii) The load of days: errors and coverage of the forecast arrival rate on the clients of a ServeGen model.

`python -m benchmarks.load_weeks FOLDER --days A:B --rate R --seed S [--json]`: FOLDER holds chunk-N-trace.csv (Alibaba
ServeGen). The load of all days before A is known. From then on, every `--every` minutes: the mean rate over the next
horizon as forecast, and as it came. Error: sum of absolute errors over the sum of what came. Covered: how often the
number that came lies in the middle 90 % of what scenarios draw.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import report
from kavier_twin.errors import UserError
from kavier_twin.forecast.load import LoadForecaster
from kavier_twin.mirror.snapshot import ArrivalCounts, Snapshot
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.workload import make_workload

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

HORIZONS_SECONDS = (60, 300, 900, 3_600)
WINDOW_SECONDS, DAY_SECONDS, STEP_SECONDS, MINUTE_STEPS = 600, 86_400, 10, 6
FINE_STEPS = 2_160
SCENARIOS = 100
_CV_LIMITS = 0.05, 10.0


def counts(folder: Path, days: int, rate: float, seed: int) -> Ints:
    """[steps]: requests in each 10 s of the folder's first `days`, at `rate` requests per second on average.

    In each window of 600 s a client sends a Poisson number of requests, spaced by a gamma or Weibull renewal process
    with the client's coefficient of variation. Raises UserError for a folder without clients.
    """
    paths = sorted(folder.glob("chunk-*-trace.csv"))
    if not paths:
        raise UserError(f"{folder}: no chunk-N-trace.csv; expected the folder of one ServeGen model")
    clients = [_client(path) for path in paths]
    total = np.sum([rows[:, 0] for rows in clients], axis=0)
    windows = days * DAY_SECONDS // WINDOW_SECONDS
    if total.size < windows:
        raise UserError(f"{folder}: {total.size * WINDOW_SECONDS / DAY_SECONDS:g} days of data; --days asks for {days}")
    heard = total > 0.0
    found = np.zeros(windows * WINDOW_SECONDS // STEP_SECONDS, np.int64)
    for number, rows in enumerate(clients):
        rates = np.interp(np.arange(total.size), np.flatnonzero(heard), rows[heard, 0]) * rate / total.mean()
        times = _arrivals(rates[:windows], rows[:windows], np.random.default_rng((seed, number)))
        found += np.bincount((times // STEP_SECONDS).astype(int), minlength=found.size)[: found.size]
    return found


def _client(path: Path) -> Floats:
    """[windows, (requests per second, coefficient of variation, whether Weibull)]."""
    with path.open() as file:
        return np.array([(float(row[1]), float(row[2]), row[3] == "Weibull") for row in csv.reader(file)], np.float64)


def _arrivals(rates: Floats, rows: Floats, rng: np.random.Generator) -> Floats:
    sent = rng.poisson(rates * WINDOW_SECONDS)
    window = np.repeat(np.arange(sent.size), sent)
    if not window.size:
        return np.zeros(0)
    cv = np.clip(np.where(rows[:, 1] > 0.0, rows[:, 1], 1.0), *_CV_LIMITS)[window]
    shapes = np.geomspace(0.12, 20.0, 2_000)
    variations = np.sqrt(np.expm1([math.lgamma(1 + 2 / k) - 2 * math.lgamma(1 + 1 / k) for k in shapes]))
    weibull = rng.weibull(np.interp(cv, variations[::-1], shapes[::-1]))
    pauses = np.where(rows[window, 2] > 0.0, weibull, rng.gamma(1.0 / cv**2, 1.0)) + 1e-9
    ends = np.cumsum(pauses / np.bincount(window, pauses)[window]) + rng.random(sent.size)[window]
    return np.asarray(WINDOW_SECONDS * (window + ends % 1.0), np.float64)


def measure(came: Ints, first_step: int, every_steps: int) -> list[dict[str, Any]]:
    """One row a horizon."""
    sums = np.concatenate([[0], np.cumsum(came)])
    fleet, none = Fleet(DEFAULT_FLEET, start_seconds=0.0), make_workload([0.0], 1, 1)
    forecaster = LoadForecaster()
    errors: dict[int, list[tuple[float, float, float, float]]] = {horizon: [] for horizon in HORIZONS_SECONDS}
    for step in range(first_step, came.size - HORIZONS_SECONDS[-1] // STEP_SECONDS, every_steps):
        now = float(step * STEP_SECONDS)
        coarse = came[: step // MINUTE_STEPS * MINUTE_STEPS].reshape(-1, MINUTE_STEPS).sum(axis=1)
        known = ArrivalCounts(came[max(0, step - FINE_STEPS) : step], coarse)
        outlook = forecaster.forecast(
            Snapshot("", now, fleet, none, 600.0, 0.0, True, arrivals=known), HORIZONS_SECONDS[-1]
        )
        rng = np.random.default_rng((1, step))
        paths = STEP_SECONDS * np.array([outlook.draw_rate(rng) for _ in range(SCENARIOS)])
        for horizon in HORIZONS_SECONDS:
            ahead = horizon // STEP_SECONDS
            expected = paths[:, :ahead].sum(axis=1)
            # As bursty as arrivals have been: a gamma mixture of Poisson counts has this variance over mean.
            more = max(outlook.dispersion_ratio - 1.0, 1e-6)
            drawn = rng.poisson(rng.gamma(np.maximum(expected, 1e-9) / more, more))
            total = float(sums[step + ahead] - sums[step])
            low, high = np.quantile(drawn, (0.05, 0.95))
            missed = [abs(outlook.rate(horizon, name) * horizon - total) for name in (outlook.method, "persistence")]
            errors[horizon].append((missed[0], missed[1], total, float(low <= total <= high)))
    rows = []
    for horizon, found in errors.items():
        missed_sum, kept_sum, total_sum, held = np.sum(found, axis=0)
        rows.append(
            {
                "horizon s": horizon,
                "forecasts": len(found),
                "error": missed_sum / total_sum,
                "error of persistence": kept_sum / total_sum,
                "covered": held / len(found),
            }
        )
    return rows


def main() -> None:
    """Measure one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--days", default="9:14", metavar="A:B")
    parser.add_argument("--rate", type=float, default=6.0, help="requests per second, mean of the folder's days")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=5, metavar="MINUTES", help="between forecasts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        first, last = (int(day) for day in args.days.split(":"))
    except ValueError:
        parser.error(f"--days {args.days}: expected A:B, as 9:14")
    if not 0 <= first < last or args.every < 1 or not args.rate > 0.0:
        parser.error("expected --days A:B with 0 <= A < B, --every of 1 or more, --rate above 0")
    try:
        came = counts(args.folder, last, args.rate, args.seed)
    except UserError as error:
        parser.error(str(error))
    rows = measure(came, first * DAY_SECONDS // STEP_SECONDS, args.every * MINUTE_STEPS)
    if args.json:
        print(json.dumps(rows))
    else:
        report("(ii) the load of days", rows, f"{args.folder.name}, days {args.days}, seed {args.seed}")


if __name__ == "__main__":
    main()
