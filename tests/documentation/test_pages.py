"""Links lead somewhere, YAML is what the code takes, and the architecture names what is there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from connectors.traces.telemetry import parse_record
from deploy.helm_chart import ROOT, check, render
from documentation.commands import PAGES, PROGRAMS, SHELLS, Fence, fences
from kavier_twin.catalog.gpu import Gpu
from kavier_twin.daemon.config import Settings
from kavier_twin.forecast.slo import Slo
from kavier_twin.hardware.fleet_file import FleetFile
from kavier_twin.simulation.footprint import Footprint
from kavier_twin.simulation.policies import Policy
from real_parts import promtool

HARDWARE = {"gpu": "H100 SXM 80GB", "model": "meta-llama/Llama-3.1-8B"}
# What a piece of a settings file stands in.
REST = {
    "fleet": {"hardware": HARDWARE},
    "sources": [{"type": "kafka", "brokers": ["kafka:9092"], "topics": ["llm-requests"]}],
}
BLOCKS = [fence for page in PAGES for fence in fences(page)]
YAML = [fence for fence in BLOCKS if fence.language == "yaml"]
ARCHITECTURE = ROOT / "docs/architecture.md"


def place(fence: Fence) -> str:
    return f"{fence.page.name}:{fence.line}"


def anchors(page: Path) -> set[str]:
    """What headings of a page can be linked as, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        repeated = sum(bool(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other)) for other in found)
        found.add(f"{anchor}-{repeated}" if repeated else anchor)
    return found


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
            if re.match(r"\w+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.name}: {link}")
    assert broken == []


def test_each_page_can_be_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES[0].read_text()))
    assert {str(page.relative_to(ROOT)) for page in PAGES[1:]} - linked == set()


def test_blocks_say_what_they_are() -> None:
    """A command in a block without a language would not be executed."""
    begin = re.compile(rf"^\s*(\$ )?({'|'.join(map(re.escape, PROGRAMS[:-1]))}) ", re.MULTILINE)
    unnamed = [place(fence) for fence in BLOCKS if fence.language not in SHELLS and begin.search(fence.text)]
    indented = [
        page.name for page in PAGES if re.search(r"^ {4,}(kavier-twin|helm|pip) ", page.read_text(), re.MULTILINE)
    ]
    assert [unnamed, indented] == [[], []]


@pytest.mark.parametrize("fence", YAML, ids=place)
def test_yaml_is_taken(fence: Fence, tmp_path: Path) -> None:
    """By the model of what it is: settings or a piece of them, a fleet, policies, objectives, values, a manifest."""
    for content in yaml.safe_load_all(fence.text):
        _take(content, tmp_path)


def _take(content: Any, tmp_path: Path) -> None:
    if isinstance(content, list):
        model: Any = Slo if "metric" in content[0] else Policy
        TypeAdapter(tuple[model, ...]).validate_python(content)
    elif "apiVersion" in content:
        check(content)
    elif content.keys() & {"settings", "networkPolicy", "serviceMonitor", "secrets", "image"}:
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(content))
        for manifest in render("-f", str(tmp_path / "values.yaml")):
            check(manifest)
    elif "scrape_configs" in content:
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(content))
        subprocess.run([promtool(), "check", "config", tmp_path / "prometheus.yml"], check=True)
    elif "power" in content:
        Footprint.model_validate(content)
    elif "memory_bytes" in content:
        Gpu.model_validate(content)
    elif content.keys() & {"hardware", "engine"}:
        FleetFile.model_validate(content)
    else:
        rest = {key: value for key, value in REST.items() if not (key == "fleet" and "pools" in content)}
        Settings.model_validate({**rest, **content})


def test_json_is_json_and_records_are_records() -> None:
    records = 0
    for fence in BLOCKS:
        if fence.language == "json":
            content = json.loads(fence.text)
            if "kind" in content:
                parse_record(fence.text.encode())
                records += 1
    assert records >= 3


def test_the_architecture_names_only_what_is_there() -> None:
    """Last columns are left out: vLLM's files are named there."""
    text = re.sub(r"\|[^|\n]*\|$", "|", ARCHITECTURE.read_text(), flags=re.MULTILINE)
    paths = [f"/{path}" for path in _files()]
    unknown = []
    for name in re.findall(r"`([\w./{},-]*/|[\w./{},-]+\.(?:py|yaml|toml))`", text):
        for one in _alternatives(name):
            if not any(f"/{one}" in path if one.endswith("/") else path.endswith(f"/{one}") for path in paths):
                unknown.append(one)
    assert unknown == []


def test_the_architecture_names_every_room() -> None:
    """Every package and, of the modules that are in none, each."""
    names = re.findall(r"`([\w./{},-]+)`", ARCHITECTURE.read_text())
    named = {part.rstrip("/") for name in names for one in _alternatives(name) for part in (one, one.split("/")[-1])}
    named |= {name.rstrip("/").split("/")[-1] for name in names if name.endswith("/")}
    code = [path for path in _files() if re.match(r"(kavier_twin|connectors)/.*\.py$", path)]
    rooms = {path.split("/")[-2] for path in code if path.count("/") > 1}
    modules = {path.split("/")[1] for path in code if path.count("/") == 1 and "__" not in path}
    assert sorted((rooms | modules) - named) == []


def _files() -> list[str]:
    """Of the repository's own folders."""
    top = ("kavier_twin", "connectors", "deploy", "helm", "tests", "benchmarks", ".ci")
    found = [path for name in top for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts]
    return [str(path.relative_to(ROOT)) for path in (*found, ROOT / "pyproject.toml") if path.is_file()]


def _alternatives(name: str) -> list[str]:
    """a/{b,c}.py as both."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    return [f"{found[1]}{one}{found[3]}" for one in found[2].split(",")] if found else [name]
