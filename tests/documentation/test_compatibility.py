"""docs/compatibility.md says what the golden runs prove."""

from __future__ import annotations

from deploy.helm_chart import ROOT
from documentation.compatibility import page


def test_the_page_is_up_to_date() -> None:
    told = "PYTHONPATH=tests python -m documentation.compatibility > docs/compatibility.md"
    assert (ROOT / "docs/compatibility.md").read_text() == page(), told
