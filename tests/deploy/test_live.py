"""A demo scraped by a real Prometheus: every panel has data, a forecast's alert reaches a real Alertmanager."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import urllib3
import yaml

from deploy.helm_chart import DASHBOARDS, ROOT, RULES, only, render
from prometheus_server import RealPrometheus, wait_until
from real_parts import alertmanager

pytestmark = [pytest.mark.real, pytest.mark.slow]

SPEED = 10.0  # times faster than it happened
PATIENCE_SECONDS = 120.0


class Live(NamedTuple):
    demo: str
    prometheus: str
    alertmanager: str


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("live")
    demo_port, alert_port = _free_port(), _free_port()
    rules = directory / "rules.yaml"
    # As they are, but for the clock: the demo goes through six minutes in half a one.
    rules.write_text(re.sub(r"(\s(?:interval|for)): \w+", r"\1: 1s", RULES.read_text()))
    settings = yaml.safe_load((ROOT / "deploy/compose/alertmanager.yaml").read_text())
    settings["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    (directory / "alertmanager.yaml").write_text(yaml.safe_dump(settings))
    prometheus = RealPrometheus(
        directory,
        [{"job_name": "kavier-twin", "static_configs": [{"targets": [f"127.0.0.1:{demo_port}"]}]}],
        **{
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alert_port}"]}]}]},
        },
    )
    told = [
        alertmanager(),
        f"--config.file={directory / 'alertmanager.yaml'}",
        f"--storage.path={directory / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{alert_port}",
        "--cluster.listen-address=",
    ]
    demo = [sys.executable, "-m", "kavier_twin.cli", "demo", "--no-ui", "--speed", str(SPEED), "--port", str(demo_port)]
    running = []
    try:
        for name, command in (("alertmanager", told), ("demo", demo)):
            with (directory / f"{name}.log").open("wb") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
        prometheus.start()
        wait_until(lambda: _answers(f"http://127.0.0.1:{demo_port}/healthz"), PATIENCE_SECONDS)
        yield Live(f"http://127.0.0.1:{demo_port}", prometheus.url, f"http://127.0.0.1:{alert_port}")
    finally:
        prometheus.stop()
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait(30)


def test_a_forecast_raises_an_alert_that_reaches_alertmanager(live: Live) -> None:
    def raised() -> list[dict[str, Any]]:
        alerts = _get(f"{live.alertmanager}/api/v2/alerts")
        return [alert for alert in alerts if alert["labels"]["alertname"] == "KavierTwinSloBreachPredicted"]

    _until(raised)
    alert = raised()[0]
    assert alert["labels"]["pool"] == "demo"
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert alert["labels"]["slo"] in {"ttft_p99_1s", "e2e_p95_3s"}
    assert alert["annotations"]["lead_time"] in {"30s", "1m 0s", "2m 0s"}
    assert "of the simulated futures breach SLO" in alert["annotations"]["description"]
    assert "<error" not in json.dumps(alert["annotations"])


def test_what_helm_test_asks_is_answered(live: Live) -> None:
    (script,) = only(render(), "Pod")["spec"]["containers"][0]["args"]
    script = script.replace("http://twin-kavier-twin:9469", live.demo)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert re.fullmatch(r"the twin serves \d+ series\n", done.stdout), done.stderr


def test_every_panel_of_every_dashboard_has_data(live: Live) -> None:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    empty: dict[str, str] = {}

    def all_have_data() -> bool:
        empty.clear()
        for board in boards:
            values = _variables(live, board)
            for panel in board["panels"]:
                for target in panel["targets"]:
                    if not _query(live, target, values):
                        empty[f"{board['title']}, {panel['title']}, {target['refId']}"] = target["expr"]
        return not empty

    try:
        _until(all_have_data, 60.0)
    except AssertionError:
        pytest.fail(f"no data: {json.dumps(empty, indent=1)}")


def _variables(live: Live, board: dict[str, Any]) -> dict[str, str]:
    """The values that Grafana would choose: the first of each query."""
    values: dict[str, str] = {"__rate_interval": "10s"}
    for variable in board["templating"]["list"]:
        if variable["type"] != "query":
            continue
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert found, variable["query"]
        result = _ask(live, "query", query=_filled(found[1], values))
        known = sorted({series["metric"][found[2]] for series in result}, key=lambda text: (len(text), text))
        values[variable["name"]] = known[0] if known else ""
    return values


def _query(live: Live, target: dict[str, Any], values: dict[str, str]) -> list[Any]:
    expression = _filled(target["expr"], values)
    if target.get("instant"):
        return _ask(live, "query", query=expression)
    now = time.time()
    return _ask(live, "query_range", query=expression, start=now - 60, end=now, step=1)


def _filled(expression: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        expression = expression.replace(f"${name}", value)
    assert "$" not in expression, expression
    return expression


def _ask(live: Live, how: str, **fields: Any) -> list[Any]:
    answer = _get(f"{live.prometheus}/api/v1/{how}", **fields)
    assert answer["status"] == "success", answer
    found: list[Any] = answer["data"]["result"]
    return found


def _get(url: str, **fields: Any) -> Any:
    return urllib3.request("GET", url, fields={name: str(value) for name, value in fields.items()}, timeout=10.0).json()


def _answers(url: str) -> bool:
    try:
        return urllib3.request("GET", url, retries=False, timeout=1.0).status == 200
    except urllib3.exceptions.HTTPError:
        return False


def _until(condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.5)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
