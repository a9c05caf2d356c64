"""The table of KPIs: its rows agree with each other, and no other part of the product has a list of KPIs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import kavier_twin
from kavier_twin.forecast.settings import Objective
from kavier_twin.forecast.slo import DEFAULT_SLOS
from kavier_twin.simulation import kpi_table
from kavier_twin.simulation.kpi_table import GAUGES, KPIS, LATENCIES, METRICS, RATES, STATISTICS, Kpi, share
from kavier_twin.telemetry import RequestRecord

PACKAGE = Path(kavier_twin.__file__).parent
NAMES = frozenset({*KPIS, *METRICS})
MOST = 2  # names of KPIs that one collection may spell: more is a second table


def test_a_metric_is_a_kpi_or_one_statistic_of_it() -> None:
    assert len(METRICS) == len(set(METRICS))
    assert STATISTICS["ttft_p99_seconds"] == ("ttft_seconds", "p99")
    assert STATISTICS["requests_running"] == ("requests_running", "")
    for kpi in KPIS.values():
        assert [STATISTICS[metric].statistic for metric in kpi.metrics] == list(kpi.statistics or ("",))
        assert kpi.metric in METRICS
        assert [share(one) for one in kpi.statistics] == sorted(share(one) for one in kpi.statistics)
    assert {slo.metric for slo in DEFAULT_SLOS} <= set(METRICS)


def test_units_stand_in_the_names() -> None:
    for name in LATENCIES:
        assert name.endswith("_seconds")
        assert KPIS[name].statistics
    for name in RATES:
        assert name.endswith("_per_second")
    for kpi in KPIS.values():
        assert (kpi.unit == kpi_table.RATIO) == kpi.name.endswith("_ratio")
        assert kpi.unit.scales[0].from_value == 0.0  # the smallest value has a scale
        assert [one.from_value for one in kpi.unit.scales] == sorted(one.from_value for one in kpi.unit.scales)
    assert GAUGES == (
        "requests_running",
        "requests_waiting",
        "kv_cache_usage_ratio",
    )  # the order in which engines report


def test_every_kpi_is_judged_in_the_end() -> None:
    """What is not observed follows others to one with a bound, never in a circle."""
    for kpi in KPIS.values():
        seen: list[Kpi] = [kpi]
        while seen[-1].stand_in:
            seen.append(KPIS[seen[-1].stand_in])
            assert len(seen) <= len(KPIS)
        assert seen[-1].max_error is not None, kpi.name


def test_each_objective_but_that_of_the_slos_has_a_kpi() -> None:
    assert sorted(kpi.objective for kpi in KPIS.values() if kpi.objective) == sorted({*get_args(Objective)} - {"slo"})


def _collections(tree: ast.AST) -> Iterator[tuple[int, set[str]]]:
    """Line and strings of everything in the code that lists things, nested lists included. A dictionary that updates a
    telemetry record is none: its keys are fields of the record, some of which are called as KPIs are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict | ast.MatchOr):
            strings = {str(one.value) for one in ast.walk(node) if isinstance(one, ast.Constant)}
            keys = {getattr(key, "value", None) for key in node.keys} if isinstance(node, ast.Dict) else set()
            if not (keys and keys <= {*RequestRecord.model_fields, None} and keys - NAMES):
                yield node.lineno, strings


@pytest.mark.parametrize(
    "path", [path for path in sorted(PACKAGE.rglob("*.py")) if path != Path(kpi_table.__file__)], ids=str
)
def test_no_code_has_a_second_list_of_kpis(path: Path) -> None:
    for line, strings in _collections(ast.parse(path.read_text(encoding="utf-8"))):
        assert len(found := strings & NAMES) <= MOST, f"{path}:{line}: {sorted(found)}; take them from the table"


@pytest.mark.parametrize("path", sorted((PACKAGE / "serve/static").glob("*.js")), ids=lambda path: path.name)
def test_the_page_has_no_list_of_kpis(path: Path) -> None:
    spelled = set(re.findall(r"""["'`](\w+)["'`]|\b(\w+):""", path.read_text(encoding="utf-8")))
    assert len(found := NAMES & {one or other for one, other in spelled}) <= MOST, sorted(found)
