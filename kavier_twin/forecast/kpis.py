"""KPIs of a simulated scenario from its beginning to a horizon."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Final

import numpy as np

from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.impact import Impact, impact
from kavier_twin.simulation.kpi_table import KPIS, METRICS, STATISTICS, Metric
from kavier_twin.simulation.kpis import Counters, Stretch
from kavier_twin.simulation.request_kpis import Requests, latency_kpis
from kavier_twin.simulation.state import FINISHED, FREE, Records

_TIMES: Final = ("arrival", "scheduled", "first_token", "finish")
_TRIMMED: Final = np.dtype([("status", np.int64), ("output", np.int64), *((name, np.float64) for name in _TIMES)])
_OF_IMPACT: Final = frozenset(field.name for field in fields(Impact))


def measure(
    fleet: Fleet, before: Counters, outcomes: Records, frontend_seconds: float, metrics: Collection[Metric] = METRICS
) -> dict[Metric, float]:
    """KPIs from `before`, read when the scenario began, to the fleet's present.

    `outcomes` are the requests that ended in between. Latencies are those of requests (`latency_kpis`); the rest is
    what the engines count, as in vLLM's counters and gauges. NaN where nothing was observed. Those of `metrics` only:
    what nobody asks for costs nothing.
    """
    found: dict[Metric, float] = {}
    done = outcomes[outcomes["status"] == FINISHED]
    of_requests = [metric for metric in metrics if KPIS[STATISTICS[metric].kpi].interval is not None]
    if of_requests:
        live = fleet.state.requests[fleet.state.requests["state"] != FREE]
        requests = Requests.simulated(done, live, frontend_seconds)
        found = dict.fromkeys(of_requests, np.nan)
        found |= latency_kpis(requests, before.time_seconds, fleet.now_seconds, of_requests)
    rest = set(metrics) - found.keys()
    if not rest:
        return found
    after = Counters.of(fleet.state, fleet.now_seconds)
    stretch = Stretch(before, after)
    if rest & _OF_IMPACT:
        readings = [before.reading, after.reading]
        told = impact(fleet.settings, readings, stretch.more("prompt_tokens"), stretch.more("output_tokens"))
        found |= {name: np.nan if told is None else getattr(told, name) for name in rest & _OF_IMPACT}
    for metric in rest - _OF_IMPACT:
        kpi, statistic = STATISTICS[metric]
        if kpi == "requests_per_second":
            found[metric] = done.size / stretch.seconds
        elif kpi == "requests_rejected":
            found[metric] = float(outcomes.size - done.size)
        else:
            value = getattr(stretch, kpi)()
            found[metric] = getattr(value, statistic) if statistic else value
    return found


def trimmed(outcomes: Records) -> Records:
    """Outcomes with what `measure` reads of them, a fifth of their size."""
    found = np.empty(outcomes.size, _TRIMMED)
    for name in _TRIMMED.names or ():
        found[name] = outcomes[name]
    return found
