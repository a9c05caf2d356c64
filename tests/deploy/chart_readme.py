"""The chart's README, whose table of values is made from values.yaml and its comments.

PYTHONPATH=tests python -m deploy.chart_readme > helm/kavier-twin/README.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import yaml

from deploy.helm_chart import CHART

_HEAD = """# Kavier Twin

{description}. This page is generated: see `tests/deploy/chart_readme.py`; a test keeps it up to date.

[Operations](../../docs/operations.md) describes the image, the settings and what an operator meets. Kubernetes
{kubernetes}.

## Samples
| file | shows |
|---|---|
{samples}
## Values
| value | default | meaning |
|---|---|---|
{values}
## Upgrading
Kubernetes forbids changes of some fields of a StatefulSet. The chart refuses such an upgrade with one sentence
before anything is changed. This command makes way for it: it deletes the StatefulSet alone, the pod and its
volume stay, and the next upgrade takes them over.

```sh
kubectl -n NAMESPACE delete statefulset NAME --cascade=orphan
```

### To 0.2.0
- `podManagementPolicy` is now `Parallel`: run the command above once, then `helm upgrade`. With the policy
  before, an upgrade or a rollback did not reach a pod that was not ready.
- The pod is ready without traffic; `helm install --wait` and `--atomic` end on an idle fleet.
- `ray.address` without a pool whose `forecast.executor` is ray, `serviceAccount.annotations` without an account
  of the chart's, and labels that the chart sets itself are refused. They were ignored, or broke the selector.
- Settings that name a file below `/run/secrets`, or an environment variable that holds a secret, are refused if
  the pod would not have it.

## Changing persistence
Most storage classes let a claim grow. The state stays:

```sh
kubectl -n NAMESPACE patch pvc state-NAME-0 -p '{{"spec": {{"resources": {{"requests": {{"storage": "5Gi"}}}}}}}}'
kubectl -n NAMESPACE delete statefulset NAME --cascade=orphan
helm -n NAMESPACE upgrade RELEASE helm/kavier-twin --reuse-values --set persistence.size=5Gi
```

For another class, delete the claim as well. The state is lost:

```sh
kubectl -n NAMESPACE delete statefulset NAME
kubectl -n NAMESPACE delete pvc state-NAME-0
helm -n NAMESPACE upgrade RELEASE helm/kavier-twin --reuse-values --set persistence.storageClassName=fast
```

To turn `persistence.enabled` on or off, or to begin to use `persistence.existingClaim`, delete the StatefulSet
as above and upgrade. A claim that is not used any more stays until you delete it.
"""


def readme() -> str:
    """The page."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    rows = (f"| `{name}` | `{default}` | {meaning} |\n" for name, default, meaning in _values())
    return _HEAD.format(
        description=chart["description"],
        kubernetes=chart["kubeVersion"].removeprefix(">=").removesuffix("-0") + " or later",
        samples="".join(_samples()),
        values="".join(rows),
    )


def _samples() -> Iterator[str]:
    for path in sorted((CHART / "samples").glob("*.yaml")):
        words = []
        for line in path.read_text().splitlines():
            if not line.startswith("# "):
                break
            words.append(line.removeprefix("# ").strip())
        first = " ".join(words).partition(". ")[0].removesuffix(".").partition(", each started")[0]
        yield f"| [{path.name}](samples/{path.name}) | {first} |\n"


def _values() -> Iterator[tuple[str, str, str]]:
    """Each value of values.yaml that stands on a line of its own, with its default and the words of its comments."""
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    above: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        if not bare:
            above = []
        elif bare.startswith("#"):
            above.append(bare.removeprefix("#").strip())
        else:
            path = [*path[: (len(line) - len(line.lstrip())) // 2], bare.partition(":")[0]]
            value = values
            for part in path:
                value = value[part]
            given, _, comment = bare.partition(" # ")
            meaning = " ".join([*above, comment.strip()]).strip().replace("|", "\\|")
            above = []
            if not given.strip().endswith(":"):
                yield ".".join(path), json.dumps(value), meaning
            elif meaning:  # of the values beneath it
                yield f"{'.'.join(path)}.*", "", meaning


if __name__ == "__main__":
    print(readme(), end="")
