"""The chart, rendered by Helm: valid, as expected, and with the rules and dashboards of deploy/."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from deploy.helm_chart import CHART, DASHBOARDS, RULES, SAMPLES, Manifest, check, only, refusal, render, render_text
from kavier_twin import __version__
from kavier_twin.daemon.config import read_settings
from real_parts import helm

pytestmark = pytest.mark.real

HERE = Path(__file__).parent
EVERYTHING = HERE / "helm/everything.yaml"
GOLDEN = HERE / "helm/everything.golden.yaml"
OFF_BY_DEFAULT = ("serviceMonitor", "prometheusRule", "grafanaDashboards", "networkPolicy", "podDisruptionBudget")
MATRIX = {
    "defaults": [],
    "everything": ["-f", EVERYTHING],
    **{sample.stem: ["-f", sample] for sample in SAMPLES},
    **{name: ["--set", f"{name}.enabled=true"] for name in OFF_BY_DEFAULT},
    "no volume": ["--set", "persistence.enabled=false"],
    "another's account": ["--set", "serviceAccount.create=false"],
    "named": ["--set", "fullnameOverride=watcher", "--set", "nameOverride=w"],
    "secrets": ["--set", "secrets.kafka=a,secrets.api=b"],
    "ray": ["--set", "ray.address=ray://head:10001"],
}


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_every_manifest_is_valid(values: list[str | Path]) -> None:
    manifests = render(*values)
    assert {"StatefulSet", "Service", "ConfigMap"} <= {manifest["kind"] for manifest in manifests}
    for manifest in manifests:
        check(manifest)


@pytest.mark.parametrize("values", [[], ["-f", EVERYTHING], *(["-f", sample] for sample in SAMPLES)])
def test_helm_lints(values: list[str | Path]) -> None:
    done = subprocess.run([helm(), "lint", "--strict", CHART, *values], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_manifest_is_found_out() -> None:
    manifests = render("-f", EVERYTHING)
    for kind, spoil in (
        ("StatefulSet", lambda spec: spec["template"]["spec"]["containers"][0].update(imagePullpolicy="Always")),
        ("ServiceMonitor", lambda spec: spec["endpoints"][0].update(intervall="30s")),
        ("ServiceMonitor", lambda spec: spec["endpoints"][0].update(interval="30 seconds")),
        ("PrometheusRule", lambda spec: spec["groups"][0].pop("name")),
    ):
        manifest = json.loads(json.dumps(only(manifests, kind)))
        spoil(manifest["spec"])
        with pytest.raises((AssertionError, ValidationError, kubernetes_validate.ValidationError)):
            check(manifest)


def test_golden() -> None:
    rendered = _without_copies(render("-f", EVERYTHING))
    text = "---\n".join(yaml.dump(manifest, Dumper=_Readable, sort_keys=False, width=120) for manifest in rendered)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "if that is meant: UPDATE_GOLDEN=1 pytest tests/deploy, and read the diff"


class _Readable(yaml.SafeDumper):
    """Writes texts of several lines as such."""


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _without_copies(manifests: list[Manifest]) -> list[Manifest]:
    """Without the contents of deploy/, which the next test compares."""
    for manifest in manifests:
        if manifest["kind"] == "PrometheusRule":
            manifest["spec"]["groups"] = [group["name"] for group in manifest["spec"]["groups"]]
        if "-grafana-" in manifest["metadata"]["name"]:
            manifest["data"] = list(manifest["data"])
    return manifests


def test_rules_and_dashboards_are_the_files_of_deploy(tmp_path: Path) -> None:
    assert {path.resolve() for path in (CHART / "files").iterdir()} == {RULES, DASHBOARDS[0].parent}
    subprocess.run([helm(), "package", CHART, "-d", tmp_path], capture_output=True, check=True)
    (package,) = tmp_path.glob("*.tgz")
    runbook, grafana = "http://127.0.0.1:9469/static/runbook.html", "http://127.0.0.1:3000"  # as in deploy/
    links = f"prometheusRule.runbookUrl={runbook},prometheusRule.grafanaUrl={grafana}"
    everything = ["--set", f"prometheusRule.enabled=true,grafanaDashboards.enabled=true,{links}"]
    for chart in (CHART, package):
        command = [helm(), "template", "twin", chart, *everything]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        manifests = [manifest for manifest in yaml.safe_load_all(text) if manifest]
        assert only(manifests, "PrometheusRule")["spec"] == yaml.safe_load(RULES.read_text())
        shown = {}
        for manifest in manifests:
            if manifest["metadata"]["labels"].get("grafana_dashboard") == "1":
                shown |= manifest["data"]
        assert shown == {f"kavier-twin-{path.name}": path.read_text() for path in DASHBOARDS}


@pytest.mark.parametrize(
    ("values", "runbook", "panel"),
    [
        (["-f", EVERYTHING], "https://docs.example.org/runbook#", "https://grafana.example.org/d/kavier-twin-"),
        (
            ["--set", "prometheusRule.enabled=true,service.port=80"],
            "http://twin-kavier-twin.llm:80/static/runbook.html#",
            "/d/kavier-twin-",
        ),
    ],
)
def test_links_of_alerts_begin_where_they_are_told(values: list[str | Path], runbook: str, panel: str) -> None:
    groups = only(render(*values), "PrometheusRule")["spec"]["groups"]
    links = [rule["annotations"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert links
    for link in links:
        assert link["runbook_url"].startswith(runbook)
        assert link["dashboard_url"].startswith(panel)


@pytest.mark.parametrize(
    "sample", [None, EVERYTHING, *SAMPLES], ids=lambda sample: sample.stem if sample else "defaults"
)
def test_the_twin_takes_the_settings(sample: Path | None, tmp_path: Path) -> None:
    manifests = render(*(["-f", sample] if sample else []))
    pod = only(manifests, "StatefulSet")["spec"]["template"]["spec"]
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    text = next(manifest for manifest in manifests if "twin.yaml" in manifest.get("data", {}))["data"]["twin.yaml"]
    for path in ("/var/lib/kavier-twin", *(mount for mount in mounts if mount.startswith("/run/secrets/"))):
        assert path in mounts
        place = tmp_path / path.removeprefix("/")
        place.mkdir(parents=True)
        for key in ("ca.pem", "password", "token"):
            (place / key).write_text("x")
        text = text.replace(path, str(place))
    settings = tmp_path / "twin.yaml"
    settings.write_text(text)
    assert read_settings(settings).http.host == "0.0.0.0"


def test_new_settings_restart_the_pod_and_others_do_not() -> None:
    def checksum(*values: str) -> str:
        template = only(render(*values), "StatefulSet")["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/settings"]
        return found

    assert checksum() == checksum("--set", "serviceMonitor.enabled=true")
    assert checksum() != checksum("-f", str(SAMPLES[0]))


def test_restricted_and_without_a_token() -> None:
    manifests = render("-f", EVERYTHING)
    pods = [only(manifests, "StatefulSet")["spec"]["template"]["spec"], only(manifests, "Pod")["spec"]]
    for pod in pods:  # https://kubernetes.io/docs/concepts/security/pod-security-standards/, profile "restricted"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert {next(k for k in v if k != "name") for v in pod.get("volumes", [])} <= {
            "configMap",
            "secret",
            "emptyDir",
        }
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
    assert only(manifests, "ServiceAccount")["automountServiceAccountToken"] is False


def test_the_service_reaches_the_twin_alone() -> None:
    manifests = render("-f", EVERYTHING)
    selector = only(manifests, "Service")["spec"]["selector"].items()
    assert selector <= only(manifests, "StatefulSet")["spec"]["template"]["metadata"]["labels"].items()
    assert not selector <= only(manifests, "Pod")["metadata"]["labels"].items()
    assert only(manifests, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items() <= (
        only(manifests, "Service")["metadata"]["labels"].items()
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ("settings.pool=chat", "sources"),
        ("settings.http.port=80", "settings.http|settings/http"),
        ("serviceMonitor.interval=often", "interval"),
        ("secrets.kafka.password=x", "kafka"),
        ("podDisruptionBudget.maxUnavailable=2", "maxUnavailable"),
        ("prometheusRule.runbookUrl=docs/runbook.md", "runbookUrl"),
        ("serviceMonitr.enabled=true", "serviceMonitr"),
    ],
)
def test_wrong_values_are_refused_by_name(values: str, named: str) -> None:
    said = refusal("--set", values)
    assert any(name in said for name in named.split("|")), said


def test_notes_tell_the_next_step(tmp_path: Path) -> None:
    # Helm shows notes only where a cluster answers; as the text of a manifest it renders them anywhere.
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    notes = textwrap.indent((chart / "templates/NOTES.txt").read_text(), "    ")
    manifest = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: notes}}\ndata:\n  text: |\n{notes}"
    (chart / "templates/notes.yaml").write_text(manifest)

    def told(*values: str | Path) -> str:
        command = [helm(), "template", "twin", chart, "--namespace", "llm", "-s", "templates/notes.yaml", *values]
        return str(yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["data"])

    assert "--set serviceMonitor.enabled=true" in told()
    assert "--set prometheusRule.enabled=true" in told("--set", "serviceMonitor.enabled=true")
    assert "Overview" in told("-f", EVERYTHING)
    assert "grafanaUrl" in told("--set", "prometheusRule.enabled=true")
    assert "grafanaUrl" not in told("-f", EVERYTHING)
    assert "kubectl -n llm port-forward svc/twin-kavier-twin" in told()
    assert "loses its state" in told("--set", "persistence.enabled=false")
    assert "NO SETTINGS" in told()
    assert "NO SETTINGS" not in told("-f", SAMPLES[0])


def test_the_chart_is_of_this_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


def test_secrets_never_lie_in_values_or_manifests() -> None:
    assert "kind: Secret\n" not in render_text("-f", EVERYTHING)
