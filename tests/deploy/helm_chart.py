"""The chart as `helm template` renders it, and what checks a manifest."""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator import v1 as operator

from real_parts import helm

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/kavier-twin"
SAMPLES = sorted((CHART / "samples").glob("*.yaml"))
RULES = ROOT / "deploy/prometheus/kavier-twin.rules.yaml"
DASHBOARDS = sorted((ROOT / "deploy/grafana").glob("*.json"))
KUBERNETES = ("1.29", "1.36")  # versions whose schemas the manifests are held against
ON_KUBERNETES = ("--kube-version", KUBERNETES[1])  # a helm that was built from source takes an old one otherwise

Manifest = dict[str, Any]
_OPERATOR = {"ServiceMonitor": operator.ServiceMonitor, "PrometheusRule": operator.PrometheusRule}


def render(*arguments: str | Path, release: str = "twin") -> list[Manifest]:
    """All manifests, tests included. `arguments` are helm's: -f FILE, --set NAME=VALUE."""
    return [manifest for manifest in yaml.safe_load_all(render_text(*arguments, release=release)) if manifest]


def render_text(*arguments: str | Path, release: str = "twin") -> str:
    command = [helm(), "template", release, CHART, "--namespace", "llm", *ON_KUBERNETES, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(*arguments: str | Path) -> str:
    """What helm says against these values."""
    command = [helm(), "template", "twin", CHART, *ON_KUBERNETES, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


def check(manifest: Manifest) -> None:
    """Against the schema of its kind, unknown fields refused: Kubernetes' own, or that of the operator it is for."""
    if manifest["kind"] == "RayCluster":
        _check_ray_cluster(manifest)
        return
    if manifest["kind"] == "HTTPRoute":
        _check_http_route(manifest)
        return
    model = _OPERATOR.get(manifest["kind"])
    if manifest["kind"] == "ScaledObject":
        pytest.importorskip("cloudcoil.models.keda", reason="needs cloudcoil-models-keda of the extra dev")
        model = import_module("cloudcoil.models.keda.v1alpha1").ScaledObject
    if model is None:
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)
        return
    known = model.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_none=True)
    assert known == manifest


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def _check_ray_cluster(manifest: Manifest) -> None:
    """KubeRay's fields that the chart uses (ray.io/v1), and the pods of the groups against Kubernetes' schema."""
    assert manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"]
    assert spec.keys() <= {"rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"}
    assert spec["headGroupSpec"].keys() <= {"rayStartParams", "template", "serviceType"}
    for group in spec["workerGroupSpecs"]:
        known = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert {"groupName", "rayStartParams", "template"} <= group.keys() <= known
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]})


def _check_http_route(manifest: Manifest) -> None:
    """The Gateway API's fields that the chart uses (gateway.networking.k8s.io/v1)."""
    assert manifest["apiVersion"] == "gateway.networking.k8s.io/v1"
    spec = manifest["spec"]
    assert {"parentRefs", "rules"} <= spec.keys() <= {"parentRefs", "rules", "hostnames"}
    for parent in spec["parentRefs"]:
        assert {"name"} <= parent.keys() <= {"name", "namespace", "sectionName", "port", "group", "kind"}
    for rule in spec["rules"]:
        assert rule.keys() == {"matches", "backendRefs"}
        assert all(match.keys() <= {"path", "headers", "queryParams", "method"} for match in rule["matches"])
        assert all(isinstance(backend["port"], int) for backend in rule["backendRefs"])
