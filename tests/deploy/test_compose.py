"""The compose stack, as far as it can be checked without a container engine."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.helm_chart import ROOT
from kavier_twin.commands import replay
from kavier_twin.daemon.config import read_settings
from kavier_twin.recordings.recording import read_recording, recorded_engine
from real_parts import amtool, promtool

COMPOSE = ROOT / "deploy/compose.yaml"
FILES = ROOT / "deploy/compose"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]


def test_valid_against_the_compose_specification() -> None:
    tool = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_mounted_and_built_exists() -> None:
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())]
    files = [path for path in mounted if path.startswith(".")]
    assert len(files) >= 6
    assert [path for path in files if not (COMPOSE.parent / path).exists()] == []
    build = SERVICES["twin"]["build"]
    assert (COMPOSE.parent / build["context"] / build["dockerfile"]).is_file()


def test_nothing_listens_but_on_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_twin_takes_its_settings_and_they_are_of_the_fleet_that_is_played(tmp_path: Path) -> None:
    text = (FILES / "twin.yaml").read_text().replace("/var/lib/kavier-twin", str(tmp_path))
    (tmp_path / "twin.yaml").write_text(text)
    settings = read_settings(tmp_path / "twin.yaml")
    trace, samples = read_recording(None)
    assert settings.fleet is not None
    assert settings.fleet.settings().engine == recorded_engine(trace)
    assert samples
    parser = argparse.ArgumentParser()
    replay.add_parser(parser.add_subparsers())
    played = parser.parse_args(SERVICES["fleet"]["command"])
    kafka, prometheus = settings.sources
    assert (kafka.brokers, kafka.topics) == ((played.kafka,), (played.topic,))
    assert played.pool == settings.pool
    scraped = yaml.safe_load((FILES / "prometheus.yaml").read_text())["scrape_configs"]
    jobs = {job["job_name"]: job["static_configs"][0] for job in scraped}
    assert jobs[prometheus.engines["job"]]["targets"] == [f"fleet:{played.metrics_port}"]
    assert jobs[prometheus.engines["job"]]["labels"] == {"pod": played.pod}
    assert jobs["kavier-twin"]["targets"] == [f"twin:{settings.http.port}"]


@pytest.mark.real
def test_prometheus_and_alertmanager_take_theirs() -> None:
    for command in (
        [promtool(), "check", "config", "--syntax-only", FILES / "prometheus.yaml"],
        [amtool(), "check-config", FILES / "alertmanager.yaml"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_grafana_finds_the_dashboards() -> None:
    provider = yaml.safe_load((FILES / "grafana-dashboards.yaml").read_text())["providers"][0]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./grafana"] == provider["options"]["path"]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert json.loads((ROOT / "deploy/grafana" / home.name).read_text())["uid"] == "kavier-twin-overview"
    assert str(home.parent) == provider["options"]["path"]
