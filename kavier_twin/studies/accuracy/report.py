"""The report: `accuracy.md` with its plots of predicted against measured."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kavier_twin.errors import UserError
from kavier_twin.studies.accuracy.find import Skipped
from kavier_twin.studies.accuracy.result import HIT_RATIO, STATISTICS, SetResult, Trial, summary

HEADER = ("metric", "points", *STATISTICS)

_INTRODUCTION = """# Accuracy

This report compares simulated times with measured ones. `kavier-twin accuracy` writes it; run the command again to
update it.

- *From the catalogue alone*: step times and KV blocks follow from the GPU's data sheet and the model's shape. Nothing
  was fitted to the data set. *From measured operators*: nothing was fitted either, but step times follow from NVIDIA's
  database of single operators on the card (extra `silicon`), if it contains the card and the model. *Calibrated*: the
  coefficients were fitted to the named part, starting from the better of the two, and evaluated on the rest.
- An error is predicted / measured - 1, of the statistic in the column's heading. If a data set has several points
  (stages, rows of a table), the figure is the median of the absolute errors, followed by their average ("avg").
- The error of a hit ratio is a difference in percentage points.
- All results are included, the bad ones too. The notes give the known causes.
"""


def rows(trial: Trial) -> Iterator[tuple[str, ...]]:
    """A prediction's errors as rows under HEADER."""
    for metric in trial.metrics:
        cells = [_cell(trial, metric, statistic) for statistic in STATISTICS]
        yield (metric, str(trial.errors(metric, "mean").size), *cells)


def _cell(trial: Trial, metric: str, statistic: str) -> str:
    errors = trial.errors(metric, statistic)
    if errors.size == 0:
        return ""
    if metric == HIT_RATIO:
        return f"{errors[0]:+.2f} points" if errors.size == 1 else f"{np.median(np.abs(errors)):.2f} points"
    if errors.size == 1:
        return f"{errors[0]:+.1%}"
    found = summary(trial, metric, statistic)
    average = f" (avg {found['mean_absolute']:.1%})" if statistic == "mean" else ""
    return f"{found['median_absolute']:.1%}{average}"


def write_report(
    path: Path, results: Sequence[SetResult], failed: Sequence[Skipped], skipped: Sequence[Skipped]
) -> str | None:
    """Write the report and, in a folder of its name beside it, the plots.

    Returns what the user should know of it, if anything. Raises UserError where it cannot be written.
    """
    text = [_INTRODUCTION]
    missing = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for result in results:
            text.append(_section(result))
            try:
                plot = _plot(result, path.with_suffix(""))
            except ImportError:
                missing = "the report has no plots: they need matplotlib, pip install 'kavier-twin[plot]'"
            else:
                if plot is not None:
                    text.append(f"![predicted against measured]({path.stem}/{plot.name})\n")
        if failed:
            text.append(_list("Could not be read", failed))
        if skipped:
            text.append(_list("Left out", skipped))
        temporary = path.with_name(path.name + ".part")
        temporary.write_text("\n".join(text), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--report {path}: cannot be written: {error.strerror}") from None
    return missing


def _section(result: SetResult) -> str:
    lines = [f"## {result.name}\n", f"{result.measured}.\n"]
    lines += [f"| prediction | fitted on | {' | '.join(HEADER)} |", f"|{'---|' * (2 + len(HEADER))}"]
    for trial in result.trials:
        what = f"{trial.basis}, {trial.predicted} | {trial.fitted_on}"
        lines += [f"| {what} | {' | '.join(row)} |" for row in rows(trial)]
    if result.notes:
        lines += ["", *(f"- {note}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def _list(title: str, entries: Sequence[Skipped]) -> str:
    return "\n".join([f"## {title}\n", *(f"- `{entry.name}`: {entry.reason}" for entry in entries)]) + "\n"


def _plot(result: SetResult, folder: Path) -> Path | None:
    """Predicted against measured, one panel a metric, one colour a prediction; None where there is nothing to show.

    Raises ImportError without matplotlib.
    """
    figures = importlib.import_module("matplotlib.figure")
    metrics = [m for m in dict.fromkeys(m for trial in result.trials for m in trial.points()) if m != HIT_RATIO]
    if not metrics:
        return None
    height = 4.0 + 0.2 * len(result.trials)  # the legend has a line for each
    figure = figures.Figure(figsize=(4.0 * len(metrics), height), layout="constrained")
    for metric, axes in zip(metrics, np.atleast_1d(figure.subplots(1, len(metrics))), strict=True):
        seen = []
        for trial in result.trials:
            measured, predicted = trial.points().get(metric, (np.zeros(0), np.zeros(0)))
            shown = (measured > 0.0) & (predicted > 0.0)
            if shown.any():
                axes.scatter(
                    measured[shown], predicted[shown], s=8, alpha=0.5, label=f"{trial.basis}: {trial.predicted}"
                )
                seen += [measured[shown], predicted[shown]]
        if seen:
            ends = [float(np.concatenate(seen).min()), float(np.concatenate(seen).max())]
            axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.set(title=metric, xlabel="measured, s", ylabel="predicted, s", xscale="log", yscale="log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize="x-small")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', result.name)}.png"
    figure.savefig(path, dpi=80, metadata={"Software": None})
    return path
