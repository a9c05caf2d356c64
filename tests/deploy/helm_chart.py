"""The chart as `helm template` renders it, and what checks a manifest."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator import v1 as operator

from real_parts import helm

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/kavier-twin"
SAMPLES = sorted((CHART / "samples").glob("*.yaml"))
RULES = ROOT / "deploy/prometheus/kavier-twin.rules.yaml"
DASHBOARDS = sorted((ROOT / "deploy/grafana").glob("*.json"))
KUBERNETES = ("1.29", "1.36")  # versions whose schemas the manifests are held against

Manifest = dict[str, Any]
_OPERATOR = {"ServiceMonitor": operator.ServiceMonitor, "PrometheusRule": operator.PrometheusRule}


def render(*arguments: str | Path, release: str = "twin") -> list[Manifest]:
    """All manifests, tests included. `arguments` are helm's: -f FILE, --set NAME=VALUE."""
    return [manifest for manifest in yaml.safe_load_all(render_text(*arguments, release=release)) if manifest]


def render_text(*arguments: str | Path, release: str = "twin") -> str:
    command = [helm(), "template", release, CHART, "--namespace", "llm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(*arguments: str | Path) -> str:
    """What helm says against these values."""
    command = [helm(), "template", "twin", CHART, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


def check(manifest: Manifest) -> None:
    """Against the schema of its kind, unknown fields refused: Kubernetes' own, or the Prometheus operator's."""
    model = _OPERATOR.get(manifest["kind"])
    if model is None:
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)
        return
    known = model.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_none=True)
    assert known == manifest


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found
