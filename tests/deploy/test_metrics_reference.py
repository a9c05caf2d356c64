"""docs/metrics.md is what the code serves, and rules and dashboards ask for nothing else."""

from __future__ import annotations

import json
import re

import yaml

from deploy.helm_chart import DASHBOARDS, ROOT, RULES
from deploy.metrics_reference import families, name_of, reference


def test_the_reference_is_up_to_date() -> None:
    told = "PYTHONPATH=tests python -m deploy.metrics_reference > docs/metrics.md"
    assert (ROOT / "docs/metrics.md").read_text() == reference(), told


def test_rules_and_dashboards_ask_for_metrics_that_exist() -> None:
    expressions = [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    for path in DASHBOARDS:
        expressions += [
            target["expr"] for panel in json.loads(path.read_text())["panels"] for target in panel["targets"]
        ]
    asked = {name for text in expressions for name in re.findall(r"(?<![:\w])kavier_twin_\w+\b(?!:)", text)}
    assert len(asked) > 20
    assert asked - {name_of(family) for family in families()} == set()
