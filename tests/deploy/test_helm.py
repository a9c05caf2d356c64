"""The chart, rendered by Helm: valid, as expected, and with the rules and dashboards of deploy/."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Thread

import kubernetes_validate
import pytest
import yaml
from prometheus_client.metrics_core import Metric
from pydantic import ValidationError

from deploy.chart_readme import readme
from deploy.helm_chart import (
    CHART,
    DASHBOARDS,
    ON_KUBERNETES,
    RULES,
    SAMPLES,
    Manifest,
    check,
    only,
    refusal,
    render,
    render_text,
)
from deploy.metrics_reference import families, name_of
from kavier_twin import __version__
from kavier_twin.commands import tap
from kavier_twin.daemon.config import read_settings
from real_parts import helm, promtool

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
}


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_every_manifest_is_valid(values: list[str | Path]) -> None:
    manifests = render(*values)
    assert {"StatefulSet", "Service", "ConfigMap"} <= {manifest["kind"] for manifest in manifests}
    for manifest in manifests:
        check(manifest)


@pytest.mark.parametrize("values", [[], ["-f", EVERYTHING], *(["-f", sample] for sample in SAMPLES)])
def test_helm_lints(values: list[str | Path]) -> None:
    command = [helm(), "lint", "--strict", CHART, *ON_KUBERNETES, *values]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
        command = [helm(), "template", "twin", chart, *ON_KUBERNETES, *everything]
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
def test_the_twin_takes_the_settings(sample: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = render(*(["-f", sample] if sample else []))
    pod = only(manifests, "StatefulSet")["spec"]["template"]["spec"]
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    text = next(manifest for manifest in manifests if "twin.yaml" in manifest.get("data", {}))["data"]["twin.yaml"]
    for path in ("/var/lib/kavier-twin", *(mount for mount in mounts if mount.startswith("/run/"))):
        assert path in mounts
        place = tmp_path / path.removeprefix("/")
        place.mkdir(parents=True)
        for key in ("ca.crt", "ca.pem", "password", "token"):
            (place / key).write_text("x")
        text = text.replace(path, str(place))
    for variable in pod["containers"][0].get("env", ()):
        monkeypatch.setenv(variable["name"], "x")
    settings = tmp_path / "twin.yaml"
    settings.write_text(text)
    assert read_settings(settings).http.host == "0.0.0.0"


def test_new_settings_restart_the_pod_and_others_do_not() -> None:
    def checksum(*values: str) -> str:
        template = only(render(*values), "StatefulSet")["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/settings"]
        return found

    assert checksum() == checksum("--set", "serviceMonitor.enabled=true")
    assert checksum() != checksum("-f", str(CHART / "samples/llm-d.yaml"))


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
            "persistentVolumeClaim",
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
        ("image.digest=latest", "digest"),
        ("image.registry=http://registry", "registry"),
        ("persistence.existingClaim=Mine", "existingClaim"),
        ("persistence.enabled=false,persistence.existingClaim=mine", "persistence.enabled is false"),
        (
            "persistence.existingClaim=mine,persistence.storageClassName=fast",
            "not used with persistence.existingClaim",
        ),
        ("ca.configMap=a,ca.secret=b", "either configMap or secret"),
        ("serviceAccount.create=false,serviceAccount.annotations.a=b", "serviceAccount.annotations are not used"),
        ("ingress.enabled=true", "ingress.hosts is empty"),
        ("ingress.hosts[0].host=a", "paths"),
        ("httpRoute.enabled=true", "httpRoute.parentRefs is empty"),
        ("ray.address=ray://head:10001", "forecast.executor: ray"),
        ("podLabels.app\\.kubernetes\\.io/name=x", "podLabels: the chart sets the label app.kubernetes.io/name"),
        ("serviceMonitor.additionalLabels.helm\\.sh/chart=x", "serviceMonitor.additionalLabels: the chart sets"),
        (
            "prometheusRule.additionalLabels.helm\\.sh/chart=x",
            "prometheusRule.additionalLabels: the chart",
        ),
        ("grafanaDashboards.labels.app\\.kubernetes\\.io/instance=x", "grafanaDashboards.labels: the chart sets"),
        ("podAnnotations.checksum/settings=x", "podAnnotations: the chart sets"),
        ("extraVolumes[0].name=tmp", "a volume named tmp"),
        ("sidecars[0].name=twin", "a container named twin"),
        ("extraEnv[0].value=x", "name"),
        ("extraVolumeMounts[0].name=x", "mountPath"),
        ("extraObjects[0].kind=Secret", "apiVersion"),
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


_PROMETHEUS = "settings.fleet.replicas=1,settings.sources[0].type=prometheus,settings.sources[0]"


@pytest.mark.parametrize(
    ("source", "refused", "mended"),
    [
        ("bearer_token.env=TOKEN", "the environment variable TOKEN", "extraEnv[0].name=TOKEN,extraEnv[0].value=x"),
        ("bearer_token.env=TOKEN", "the environment variable TOKEN", "envFrom[0].secretRef.name=tokens"),
        ("bearer_token.file=/run/secrets/prom/token", "add prom to secrets", "secrets.prom=prometheus-token"),
        (
            "bearer_token.file=/run/secrets/prom/token",
            "add prom to secrets",
            "extraVolumeMounts[0].name=v,extraVolumeMounts[0].mountPath=/run/secrets/prom",
        ),
        ("ca_file=/run/ca/ca.crt", "ca.configMap or ca.secret", "ca.configMap=company-ca"),
        ("ca_file=/run/ca/ca.crt", "ca.configMap or ca.secret", "ca.secret=company-ca"),
    ],
)
def test_secrets_that_the_settings_name_must_be_in_the_pod(source: str, refused: str, mended: str) -> None:
    assert refused in refusal("--set", f"{_PROMETHEUS}.{source}")
    for manifest in render("--set", f"{_PROMETHEUS}.{source},{mended}"):
        check(manifest)
    render("--set", f"{_PROMETHEUS}.engines.env=prod")  # a label, not a variable


def test_an_upgrade_reaches_a_pod_that_is_not_ready() -> None:
    assert only(render(), "StatefulSet")["spec"]["podManagementPolicy"] == "Parallel"


@pytest.mark.parametrize(
    ("installed", "upgrade", "said"),
    [
        ("", "", ""),
        ("", "serviceMonitor.enabled=true,persistence.size=2Gi", ""),
        ("persistence.storageClassName=-", "persistence.storageClassName=-", ""),
        (
            "",
            "persistence.size=5Gi",
            "a claim of 2Gi, the default class, ReadWriteOnce, the values ask for a claim of 5Gi",
        ),
        ("", "persistence.enabled=false", "the values ask for no volume of its own"),
        ("persistence.enabled=false", "", "has no volume of its own, the values ask for a claim of 2Gi"),
        ("", "persistence.existingClaim=mine", "the values ask for no volume of its own"),
        ("persistence.existingClaim=mine", "persistence.enabled=false", ""),
        ("", "persistence.storageClassName=-", 'the values ask for a claim of 2Gi, class ""'),
        ("", "persistence.accessModes[0]=ReadWriteMany", "ReadWriteMany"),
    ],
)
def test_what_kubernetes_forbids_to_change_is_refused_in_words(installed: str, upgrade: str, said: str) -> None:
    there = only(render("--set", installed), "StatefulSet")
    answer = _asked_of_a_cluster(there, upgrade)
    assert (answer.returncode == 0) == (not said), answer.stderr
    assert said in answer.stderr
    if said:
        assert "kubectl -n llm delete statefulset twin-kavier-twin --cascade=orphan" in answer.stderr


def test_a_release_of_an_older_chart_is_told_the_command() -> None:
    there = only(render(), "StatefulSet")
    there["spec"]["podManagementPolicy"] = "OrderedReady"
    answer = _asked_of_a_cluster(there, "")
    assert answer.returncode != 0
    assert "is of a chart before 0.2.0" in answer.stderr
    assert "kubectl -n llm delete statefulset twin-kavier-twin --cascade=orphan" in answer.stderr


def _asked_of_a_cluster(there: Manifest, values: str) -> subprocess.CompletedProcess[str]:
    """`helm template` of an upgrade that may look at a cluster, of which one answers that has this StatefulSet."""
    resource = {"name": "statefulsets", "singularName": "", "namespaced": True, "kind": "StatefulSet", "verbs": ["get"]}
    versions = [{"groupVersion": "apps/v1", "version": "v1"}]
    answers = {
        "/version": {"major": "1", "minor": "36", "gitVersion": "v1.36.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
        "/apis": {"kind": "APIGroupList", "groups": [{"name": "apps", "versions": versions}]},
        "/apis/apps/v1": {"kind": "APIResourceList", "groupVersion": "apps/v1", "resources": [resource]},
        "/apis/apps/v1/namespaces/llm/statefulsets/twin-kavier-twin": there,
    }

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path.partition("?")[0])
            missing = {"kind": "Status", "apiVersion": "v1", "reason": "NotFound", "code": 404}
            body = json.dumps(found or missing).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    Thread(target=server.serve_forever, daemon=True).start()
    command = [
        helm(),
        "template",
        "twin",
        CHART,
        "--namespace",
        "llm",
        "--dry-run=server",
        "--is-upgrade",
        *ON_KUBERNETES,
    ]
    command += ["--kube-apiserver", f"http://127.0.0.1:{server.server_port}", "--set", values]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    finally:
        server.shutdown()
        server.server_close()


def _pod(*values: str | Path) -> Manifest:
    found: Manifest = only(render(*values), "StatefulSet")["spec"]["template"]["spec"]
    return found


def test_users_and_groups_are_values() -> None:
    given = _pod("--set", "podSecurityContext.runAsUser=1,podSecurityContext.fsGroup=2")["securityContext"]
    assert (given["runAsUser"], given["runAsGroup"], given["fsGroup"]) == (1, 10001, 2)
    context = _pod("-f", CHART / "samples/openshift.yaml")["securityContext"]
    assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


@pytest.mark.parametrize(
    ("values", "image"),
    [
        ("image.repository=a/b", f"a/b:{__version__}"),
        ("image.registry=r.example.org:5000,image.repository=a/b,image.tag=t", "r.example.org:5000/a/b:t"),
        (f"image.digest=sha256:{'0' * 64}", f"kavier-twin@sha256:{'0' * 64}"),
        (f"image.tag=t,image.digest=sha256:{'0' * 64}", f"kavier-twin:t@sha256:{'0' * 64}"),
    ],
)
def test_the_image_has_a_registry_and_a_digest(values: str, image: str) -> None:
    assert _pod("--set", values)["containers"][0]["image"] == image


def test_where_checkpoints_lie() -> None:
    def claims(*values: str) -> list[Manifest]:
        found: list[Manifest] = only(render("--set", ",".join(values)), "StatefulSet")["spec"].get(
            "volumeClaimTemplates", []
        )
        return [claim["spec"] for claim in found]

    assert "storageClassName" not in claims("persistence.size=1Gi")[0]
    assert claims("persistence.storageClassName=-")[0]["storageClassName"] == ""
    assert claims("persistence.storageClassName=fast")[0]["storageClassName"] == "fast"
    assert claims("persistence.existingClaim=mine") == claims("persistence.enabled=false") == []
    volumes = {volume["name"]: volume for volume in _pod("--set", "persistence.existingClaim=mine")["volumes"]}
    assert volumes["state"]["persistentVolumeClaim"] == {"claimName": "mine"}


def test_a_name_that_looks_like_a_number_stays_text() -> None:
    assert _pod("--set-string", "priorityClassName=1000")["priorityClassName"] == "1000"


def test_a_new_version_of_the_chart_alone_does_not_restart_the_twin(tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    described = (chart / "Chart.yaml").read_text()
    version = yaml.safe_load(described)["version"]
    (chart / "Chart.yaml").write_text(described.replace(f"\nversion: {version}\n", "\nversion: 99.0.0\n"))
    command = [helm(), "template", "twin", chart, "--namespace", "llm", *ON_KUBERNETES]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    newer = [manifest for manifest in yaml.safe_load_all(text) if manifest]
    assert only(newer, "StatefulSet")["metadata"]["labels"]["helm.sh/chart"] == "kavier-twin-99.0.0"
    assert only(newer, "StatefulSet")["spec"] == only(render(), "StatefulSet")["spec"]


def test_the_log_of_the_test_is_kept() -> None:
    policy = only(render(), "Pod")["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
    assert policy == "before-hook-creation"  # `helm test --logs` reads the log afterwards


def test_the_network_policy_lets_the_test_in() -> None:
    manifests = render("-f", EVERYTHING)
    peers = only(manifests, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    labels = only(manifests, "Pod")["metadata"]["labels"]
    assert any(peer.get("podSelector", {}).get("matchLabels", {"": ""}).items() <= labels.items() for peer in peers)


def test_the_schema_knows_every_value() -> None:
    """And only those, at every depth that values.yaml shows."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(values: Manifest, known: Manifest, place: str) -> None:
        if known.get("additionalProperties", True) is not False:
            return
        listed = known["properties"].keys() - {"global"}
        assert values.keys() <= listed, place
        for name, value in values.items():
            if isinstance(value, dict) and "properties" in known["properties"][name]:
                compare(value, known["properties"][name], f"{place}.{name}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values.keys() == schema["properties"].keys() - {"global"}
    compare(values, schema, "values")


@pytest.mark.parametrize("path", sorted((CHART.parents[1] / "deploy/kubernetes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_tap_beside_vllm(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    check(manifest)
    (vllm, *rest) = manifest["spec"]["template"]["spec"]["containers"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    tap.add_parser(parser.add_subparsers())
    if rest:
        options = parser.parse_args(rest[0]["args"])
        ports = {port["name"]: port["containerPort"] for port in rest[0]["ports"]}
        assert ports == {"http": options.port, "tap-metrics": options.metrics_port}
        served = vllm["args"][vllm["args"].index("--port") + 1]
        assert options.upstream == f"http://127.0.0.1:{served}"
        return
    environment = {variable["name"]: variable.get("value") for variable in vllm["env"]}
    module, _, name = vllm["args"][vllm["args"].index("--middleware") + 1].rpartition(".")
    assert callable(getattr(import_module(module), name))
    options = parser.parse_args(["tap", *shlex.split(str(environment[import_module(module).OPTIONS]))])
    ports = {port["name"]: port["containerPort"] for port in vllm["ports"]}
    assert ports["tap-metrics"] == options.metrics_port


def test_autoscalers_ask_for_metrics_that_exist(tmp_path: Path) -> None:
    """The query of the two samples: on what a twin serves, Prometheus says how many replicas are wanted."""
    scaled = only(render("-f", CHART / "samples/keda.yaml"), "ScaledObject")
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    text = (CHART / "samples/hpa.yaml").read_text()
    assert "".join(query.split()) in "".join(text.replace("#", "").split())
    assert (
        only(render("-f", CHART / "samples/hpa.yaml"), "HorizontalPodAutoscaler")["spec"]["metrics"][0]["external"][
            "metric"
        ]["name"]
        in text.partition("extraObjects")[0]
    )
    known = {name_of(family): set(family._labelnames) | _labels_of(family) for family in families()}
    for name, labels in re.findall(r"(kavier_twin_\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)=", labels)) <= known[name]
    probability = 'kavier_twin_slo_first_breach_probability_ratio{pool="chat", in_force="1", trusted="%s", slo="a"}'
    replicas = 'kavier_twin_mirrored_replicas{pool="chat", state="ready"}'
    cases = [("1", "0.9", 4), ("1", "0.3", 3), ("1", "0.001", 2), ("0", "0.9", None)]
    tests = [
        {
            "interval": "1m",
            "input_series": [
                {"series": replicas, "values": "3x2"},
                {"series": probability % trusted, "values": f"{value}x2"},
            ],
            "promql_expr_test": [
                {
                    "expr": query,
                    "eval_time": "1m",
                    "exp_samples": [] if wanted is None else [{"labels": "{}", "value": wanted}],
                }
            ],
        }
        for trusted, value, wanted in cases
    ]
    path = tmp_path / "test.yaml"
    path.write_text(yaml.dump({"tests": tests}))
    done = subprocess.run([promtool(), "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _labels_of(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels}


def test_notes_tell_the_next_step(tmp_path: Path) -> None:
    # Helm shows notes only where a cluster answers; as the text of a manifest it renders them anywhere.
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    notes = textwrap.indent((chart / "templates/NOTES.txt").read_text(), "    ")
    manifest = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: notes}}\ndata:\n  text: |\n{notes}"
    (chart / "templates/notes.yaml").write_text(manifest)

    def told(*values: str | Path) -> str:
        command = [helm(), "template", "twin", chart, "--namespace", "llm", *ON_KUBERNETES]
        command += ["-s", "templates/notes.yaml", *values]
        return str(yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["data"])

    assert "--set serviceMonitor.enabled=true" in told()
    assert "--set prometheusRule.enabled=true" in told("--set", "serviceMonitor.enabled=true")
    assert "Overview" in told("-f", EVERYTHING)
    assert "grafanaUrl" in told("--set", "prometheusRule.enabled=true")
    assert "grafanaUrl" not in told("-f", EVERYTHING)
    assert "kubectl -n llm port-forward svc/twin-kavier-twin" in told()
    assert "loses its state" in told("--set", "persistence.enabled=false")
    assert "NO SETTINGS" in told()
    assert "NO SETTINGS" not in told("-f", CHART / "samples/llm-d.yaml")


def test_the_chart_is_of_this_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


def test_secrets_never_lie_in_values_or_manifests() -> None:
    assert "kind: Secret\n" not in render_text("-f", EVERYTHING)


def test_the_readme_is_made_of_the_values() -> None:
    assert (CHART / "README.md").read_text() == readme()
