"""Settings of sources that read a live fleet, from the file to a source that reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from connectors.kv_events.source import KvEventsSource
from connectors.prometheus.source import PrometheusSource
from connectors.secret import SecretPlace
from connectors.settings import HttpSource
from kavier_twin.daemon.config import Settings, read_settings
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.errors import UserError
from prometheus_server import Pages
from waiting import wait_until

PROMETHEUS = {"type": "prometheus", "url": "http://prometheus:9090"}


def read(tmp_path: Path, *sources: Any) -> Settings:
    path = tmp_path / "twin.yaml"
    path.write_text(yaml.safe_dump({"fleet": {"engine": {"num_gpu_blocks": 100}}, "sources": list(sources)}))
    return read_settings(path)


def problems(tmp_path: Path, *sources: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(tmp_path, *sources)
    return [line.partition("twin.yaml: ")[2] for line in str(caught.value).splitlines()[1:]]


def test_one_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWIN_PASSWORD", "open sesame")
    (tmp_path / "ca.pem").write_text("")
    (tmp_path / "token").write_text("abc")
    settings = read(
        tmp_path,
        {**PROMETHEUS, "bearer_token": {"file": "token"}, "engines": {"namespace": "chat"}, "gpus": None},
        {
            "type": "vllm_metrics",
            "engines": [{"url": "https://vllm-0:8000/metrics", "pod": "vllm-0"}],
            "user": "twin",
            "password": {"env": "TWIN_PASSWORD"},
        },
        {"type": "kv_events", "endpoint": "tcp://vllm-0:5557", "replay_endpoint": "tcp://vllm-0:5558"},
    )
    prometheus, vllm, kv = (source.open("chat", {}) for source in settings.sources)  # type: ignore[union-attr]
    assert isinstance(prometheus, PrometheusSource)
    assert isinstance(kv, KvEventsSource)
    assert [prometheus.name, vllm.name, kv.name] == [
        "prometheus:prometheus:9090",
        "vllm_metrics",
        "kv_events:vllm-0:5557",
    ]
    assert settings.sources[0].access().bearer_token.file == tmp_path / "token"  # type: ignore[union-attr]
    assert "open sesame" not in repr(settings)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({**PROMETHEUS, "url": "prometheus:9090"}, "sources.0.url: is 'prometheus:9090'; expected a URL like http://"),
        ({"type": "prometheus"}, "sources.0.url: missing; add it"),
        ({**PROMETHEUS, "intervall_seconds": 5}, "did you mean interval_seconds?"),
        ({**PROMETHEUS, "interval_seconds": 0}, "sources.0.interval_seconds: is 0"),
        ({**PROMETHEUS, "engines": {"a-b": "c"}}, "sources.0.engines: 'a-b' is not a label name"),
        ({**PROMETHEUS, "warm_up_seconds": 7200}, "sources.0: warm_up_seconds is more than max_backfill_seconds"),
        ({**PROMETHEUS, "user": "a"}, "sources.0: user and password belong together"),
        ({**PROMETHEUS, "ca_file": "gone.pem"}, "sources.0.ca_file: there is no file "),
        ({**PROMETHEUS, "bearer_token": {"env": "TWIN_UNSET"}}, "variable TWIN_UNSET is empty or not set; set it"),
        ({**PROMETHEUS, "bearer_token": {}}, "sources.0.bearer_token: give either env"),
        ({**PROMETHEUS, "headers": {"X Scope": "a"}}, "sources.0.headers: 'X Scope' is not a header name"),
        (
            {**PROMETHEUS, "headers": {"X-Scope-OrgID": "a\nb"}},
            "sources.0.headers: the value of X-Scope-OrgID is not valid in a header",
        ),
        (
            {**PROMETHEUS, "headers": {"X-Key": {"env": "TWIN_UNSET"}}},
            "sources.0.headers.X-Key: the environment variable",
        ),
        ({**PROMETHEUS, "headers": {"X-Key": {"file": "gone"}}}, "sources.0.headers.X-Key: "),
        (
            {**PROMETHEUS, "bearer_token": {"env": "HOME"}, "headers": {"Authorization": {"env": "HOME"}}},
            "Authorization follows from bearer_token",
        ),
        ({"type": "vllm_metrics", "engines": []}, "sources.0.engines: "),
        (
            {"type": "vllm_metrics", "engines": [{"url": "http://a/metrics", "prod": "x"}]},
            "sources.0.engines.0.prod: unknown setting; did you mean pod?",
        ),
        ({"type": "kv_events", "endpoint": "tcp://*:5557"}, "name the engine's host in place of *"),
        ({"type": "kv_events", "endpoint": "vllm:5557"}, "expected an address like tcp://"),
        ({"type": "promethus", "url": "x"}, "sources.0.type: is 'promethus'; did you mean prometheus?"),
        ({"url": "x"}, "sources.0.type: missing; add it, one of "),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, source: Any, expected: str) -> None:
    (found,) = problems(tmp_path, source)
    assert expected in found


@pytest.mark.parametrize(
    "wrong",
    [
        {"bearer_token": "hunter2"},
        {"user": "a", "password": "hunter2"},
        {"url": "http://a:hunter2@prometheus:9090"},
        {"headers": {"Authorization": "Bearer hunter2"}},
        {"headers": {"X-Api-Key": "hunter2"}},
    ],
)
def test_a_secret_written_into_the_settings_is_not_shown(tmp_path: Path, wrong: Any) -> None:
    (found,) = problems(tmp_path, {**PROMETHEUS, **wrong})
    assert "hunter2" not in found


def test_all_problems_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path, {**PROMETHEUS, "ca_file": "gone"}, {"type": "trace_file", "path": "gone", "follow": False}
    )
    assert len(found) == 2


def test_the_daemon_shows_what_an_engine_says_and_when_it_no_longer_does(tmp_path: Path) -> None:
    page = b'vllm:num_requests_running{engine="0",model_name="m"} 3\nvllm:num_requests_waiting{engine="0"} 2\n'
    status = [200]
    server = Pages(lambda *_: (status[0], "text/plain", page))
    settings = read(
        tmp_path,
        {"type": "vllm_metrics", "engines": [{"url": f"{server.url}/metrics"}], "interval_seconds": 0.05, "name": "v"},
    )
    daemon = Daemon.of(settings.model_copy(update={"http": settings.http.model_copy(update={"port": 0})}))
    daemon.start()
    try:
        wait_until(lambda: daemon.view.records.get("accepted", 0) >= 2)
        (source,) = daemon.view.sources
        assert (source.name, source.trouble, source.ended) == ("v", "", False)
        status[0] = 500
        wait_until(lambda: "http-500" in daemon.view.sources[0].trouble)
        assert daemon.view.sources[0].last_record_seconds > 0.0
        assert not daemon.failed
    finally:
        daemon.stop()
        server.close()


def test_headers_reach_the_source_secret_or_not(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    settings = read(tmp_path, {**PROMETHEUS, "headers": {"X-Scope-OrgID": 17, "X-Key": {"file": "key"}}})
    (source,) = settings.sources
    assert isinstance(source, HttpSource)
    headers = source.access().headers
    assert headers["X-Scope-OrgID"] == "17"  # YAML reads it as a number
    assert isinstance(headers["X-Key"], SecretPlace)
    assert headers["X-Key"].read() == "k"
