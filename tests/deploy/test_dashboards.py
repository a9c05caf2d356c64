"""Grafana's dashboards: well formed, free of any one installation, and where the alerts' links lead."""

from __future__ import annotations

import itertools
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from deploy.helm_chart import DASHBOARDS, RULES

BOARDS: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in DASHBOARDS}
PANELS = [(f"{name}-{panel['id']}", panel) for name, board in BOARDS.items() for panel in board["panels"]]
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule]


def test_the_three() -> None:
    assert set(BOARDS) == {"overview", "forecast", "health"}
    assert {board["uid"] for board in BOARDS.values()} == {f"kavier-twin-{name}" for name in BOARDS}


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_a_dashboard_belongs_to_no_one_installation(board: dict[str, Any]) -> None:
    assert "id" not in board
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert "pool" in variables
    sources = [found["datasource"]["uid"] for found in (*_targets(board), *board["panels"])]
    sources += [variable["datasource"]["uid"] for variable in variables.values() if "datasource" in variable]
    assert set(sources) == {"${datasource}"}


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_panels_have_numbers_of_their_own_and_do_not_overlap(board: dict[str, Any]) -> None:
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for one, other in itertools.combinations([panel["gridPos"] for panel in board["panels"]], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
        assert one["x"] + one["w"] <= 24


@pytest.mark.parametrize("panel", [panel for _, panel in PANELS], ids=[name for name, _ in PANELS])
def test_a_panel_says_what_it_shows_in_which_unit_and_what_is_good(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"]


@pytest.mark.parametrize("alert", ALERTS, ids=[f"{alert['alert']}-{alert['labels']['severity']}" for alert in ALERTS])
def test_an_alert_leads_to_its_panel(alert: dict[str, Any]) -> None:
    link = urlsplit(alert["annotations"]["dashboard_url"])
    (board,) = (board for board in BOARDS.values() if link.path == f"/d/{board['uid']}")
    assert parse_qs(link.query)["viewPanel"][0] in {str(panel["id"]) for panel in board["panels"]}


def _targets(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [target for panel in board["panels"] for target in panel["targets"]]
