"""The rules for Prometheus: their own unit tests, and that what they point to exists."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy import runbook_page
from deploy.helm_chart import RULES
from deploy.runbook_page import PAGE, RUNBOOK
from kavier_twin.scores.alerts import ALERT_PROBABILITY, HOLD_SECONDS
from real_parts import promtool

BREACH = "KavierTwinSloBreachPredicted"
UNIT_TESTS = RULES.with_name("kavier-twin.test.yaml")
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule]


@pytest.mark.real
def test_unit_tests_of_the_rules() -> None:
    run_promtool("test", "rules", UNIT_TESTS)


@pytest.mark.real
def test_promtool_finds_nothing_to_criticise() -> None:
    run_promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_every_alert_is_seen_firing_and_not_firing_in_a_unit_test() -> None:
    checks = [check for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"] for check in test["alert_rule_test"]]
    for alert in {alert["alert"] for alert in ALERTS}:
        seen = {bool(check["exp_alerts"]) for check in checks if check["alertname"] == alert}
        assert seen == {True, False}, alert


@pytest.mark.parametrize("alert", ALERTS, ids=[f"{alert['alert']}-{alert['labels']['severity']}" for alert in ALERTS])
def test_an_alert_has_a_severity_and_leads_to_its_section_of_the_runbook(alert: dict[str, dict[str, str]]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    page, _, section = alert["annotations"]["runbook_url"].partition("#")
    assert page == "http://127.0.0.1:9469/static/runbook.html"
    assert f'<h2 id="{section}">' in PAGE.read_text()


def test_alerts_use_the_definition_that_the_scores_use() -> None:
    """Rules cannot read the constants; nor can the dashboards' colours and the runbook."""
    (warning,) = (rule for rule in ALERTS if rule["alert"] == BREACH and rule["labels"]["severity"] == "warning")
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    name = "pool_slo:kavier_twin_slo_first_breach_probability_ratio:alert_start"
    (start,) = (rule for rule in rules if rule.get("record") == name)
    assert f"[90s]) >= {ALERT_PROBABILITY:g}" in start["expr"]
    assert f"{name}[{HOLD_SECONDS / 60.0:g}m]" in warning["expr"]
    assert f"{ALERT_PROBABILITY:.0%} or more".replace("%", " %") in " ".join(RUNBOOK.read_text().split())
    board = json.loads((RULES.parents[1] / "grafana" / "forecast.json").read_text())
    (panel,) = (panel for panel in board["panels"] if panel["title"] == "Breach probability under the current policy")
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1]["value"] == ALERT_PROBABILITY


def test_the_runbook_that_the_twin_serves_is_the_documentation_s() -> None:
    told = "PYTHONPATH=tests python -m deploy.runbook_page > kavier_twin/serve/static/runbook.html"
    assert PAGE.read_text() == runbook_page.page(), told


def run_promtool(*arguments: str | Path) -> None:
    done = subprocess.run([promtool(), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
