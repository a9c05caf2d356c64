"""Scores and figures as they are printed: readable in 80 columns and in 160."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kavier_twin.commands.figures import figure, spread
from kavier_twin.commands.score_tables import print_scores
from kavier_twin.scores.scorer import AlertScore, Bin, BreachScore, KpiScore, Scores
from kavier_twin.simulation.kpi_table import METRICS, label_of

BINS = tuple(Bin(0.1 * place, 10, 0.1 * place, 0.1 * place) for place in range(10))
SCORES = Scores(
    kpis=tuple(
        KpiScore(kpi, horizon, 1_234, 123.456, 234.567, 0.526, 120.25, 0.513, 0.512, 0.934, 345.678, 1234.5678)
        for kpi in METRICS
        for horizon in (60.0, 3600.0)
    ),
    breaches=(BreachScore("ttft_p99_interactive", 3600.0, 1_234, 123, 0.123, 0.145, 0.234, BINS),),
    alerts=(AlertScore("ttft_p99_interactive", 12, 13, 0.9, 0.8, (300.0,), 300.0),),
    pending=17,
    unobserved={"power_watts": 3, "ttft_p50_seconds": 1},
)


@pytest.mark.parametrize("width", [80, 160])
def test_every_figure_has_its_room(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_scores(console, SCORES)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for name in map(label_of, METRICS):  # a row each, in one line with its figures
        assert any(line.strip().startswith(f"{name} ") and "51%, 93%" in line for line in lines), name
    assert "10% -> 10% (10)" in text
    assert "TTFT p50, power." in " ".join(text.split())


def test_figures_have_units_and_three_digits() -> None:
    assert figure("ttft_p99_seconds", 0.03456) == "34.6 ms"
    assert figure("e2e_p95_seconds", 12.345) == "12.3 s"
    assert figure("prefix_cache_hit_ratio", 0.8652) == "86.5 %"
    assert figure("energy_joules_per_million_tokens", 2.5e6) == "2.50 MJ"
    assert figure("requests_per_second", float("nan")) == "–"
    assert figure("cost_per_million_tokens", None) == "–"
    assert spread("ttft_p99_seconds", 0.5, 0.9, 1.5) == "0.90 s (0.50–1.50)"
    assert spread("preemptions", 0.0, 0.0, 0.0) == "0"
