"""`kavier-twin doctor`: each wrong setup is named, on a real Prometheus where one is asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from connectors.prometheus.api import PrometheusApi
from connectors.prometheus.http import Access, FetchError, HttpClient
from connectors.prometheus.names import running_selector
from fake_engines import OF_2024, engine_page, serve_page
from kavier_twin.commands.main import main
from prometheus_server import Pages, RealPrometheus
from waiting import wait_until


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "600")


@pytest.fixture
def pages() -> Iterator[dict[str, Pages]]:
    found = {
        "a": serve_page(engine_page({"model_name": "a"})),
        "b": serve_page(engine_page({"model_name": "a"})),
        "old": serve_page(engine_page({"model_name": "old"}, histograms=OF_2024, finished=False)),
    }
    yield found
    for page in found.values():
        page.close()


def settings(tmp_path: Path, source: dict[str, Any], **others: Any) -> Path:
    content = {
        "pool": "chat",
        "fleet": {"replicas": 2, "engine": {"num_gpu_blocks": 1000}},
        "sources": [source],
        **others,
    }
    path = tmp_path / "twin.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def examined(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = main(["doctor", "--config", str(path), "--seconds", "8s", *options])
    return status, capsys.readouterr().out


def serving(directory: Path, targets: list[str], **labels: str) -> RealPrometheus:
    scraped = {"job_name": "vllm", "scrape_interval": "1s", "static_configs": [{"targets": targets, "labels": labels}]}
    found = RealPrometheus(directory, [scraped])
    found.start()
    api = PrometheusApi(found.url, HttpClient(Access()), 5.0)

    def both_are_stored() -> bool:
        try:
            return len({series.labels["instance"] for series in api.instant(running_selector())}) == len(targets)
        except FetchError:
            return False

    wait_until(both_are_stored, 60.0)
    return found


@pytest.mark.real
def test_a_prometheus_and_what_may_be_wrong_with_it(
    tmp_path: Path, pages: dict[str, Pages], capsys: pytest.CaptureFixture[str]
) -> None:
    addresses = [pages[name].url.removeprefix("http://").partition("/")[0] for name in ("a", "b")]
    server = serving(tmp_path, addresses, exported_instance="inner:9090")
    source = {"type": "prometheus", "url": server.url, "engines": {"job": "vllm"}, "gpus": None, "interval_seconds": 1}
    try:
        path = settings(tmp_path, source)
        status, said = examined(path, capsys)
        assert status == 0, said
        assert "2 engines" in said
        assert "exported_instance" in said
        assert "honor_labels" in said
        assert examined(path, capsys, "--strict")[0] == 1
        path = settings(tmp_path, {**source, "engines": {"job": "wllm"}})
        status, said = examined(path, capsys)
        assert status == 1
        assert 'no series of vLLM has job="wllm"' in said
        assert "job vllm" in said
        path = settings(tmp_path, {**source, "gpus": {}})
        assert "no GPU series" in examined(path, capsys)[1]
        path = settings(tmp_path, source, fleet={"replicas": 3, "engine": {"num_gpu_blocks": 1000}})
        assert "2 engines are found and fleet.replicas is 3" in examined(path, capsys)[1]
    finally:
        server.stop()
    status, said = examined(settings(tmp_path, source), capsys)
    assert status == 1
    assert "error" in said
    assert server.address in said


def test_engines_and_what_they_lack(
    tmp_path: Path, pages: dict[str, Pages], capsys: pytest.CaptureFixture[str]
) -> None:
    def source(*names: str) -> dict[str, Any]:
        engines = [{"url": f"{pages[name].url.rstrip('/')}/metrics", "pod": name} for name in names]
        return {"type": "vllm_metrics", "engines": engines, "interval_seconds": 1}

    status, said = examined(settings(tmp_path, source("a", "b")), capsys)
    assert status == 0, said
    assert "2 engines: a/0, b/0" in said
    status, said = examined(settings(tmp_path, source("old", "a")), capsys)
    assert "old" in said
    assert "vllm:request_prompt_tokens" in said
    absent = {"type": "vllm_metrics", "engines": [{"url": "http://127.0.0.1:9/metrics"}], "interval_seconds": 1}
    status, said = examined(settings(tmp_path, absent), capsys)
    assert status == 1
    assert "127.0.0.1:9" in said


def test_a_token_that_is_wrong_or_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b"no org id")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = {"type": "prometheus", "url": f"http://127.0.0.1:{server.server_port}", "gpus": None}
    try:
        status, said = examined(settings(tmp_path, source), capsys)
    finally:
        server.shutdown()
        server.server_close()
    assert status == 1
    assert "http-401" in said
    assert "no org id" in said
    path = settings(tmp_path, {**source, "bearer_token": {"env": "A_TOKEN_THAT_NOBODY_SET"}})
    assert main(["doctor", "--config", str(path)]) == 1
    assert "A_TOKEN_THAT_NOBODY_SET is empty or not set; set it" in capsys.readouterr().err


def test_a_stream_without_requests_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = settings(tmp_path, {"type": "trace_file", "path": "requests.jsonl"})
    assert main(["doctor", "--config", str(path), "--seconds", "1s"]) == 0
    assert "does not exist yet" in capsys.readouterr().out
    (tmp_path / "requests.jsonl").touch()
    assert main(["doctor", "--config", str(path), "--seconds", "1s"]) == 0
    assert "no new record within 1 s" in capsys.readouterr().out
    (tmp_path / "requests.jsonl").write_text('{"kind": "riddle", "time_seconds": 1}\n')
    assert main(["doctor", "--config", str(path), "--seconds", "1s"]) == 0
    assert "rejected input: unknown-kind 1" in capsys.readouterr().out
