"""Which policy is best, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kavier_twin.forecast.result import Gain, Row, Verdict
from kavier_twin.forecast.settings import Objective
from kavier_twin.forecast.slo import Slo
from kavier_twin.forecast.statistics import mean_is_above
from kavier_twin.simulation.kpi_table import KPIS, METRICS, Metric
from kavier_twin.simulation.policies import Policy, apply_overrides, hypothetical_reasons, vllm_flags
from kavier_twin.simulation.settings import FleetSettings

Floats = npt.NDArray[np.float64]
Table = Mapping[str, Floats]
"""By policy: [scenarios, horizons, METRICS]. The same scenario is the same row under every policy."""

_LOSS = {kpi.objective: kpi.metric for kpi in KPIS.values() if kpi.objective}
# What a change must gain to be worth the trouble, and below which two policies are as good as each other: expected
# breaches for "slo", else a share.
_NOTICEABLE: dict[Objective, float] = {"slo": 0.05, "latency": 0.01, "cost": 0.01, "energy": 0.01}


class Ranking:
    """Policies in the order of the objectives: what comes first decides, what comes later decides among equals.

    Requests refused are worse than anything: a policy that rejects more of them than today's is never best.
    """

    def __init__(self, table: Table, today: str, slos: Sequence[Slo], objectives: Sequence[Objective]) -> None:
        self._today = today
        self._objectives = tuple(objectives)
        self._losses = {
            policy: [_losses(values, objective, slos) for objective in objectives] for policy, values in table.items()
        }
        refused = {policy: float(_metric(values, "requests_rejected").mean()) for policy, values in table.items()}
        self._allowed = [policy for policy in table if refused[policy] <= refused[today]]
        self.best = min(self._allowed, key=self._means)
        if not self._worth_it(self.best):
            self.best = today

    def gain(self, policy: str) -> Gain:
        """Of a policy over today's."""
        by_objective: dict[str, float] = {
            objective: saved if objective == "slo" else 1.0 - math.exp(-saved)
            for objective, saved in zip(self._objectives, self._saved(self._today, policy), strict=True)
        }
        decides = self._decides(self._today, policy)
        probability = math.nan if policy == self._today else mean_is_above(self._differences(policy, decides))
        return Gain(by_objective, self._objectives[decides], probability)

    def certain(self, certainty: float) -> bool:
        """Whether the best is, with this probability in all, not noticeably worse than any other allowed.

        Paired differences, an indifference zone and Bonferroni's bound over the others, as in ranking and selection
        (Kim and Nelson, "A fully sequential procedure for indifference-zone selection in simulation", 2001).
        """
        others = [policy for policy in self._allowed if policy != self.best]
        doubt = (1.0 - certainty) / max(1, len(others))
        return all(self._not_worse(other) >= 1.0 - doubt for other in others)

    def _not_worse(self, other: str) -> float:
        decides = self._decides(other, self.best)
        differences = self._losses[other][decides] - self._losses[self.best][decides]
        if not differences.any():
            return 1.0  # they do the same
        return mean_is_above(differences, -_NOTICEABLE[self._objectives[decides]])

    def _means(self, policy: str) -> tuple[float, ...]:
        # Thirds summed in another order are as many.
        return tuple(round(float(losses.mean()), 9) for losses in self._losses[policy])

    def _saved(self, base: str, policy: str) -> list[float]:
        return [before - after for before, after in zip(self._means(base), self._means(policy), strict=True)]

    def _decides(self, base: str, policy: str) -> int:
        """The first objective in which they differ noticeably; if none, the last."""
        saved = self._saved(base, policy)
        noticed = [abs(by) >= _least(objective) for objective, by in zip(self._objectives, saved, strict=True)]
        return noticed.index(True) if any(noticed) else len(saved) - 1

    def _worth_it(self, policy: str) -> bool:
        decides = self._decides(self._today, policy)
        return self._saved(self._today, policy)[decides] >= _least(self._objectives[decides])

    def _differences(self, policy: str, level: int) -> Floats:
        return self._losses[self._today][level] - self._losses[policy][level]


def verdict(settings: FleetSettings, best: Policy, today: str, ranking: Ranking, rows: Sequence[Row]) -> Verdict:
    """What is to be told of the best policy; `rows` are those of all policies."""
    changed = apply_overrides(settings, best.overrides)
    return Verdict(
        policy=best.name,
        deployable=not hypothetical_reasons(settings, changed),
        vllm_flags=tuple(vllm_flags(settings, changed)),
        expected_breaches=_expected_breaches(rows, best.name),
        today_expected_breaches=_expected_breaches(rows, today),
        e2e_p95_seconds=_at_longest(rows, best.name, "e2e_p95_seconds"),
        today_e2e_p95_seconds=_at_longest(rows, today, "e2e_p95_seconds"),
        output_tokens_per_second=_at_longest(rows, best.name, "output_tokens_per_second"),
        today_output_tokens_per_second=_at_longest(rows, today, "output_tokens_per_second"),
        gain=ranking.gain(best.name),
    )


def _least(objective: Objective) -> float:
    """Any expected breach avoided is worth a change; of the rest, what is noticeable."""
    return 1e-9 if objective == "slo" else _NOTICEABLE[objective]


def _losses(values: Floats, objective: Objective, slos: Sequence[Slo]) -> Floats:
    """By scenario, less is better: breaches over SLOs and horizons, or the log of a KPI at the longest horizon."""
    if objective == "slo":
        found = np.zeros(values.shape[0])
        for slo in slos:
            found += slo.breaches(values[..., METRICS.index(slo.metric)]).sum(axis=1)
        return found
    kpi = _metric(values, _LOSS[objective])
    return np.log(np.where(kpi > 0.0, kpi, 1.0))  # what was not observed is no reason to prefer anything


def _metric(values: Floats, metric: Metric) -> Floats:
    """Of every scenario, at the longest horizon."""
    return values[:, -1, METRICS.index(metric)]


def _expected_breaches(rows: Sequence[Row], policy: str) -> float:
    return round(sum(sum(row.breach_probability.values()) for row in rows if row.policy == policy), 9)


def _at_longest(rows: Sequence[Row], policy: str, metric: Metric) -> float:
    """The median over scenarios at the longest horizon."""
    row = max((row for row in rows if row.policy == policy), key=lambda row: row.horizon_seconds)
    return row.kpis[metric].p50
