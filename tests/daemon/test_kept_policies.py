"""Policies set through the API outlive a restart, until the settings file names others."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from kavier_twin.daemon.config import read_settings
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.kept_policies import FILE_NAME

TODAY: dict[str, Any] = {"name": "as_it_is"}
SET: dict[str, Any] = {"policies": [TODAY, {"name": "tiny", "overrides": {"num_gpu_blocks": "0.5x"}}]}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("TWIN_TOKEN", "token")
    (tmp_path / "state").mkdir()
    (tmp_path / "requests.jsonl").touch()
    return {
        "pool": "chat",
        "fleet": {"engine": {"num_gpu_blocks": 100}},
        "sources": [{"type": "trace_file", "path": "requests.jsonl", "format": "telemetry"}],
        "forecast": {"policies": [TODAY]},
        "checkpoints": {"directory": "state"},
        "http": {"port": 0, "token": {"env": "TWIN_TOKEN"}},
    }


def policies(folder: Path, settings: dict[str, Any], put: Any = None, token: str = "token") -> dict[str, Any]:
    """What a daemon of these settings answers: asked, or told to forecast others."""
    (folder / "twin.yaml").write_text(yaml.safe_dump(settings))
    daemon = Daemon.of(read_settings(folder / "twin.yaml"))
    try:
        assert daemon.http is not None
        daemon.http.start()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if put is None else json.dumps(put).encode()
        request = urllib.request.Request(
            f"{daemon.http.url}/v1/policies", data, headers, method="PUT" if put else "GET"
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            [pool] = json.load(answer)["pools"]
    finally:
        daemon.stop()
    return {"names": [p["name"] for p in pool["policies"]], "configured": pool["configured"], "kept": pool["kept"]}


def test_a_restart_goes_on_with_them_until_the_settings_file_changes(tmp_path: Path, settings: dict[str, Any]) -> None:
    configured = {"names": ["as_it_is"], "configured": True, "kept": True}
    chosen = {"names": ["as_it_is", "tiny"], "configured": False, "kept": True}
    assert policies(tmp_path, settings) == configured
    assert policies(tmp_path, settings, SET) == chosen
    assert policies(tmp_path, settings) == chosen
    assert policies(tmp_path, {**settings, "stale_after_seconds": 77.0}) == chosen  # another setting
    other = {**settings, "forecast": {"policies": [{"name": "now"}]}}
    assert policies(tmp_path, other) == {**configured, "names": ["now"]}


def test_nothing_is_kept_without_the_token_or_without_checkpoints(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        policies(tmp_path, settings, SET, token="wrong")
    assert not (tmp_path / "state" / FILE_NAME).exists()
    del settings["checkpoints"]
    assert policies(tmp_path, settings, SET) == {"names": ["as_it_is", "tiny"], "configured": False, "kept": False}
    assert policies(tmp_path, settings)["names"] == ["as_it_is"]


@pytest.mark.parametrize("content", ["{", "[]", '{"chat": 3}', '{"chat": {"configured": [{"name": "as_it_is"}]}}'])
def test_a_damaged_file_is_told_and_passed_over(
    content: str, tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state" / FILE_NAME).write_text(content)
    assert policies(tmp_path, settings)["names"] == ["as_it_is"]
    assert FILE_NAME in caplog.text
    assert policies(tmp_path, settings, SET)["kept"]  # and written anew


def test_what_cannot_be_written_is_not_said_to_be_kept(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "state" / "policies.part").mkdir()
    assert policies(tmp_path, settings, SET) == {"names": ["as_it_is", "tiny"], "configured": False, "kept": False}
