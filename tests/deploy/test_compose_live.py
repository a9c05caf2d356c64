"""The compose stack without containers: each service's own settings, with its own program, on this machine."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import urllib3
import yaml

from deploy.helm_chart import ROOT, RULES
from kafka_broker import OurBroker
from prometheus_server import RealAlertmanager, RealPrometheus, free_address

pytest.importorskip("kafka", reason="needs the extra kafka")
pytestmark = [pytest.mark.real, pytest.mark.slow]

FILES = ROOT / "deploy/compose"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
PATIENCE_SECONDS = 120.0


class ComposeBroker(OurBroker):
    """With the settings that compose gives to Kafka's image, which makes properties of the variables `KAFKA_*`."""

    def properties(self, plain: int, secure: int, controller: int) -> str:
        given = {
            name.removeprefix("KAFKA_").lower().replace("_", "."): str(value)
            for name, value in SERVICES["kafka"]["environment"].items()
        }
        text = "".join(f"{name}={value}\n" for name, value in given.items())
        for there, here in (
            ("//:9092", f"//:{plain}"),
            ("//:9093", f"//:{controller}"),
            ("kafka:9092", f"127.0.0.1:{plain}"),
            ("kafka:9093", f"127.0.0.1:{controller}"),
        ):
            assert there in text
            text = text.replace(there, here)
        return f"{text}log.dirs={self._directory}/data\n"


class Stack(NamedTuple):
    twin: str
    prometheus: str
    alertmanager: str


@pytest.fixture
def stack(real_kafka: OurBroker, tmp_path: Path) -> Iterator[Stack]:
    with ExitStack() as running:
        yield start(running, real_kafka.jars, tmp_path)


def start(running: ExitStack, jars: Path, directory: Path) -> Stack:
    """All services but Grafana, ended with `running`."""
    for name in ("kafka", "state"):
        (directory / name).mkdir()
    kafka = ComposeBroker(jars, directory / "kafka")
    running.callback(kafka.close)
    alerts = RealAlertmanager(directory, yaml.safe_load((FILES / "alertmanager.yaml").read_text()))
    twin, fleet = free_address(), free_address()
    here = {
        "kafka:9092": kafka.address,
        "twin:9469": twin,
        "fleet:8000": fleet,
        "alertmanager:9093": alerts.address,
        "/etc/prometheus/rules/*.yaml": str(RULES),
        "/var/lib/kavier-twin": str(directory / "state"),
        "{host: 0.0.0.0, port: 9469}": f"{{host: 127.0.0.1, port: {twin.split(':')[1]}}}",
    }

    def moved(text: str) -> str:
        return re.sub("|".join(map(re.escape, here)), lambda found: here[found[0]], text)

    settings = yaml.safe_load(moved((FILES / "prometheus.yaml").read_text()))
    prometheus = RealPrometheus(directory, settings.pop("scrape_configs"), **settings)
    here["http://prometheus:9090"] = prometheus.url
    for server in (alerts, prometheus):
        server.start()
        running.callback(server.stop)
    (directory / "twin.yaml").write_text(moved((FILES / "twin.yaml").read_text()))
    here["/etc/kavier-twin/twin.yaml"] = str(directory / "twin.yaml")
    here["8000"] = fleet.split(":")[1]
    for service in ("twin", "fleet"):
        arguments = [moved(str(argument)) for argument in SERVICES[service]["command"]]
        with (directory / f"{service}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "kavier_twin.commands.main", *arguments], stdout=log, stderr=subprocess.STDOUT
            )
        running.callback(process.wait, 30)
        running.callback(process.terminate)
    return Stack(f"http://{twin}", prometheus.url, alerts.url)


def test_the_services_find_each_other(stack: Stack) -> None:
    def found() -> dict[str, Any]:
        return {
            "scraped": {series["metric"]["job"]: series["value"][1] for series in ask(stack, "up")},
            "sources": {series["value"][1] for series in ask(stack, "kavier_twin_source_up")},
            "alertmanagers": len(get(f"{stack.prometheus}/api/v1/alertmanagers")["data"]["activeAlertmanagers"]),
            "requests": bool(ask(stack, 'kavier_twin_requests_finished_total{pool="chat"} > 20')),
            "forecasts": bool(ask(stack, 'kavier_twin_slo_breach_probability_ratio{in_force="1"}')),
            "engine": bool(ask(stack, "kavier_twin_observed_requests_running")),
        }

    meant = {
        "scraped": {"kavier-twin": "1", "vllm": "1"},
        "sources": {"1"},
        "alertmanagers": 1,
        "requests": True,
        "forecasts": True,
        "engine": True,
    }
    deadline = time.monotonic() + PATIENCE_SECONDS
    while found() != meant and time.monotonic() < deadline:
        time.sleep(1.0)
    assert found() == meant


def ask(stack: Stack, expression: str) -> list[dict[str, Any]]:
    answer: dict[str, Any] = get(f"{stack.prometheus}/api/v1/query", query=expression)
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def get(url: str, **fields: str) -> Any:
    return urllib3.request("GET", url, fields=fields, timeout=10.0).json()
