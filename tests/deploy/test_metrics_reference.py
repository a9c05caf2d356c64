"""docs/metrics.md is what the code serves."""

from __future__ import annotations

from deploy.helm_chart import ROOT
from deploy.metrics_reference import reference


def test_the_reference_is_up_to_date() -> None:
    told = "PYTHONPATH=tests python -m deploy.metrics_reference > docs/metrics.md"
    assert (ROOT / "docs/metrics.md").read_text() == reference(), told
