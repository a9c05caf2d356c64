"""Which KPIs the twin is to be trusted on: those it has been right on lately.

A KPI is judged by its errors over the last five minutes, or over the last hour where five minutes saw too little. It
loses trust when an error passes its bound and wins it back below a part of that, so that it does not flap. Without
enough observations it is not trusted, and a KPI that nobody observes is trusted as its stand-in is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kavier_twin.mirror.fidelity.windows import WINDOWS, WindowScore
from kavier_twin.simulation.kpi_table import KPIS

MAX_ERROR: Final = {name: kpi.max_error for name, kpi in KPIS.items() if kpi.max_error is not None}
REGAINED_BELOW: Final = 0.8  # of the bound
_TAIL_OBSERVATIONS: Final = 10  # that must lie beyond a quantile for it to be judged

Bound = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class TrustSettings(BaseModel):
    """When predictions are to be trusted. `max_error` by KPI; those not named keep their defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_error: dict[str, Bound] = MAX_ERROR
    """Largest trusted error by KPI: relative, or absolute for ratios. KPIs that are not listed keep their defaults."""

    minimum_requests: Annotated[int, Field(ge=1)] = 30
    """Number of observations needed before a KPI is trusted."""

    @field_validator("max_error")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(value.keys() - MAX_ERROR.keys())
        if unknown:
            raise ValueError(f"there is no KPI {unknown[0]!r}; known: {', '.join(MAX_ERROR)}")
        return {**MAX_ERROR, **value}


DEFAULT_TRUST: Final = TrustSettings()


@dataclass(frozen=True)
class Trust:
    """Whether a KPI is to be trusted now."""

    trusted: Annotated[bool, Field(examples=[False])]
    reason: Annotated[
        str, Field(description="Why the KPI is not trusted. Empty if it is.", examples=["fewer than 30 observations"])
    ] = ""


class Judge:
    """Judges every KPI again and again, remembering its last judgement."""

    def __init__(self, settings: TrustSettings) -> None:
        self._settings = settings
        self._wrong: frozenset[str] = frozenset()  # KPIs that have passed their bound and not come back yet
        self.trust: dict[str, Trust] = self._all({})

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        trust = {kpi: [trust.trusted, trust.reason] for kpi, trust in self.trust.items()}
        return {"trust": trust, "wrong": sorted(self._wrong)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """What `save` gave."""
        self.trust = {kpi: Trust(*trust) for kpi, trust in saved["trust"].items()}
        self._wrong = frozenset(saved["wrong"])

    def judge(self, scores: Iterable[WindowScore]) -> None:
        """Judge by the scores of now."""
        by_kpi: dict[str, list[WindowScore]] = {}
        for score in scores:
            by_kpi.setdefault(score.kpi, []).append(score)
        judged = {}
        for kpi in MAX_ERROR.keys() & by_kpi.keys():
            worst = max(self._judged(by_kpi[kpi]), key=_concern, default=None)
            judged[kpi] = self._of(kpi, worst, max(score.observations for score in by_kpi[kpi]))
        self.trust = self._all(judged)

    def _of(self, kpi: str, worst: WindowScore | None, count: int) -> Trust:
        if worst is None:
            return Trust(False, f"{kpi}: too few observations yet ({count})")
        bound = self._settings.max_error[kpi]
        if _concern(worst) <= (REGAINED_BELOW * bound if kpi in self._wrong else bound):
            self._wrong -= {kpi}
            return Trust(True)
        self._wrong |= {kpi}
        return Trust(False, _told(worst, bound))

    def _judged(self, scores: list[WindowScore]) -> list[WindowScore]:
        """Every statistic over the shortest window that saw enough of it."""
        found: dict[str, WindowScore] = {}
        for score in sorted(scores, key=lambda score: WINDOWS[score.window]):
            if score.observations >= self._needed(score.statistic):
                found.setdefault(score.statistic, score)
        return list(found.values())

    def _needed(self, statistic: str) -> int:
        beyond = 1.0 - float(statistic[1:]) / 100.0 if statistic.startswith("p") else 1.0
        return max(self._settings.minimum_requests, round(_TAIL_OBSERVATIONS / beyond))

    def _all(self, judged: dict[str, Trust]) -> dict[str, Trust]:
        """With what was not observed judged by its stand-in."""
        found: dict[str, Trust] = {}
        for kpi in KPIS:
            known = kpi
            while known not in judged and KPIS[known].stand_in:
                known = KPIS[known].stand_in
            found[kpi] = judged.get(known, Trust(False, f"{known}: nothing observed yet"))
        return found


def _concern(score: WindowScore) -> float:
    """The size of an error, as far as it matters."""
    if abs(score.predicted - score.observed) <= KPIS[score.kpi].negligible:
        return 0.0
    return math.inf if math.isnan(score.error) else abs(score.error)


def _told(score: WindowScore, bound: float) -> str:
    name = f"{score.kpi} {score.statistic}".strip()
    unit = " points" if KPIS[score.kpi].error == "difference" else " %"
    return (
        f"{name}: {100 * score.error:+.0f}{unit} off over the last {score.window} (predicted {score.predicted:.3g}, "
        f"observed {score.observed:.3g}; trusted up to {100 * bound:.0f}{unit})"
    )
