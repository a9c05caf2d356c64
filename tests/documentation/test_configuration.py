"""docs/configuration.md says what the code takes."""

from __future__ import annotations

from deploy.helm_chart import ROOT
from documentation.configuration_reference import check_example, reference, sections


def test_the_reference_is_up_to_date() -> None:
    told = "PYTHONPATH=tests python -m documentation.configuration_reference > docs/configuration.md"
    assert (ROOT / "docs/configuration.md").read_text() == reference(), told


def test_every_setting_is_described_and_its_example_may_be_written() -> None:
    undescribed = []
    for place, model in sections().items():
        for name, field in model.model_fields.items():
            if field.exclude:
                continue
            check_example(model, name)
            if not (field.description or "").strip():
                undescribed.append(f"{place}.{name}")
    assert undescribed == []
