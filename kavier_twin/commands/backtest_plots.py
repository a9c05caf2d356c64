"""Pictures of a backtest: each KPI's intervals and observed values, each SLO's probability and violations."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kavier_twin.commands.figures import figure, scale_of
from kavier_twin.errors import UserError
from kavier_twin.forecast.slo import Slo
from kavier_twin.scores.alerts import ALERT_PROBABILITY, standing
from kavier_twin.scores.scorer import Moment, ScoredKpi
from kavier_twin.simulation.kpi_table import Metric, label_of
from kavier_twin.studies.backtest import Backtest

# Of Okabe and Ito's palette, told apart by colour-blind readers.
_FORESEEN: Final = "#0072B2"
_CAME: Final = "black"
_BROKEN: Final = "#D55E00"
_ALERT: Final = "#E69F00"
_MINUTES_FROM: Final = 1_200.0  # seconds of a picture


def write_plots(found: Backtest, slos: Sequence[Slo], folder: Path) -> list[Path]:
    """A fan for every KPI, one panel a horizon, and a timeline for every objective. Raises UserError."""
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise UserError("--plots: matplotlib is not installed; pip install 'kavier-twin[plot]'") from None
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kpi in sorted({row.kpi for row in found.kpis}):
            rows = [row for row in found.kpis if row.kpi == kpi]
            thresholds = [slo for slo in slos if slo.metric == kpi]
            written.append(_save(_fan(figures.Figure, kpi, rows, thresholds), folder / f"fan-{kpi}.png"))
        for slo in slos:
            moments = [moment for moment in found.moments if moment.slo == slo.name]
            if moments:
                name = re.sub(r"[^A-Za-z0-9]+", "-", slo.name)
                written.append(_save(_timeline(figures.Figure, found, slo, moments), folder / f"alerts-{name}.png"))
    except OSError as error:
        raise UserError(f"--plots {folder}: cannot be written: {error.strerror}") from None
    return written


def _fan(new: Callable[..., Any], kpi: Metric, rows: Sequence[ScoredKpi], slos: Sequence[Slo]) -> Any:
    """What was foreseen and what came, at the end of the stretch of time that each is of."""
    horizons = sorted({row.horizon_seconds for row in rows})
    picture = new(figsize=(10.0, 0.8 + 2.4 * len(horizons)), layout="constrained")
    panels = np.atleast_1d(picture.subplots(len(horizons), 1, sharex=True))
    scale = scale_of(kpi, max(abs(row.observed) for row in rows))
    factor, sign = scale.factor, scale.sign
    clock = _Clock([time for row in rows for time in (row.time_seconds, row.time_seconds + row.horizon_seconds)])
    for axes, horizon in zip(panels, horizons, strict=True):
        table = np.array([[row.time_seconds, *row[3:10]] for row in rows if row.horizon_seconds == horizon])
        low, median, high, wide_low, wide_high, persisted, observed = factor * table[:, 1:].T
        end = clock.of(table[:, 0] + horizon)
        axes.fill_between(
            end, wide_low, wide_high, color=_FORESEEN, alpha=0.15, lw=0, label="90 % interval, corrected by past errors"
        )
        axes.fill_between(end, low, high, color=_FORESEEN, alpha=0.4, lw=0, label="90 % interval of the scenarios")
        axes.plot(end, median, color=_FORESEEN, lw=1.2, label="predicted median")
        axes.plot(end, persisted, color="grey", lw=1.0, ls=":", label="persistence")
        axes.plot(end, observed, color=_CAME, lw=1.2, marker=".", ms=4, label="what came")
        for slo in slos:
            axes.axhline(factor * slo.threshold, color=_BROKEN, lw=1.0, ls="--", label=f"objective {slo.name}")
        # A widened interval that says little must not press all else flat: what reaches beyond is cut off.
        shown = np.concatenate([low, high, observed, [factor * slo.threshold for slo in slos]])
        bottom, top = float(np.nanmin(shown)), float(np.nanmax(shown))
        margin = 0.35 * (top - bottom) or 0.1 * abs(top) or 1.0
        axes.set_ylim(max(bottom - margin, -0.02 * (top + margin)), top + margin)
        axes.set_ylabel(f"{horizon:g} s ahead{f', {sign.strip()}' if sign.strip() else ''}")
        axes.grid(alpha=0.25)
    panels[-1].set_xlabel(f"end of the horizon, {clock.unit}")
    picture.suptitle(label_of(kpi))
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    return picture


def _timeline(new: Callable[..., Any], found: Backtest, slo: Slo, moments: Sequence[Moment]) -> Any:
    """Above what came, over as long as the shortest horizon; beneath how likely a breach ahead was said to be."""
    rows = [row for row in found.kpis if row.kpi == slo.metric]
    shortest = min((row.horizon_seconds for row in rows), default=0.0)
    rows = [row for row in rows if row.horizon_seconds == shortest]
    scale = scale_of(slo.metric, max([abs(row.observed) for row in rows] + [abs(slo.threshold)]))
    factor, sign = scale.factor, scale.sign
    clock = _Clock([moment.time_seconds for moment in moments])
    times = clock.of(np.array([moment.time_seconds for moment in moments]))
    broken = np.array([moment.breached for moment in moments])
    probabilities = np.array([moment.probability for moment in moments])
    picture = new(figsize=(10.0, 4.6), layout="constrained")
    above, beneath = picture.subplots(2, 1, sharex=True)
    for axes in (above, beneath):
        _shade(axes, times, broken, _BROKEN, "objective broken" if axes is beneath else "")
        axes.grid(alpha=0.25)
    ends = clock.of(np.array([row.time_seconds + shortest for row in rows]))
    above.plot(ends, [factor * row.observed for row in rows], color=_CAME, lw=1.2, marker=".", ms=4, label="what came")
    side = "at least" if slo.higher_is_better else "at most"
    above.axhline(factor * slo.threshold, color=_BROKEN, lw=1.0, ls="--", label="objective")
    above.set_ylabel(f"{label_of(slo.metric)}{f', {sign.strip()}' if sign.strip() else ''}\n(over {shortest:g} s)")
    beneath.step(times, probabilities, where="post", color=_FORESEEN, label="probability of a violation")
    stands = np.array(standing([moment.time_seconds for moment in moments], probabilities.tolist()))
    _shade(beneath, times, stands, _ALERT, "alert", top=0.08)
    beneath.axhline(ALERT_PROBABILITY, color="grey", lw=1.0, ls="--")
    beneath.set(ylabel="probability", ylim=(-0.03, 1.03), xlabel=clock.unit)
    title = f"{slo.name}: {label_of(slo.metric)} {side} {figure(slo.metric, slo.threshold)}"
    picture.suptitle(f"{title}{_counted(found, slo)}")
    handles = [axes.get_legend_handles_labels() for axes in (above, beneath)]
    lines, labels = (first + second for first, second in zip(*handles, strict=True))
    picture.legend(lines, labels, loc="outside lower center", ncols=5, fontsize="small")
    return picture


def _shade(axes: Any, times: Any, inside: Any, color: str, label: str, top: float = 1.0) -> None:
    """From each moment that is inside to the next one, up to a share of the height."""
    if not inside.any():
        return
    widths = np.diff(times, append=2.0 * times[-1] - times[-2]) if times.size > 1 else np.ones(1)
    where = axes.get_xaxis_transform()
    axes.bar(
        times[inside], top, widths[inside], align="edge", color=color, alpha=0.4, lw=0, label=label, transform=where
    )


def _counted(found: Backtest, slo: Slo) -> str:
    score = next((alert for alert in found.scores.alerts if alert.slo == slo.name), None)
    if score is None:
        return ""
    lead = f", median lead {score.median_lead_seconds:.0f} s" if score.lead_seconds else ""
    right = "" if np.isnan(score.precision) else f" ({score.precision:.0%} right)"
    foreseen = f"{len(score.lead_seconds)} of {score.breaches} violations predicted"
    return f"\n{score.alerts} alert(s){right}, {foreseen}{lead}"


class _Clock:
    """Times of a picture: minutes since the first where it is long, seconds of the trace otherwise."""

    def __init__(self, times: Sequence[float]) -> None:
        self._begin, long = min(times), max(times) - min(times) >= _MINUTES_FROM
        self._begin = self._begin if long else 0.0
        self._seconds = 60.0 if long else 1.0
        self.unit = "minutes since the first forecast" if long else "s"

    def of(self, times: Any) -> Any:
        return (times - self._begin) / self._seconds


def _save(picture: Any, path: Path) -> Path:
    picture.savefig(path, dpi=90, metadata={"Software": None})
    return path
