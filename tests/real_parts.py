"""Real parts that some tests need: programs, libraries and data from outside the package.

A test that misses one skips on a developer's machine and fails in CI, where everything is meant to be there.
"""

from __future__ import annotations

import os
import shutil

import pytest


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


def _program(name: str, how: str) -> str:
    path = shutil.which(name)
    require(name, path is not None, how)
    assert path is not None
    return path
