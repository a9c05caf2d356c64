"""What a data set says of the simulation: pairs of measured and predicted, by who predicted them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

STATISTICS = ("mean", "p50", "p90", "p99")
HIT_RATIO = "hit ratio"  # its error is a difference in percentage points; all others are shares of what was measured


class Pair(NamedTuple):
    """One number measured and predicted: a latency in seconds, or a ratio."""

    point: str  # what it is of: a part of a run, a stage, a row of a table
    metric: str  # TTFT, TPOT, e2e, prefill, decode, hit ratio
    statistic: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Share of the measured value, signed; of a hit ratio the difference in percentage points."""
        if self.metric == HIT_RATIO:
            return 100.0 * (self.predicted - self.measured)
        return self.predicted / self.measured - 1.0


@dataclass(frozen=True)
class Trial:
    """One way of predicting a data set. `scatter` has, by metric, measured and predicted seconds to plot."""

    basis: str  # "from the catalogue alone", "calibrated"
    fitted_on: str
    predicted: str  # on what the errors are
    pairs: tuple[Pair, ...]
    scatter: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """In order of appearance."""
        return tuple(dict.fromkeys(pair.metric for pair in self.pairs))

    def errors(self, metric: str, statistic: str) -> Floats:
        """Of every point that has this statistic of this metric."""
        return np.array([p.error for p in self.pairs if p.metric == metric and p.statistic == statistic])

    def points(self) -> dict[str, tuple[Floats, Floats]]:
        """What a plot shows: `scatter`, or the means of the points."""
        if self.scatter:
            return self.scatter
        found = {}
        for metric in self.metrics:
            means = [p for p in self.pairs if p.metric == metric and p.statistic == "mean"]
            found[metric] = np.array([p.measured for p in means]), np.array([p.predicted for p in means])
        return found


@dataclass(frozen=True)
class SetResult:
    """A data set and all that was tried on it. `notes`: what one must know to read the errors."""

    name: str
    measured: str  # what was measured, in a sentence
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "measured": self.measured,
            "notes": list(self.notes),
            "trials": [
                {
                    "basis": trial.basis,
                    "fitted_on": trial.fitted_on,
                    "predicted": trial.predicted,
                    "errors": {
                        metric: {
                            statistic: summary(trial, metric, statistic)
                            for statistic in STATISTICS
                            if trial.errors(metric, statistic).size
                        }
                        for metric in trial.metrics
                    },
                    "pairs": [{**pair._asdict(), "error": pair.error} for pair in trial.pairs],
                }
                for trial in self.trials
            ],
        }


def summary(trial: Trial, metric: str, statistic: str) -> dict[str, float | int]:
    """The errors of all points in a few numbers: signed median, and median and mean of their size."""
    errors = trial.errors(metric, statistic)
    return {
        "points": int(errors.size),
        "median": float(np.median(errors)),
        "median_absolute": float(np.median(np.abs(errors))),
        "mean_absolute": float(np.abs(errors).mean()),
        "largest_absolute": float(np.abs(errors).max()),
    }


def distribution_pairs(point: str, metric: str, measured: Floats, predicted: Floats) -> list[Pair]:
    """Mean and quantiles of the same requests, measured and predicted (seconds)."""
    return [
        Pair(point, metric, "mean", float(measured.mean()), float(predicted.mean())),
        *(
            Pair(point, metric, name, float(np.quantile(measured, q)), float(np.quantile(predicted, q)))
            for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
        ),
    ]


class Latencies(NamedTuple):
    """Of the same requests in the same order: seconds, and output tokens."""

    ttft: Floats
    e2e: Floats
    output: Floats

    @property
    def tpot(self) -> Floats:
        """Time per output token after the first, seconds (NaN for a single token)."""
        return np.where(self.output > 1.0, (self.e2e - self.ttft) / np.maximum(self.output - 1.0, 1.0), np.nan)


def request_pairs(point: str, measured: Latencies, predicted: Latencies) -> list[Pair]:
    """TTFT, TPOT and e2e of requests of which all were measured."""
    pairs = []
    for metric, real, simulated in (
        ("TTFT", measured.ttft, predicted.ttft),
        ("TPOT", measured.tpot, predicted.tpot),
        ("e2e", measured.e2e, predicted.e2e),
    ):
        known = np.isfinite(real) & np.isfinite(simulated)
        if known.any():
            pairs += distribution_pairs(point, metric, real[known], simulated[known])
    return pairs
