"""Once a twin is ready it compiles nothing that it waits for."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from numba.core import event

from connectors.secret import SecretPlace
from daemon.test_daemon import FLEET, FORECAST, MIRROR, events, get, metric, recorded, until
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.http_settings import HttpConfig
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.daemon.warm_up import make_ready
from kavier_twin.simulation.compiler import libraries
from kavier_twin.simulation.fleet import Fleet, Live
from kavier_twin.simulation.kernels import POLICIES, TIERS
from kavier_twin.telemetry import EngineSample, RequestFinished, TelemetryRecord
from memory_source import MemorySource

TWO_REPLICAS = FLEET.model_copy(update={"replicas": 2, "router": "prefix_aware"})
RESTART_SECONDS = 40.0
CHANGES: list[dict[str, Any]] = [
    {"replicas": 3},
    {"num_gpu_blocks": "0.5x"},
    {"block_size": 16},
    {"prefix_caching": False},
    {"router": "session_affinity"},
]


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Neither by numba, whoever asks it to, nor a library of ours."""
    before = libraries.compiled()
    with event.install_recorder("numba:compile") as by_numba, event.install_recorder("kavier_twin:compile") as ours:
        yield
    assert [str(what.data["dispatcher"]) for _, what in by_numba.buffer] == []
    assert [what.data["library"] for _, what in ours.buffer] == []
    assert libraries.compiled() == before


def stream() -> list[TelemetryRecord]:
    """Two pods, one of which restarts; some ends are never told, and some requests end late or are held."""
    records = [record.model_copy(update={"pod": f"vllm-{number % 2}"}) for number, record in enumerate(recorded(200))]
    told = events(records)
    kept = [
        record for number, record in enumerate(told) if not (isinstance(record, RequestFinished) and number % 17 == 0)
    ]
    start = kept[0].time_seconds
    for second in range(0, int(kept[-1].time_seconds - start), 5):
        for pod in ("vllm-0", "vllm-1"):
            began = start + RESTART_SECONDS if pod == "vllm-1" and second >= RESTART_SECONDS else start
            sample = EngineSample(
                time_seconds=start + second, pod=pod, started_seconds=began, requests_running=1, requests_waiting=0
            )
            kept.append(sample)
    return sorted(kept, key=lambda record: record.time_seconds)


@contextmanager
def twin(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setenv("TWIN_TOKEN", "token")
    mirror = MIRROR.__class__(pool="chat", ordering_seconds=0.5, calibrate_after_requests=40, give_up_seconds=50.0)
    http = HttpConfig(port=0, token=SecretPlace(env="TWIN_TOKEN"))
    daemon = Daemon([PoolTwin(TWO_REPLICAS, mirror, FORECAST)], [Feed(source)], http=http, prepare=make_ready)
    daemon.start()
    try:
        yield daemon
    finally:
        assert daemon.stop()


def ask(daemon: Daemon, path: str, body: Any, method: str = "POST") -> Any:
    assert daemon.http is not None
    headers = {"Authorization": "Bearer token", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{daemon.http.url}{path}", json.dumps(body).encode(), headers, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_a_twin_that_is_ready_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemorySource()
    restarted: list[int] = []
    begin_anew = Fleet.begin_anew

    def counted(fleet: Fleet, number: int, again: Collection[int]) -> list[Live]:
        restarted.append(number)
        return begin_anew(fleet, number, again)

    monkeypatch.setattr(Fleet, "begin_anew", counted)
    with twin(source, monkeypatch) as daemon:
        until(lambda: not daemon.preparing, "the kernels")
        with nothing_compiled():
            for record in stream():
                source.push(record)
            until(lambda: daemon.view.finished_requests > 150, "most requests followed")
            until(lambda: daemon.view.outlook and daemon.view.outlook.calibrated, "a forecast from calibrated figures")
            for overrides in CHANGES:
                question = {"overrides": overrides, "load": 2.0, "horizon_seconds": 10.0}
                assert ask(daemon, "/v1/whatif", question)["cases"]
            policies = [{"name": "now"}, {"name": "sorted", "overrides": {"scheduling_policy": "priority"}}]
            ask(daemon, "/v1/policies", {"policies": policies}, "PUT")
            until(lambda: "sorted" in {policy.name for policy in daemon.view.outlook.policies}, "another policy")
            assert get(f"{daemon.http.url}/v1/state/chat/replicas/1")[0] == 200
        assert restarted == [1]
        assert daemon.pools["chat"].mirror.ingested["never_finished"] > 0


def test_what_a_question_needs_is_compiled_beside_the_running_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    libraries.load(POLICIES, TIERS)
    kept = libraries.cached_file(POLICIES)
    began, go_on = Event(), Event()

    def child(library: libraries.Library, file: Path) -> subprocess.Popen[bytes]:
        """Takes as long as it likes."""
        began.set()
        assert go_on.wait(120.0)
        shutil.copy(kept, file)
        return subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)

    source = MemorySource()
    told = events(recorded(100))
    with twin(source, monkeypatch) as daemon:
        assert daemon.http is not None
        for record in told[:100]:
            source.push(record)
        until(lambda: daemon.view.outlook and daemon.view.outlook.calibrated, "a forecast from calibrated figures")
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(libraries, "_child", child)
        monkeypatch.setattr(POLICIES, "is_loaded", False)
        for kernel in POLICIES.entries:
            kernel._reset_overloads()
        answers: list[Any] = []
        question = {"overrides": {"eviction": "lfu"}, "horizon_seconds": 10.0}
        asker = Thread(target=lambda: answers.append(ask(daemon, "/v1/whatif", question)))
        asker.start()
        try:
            assert began.wait(60.0)
            cycles = daemon.view.forecasts["succeeded"]
            for record in told[100:]:
                source.push(record)
            source.end()
            until(lambda: daemon.view.finished_requests == 100, "the stream followed meanwhile")
            until(lambda: daemon.view.forecasts["succeeded"] > cycles, "forecasts made meanwhile")
            text = get(f"{daemon.http.url}/metrics")[1]
            assert metric(text, "kavier_twin_compiling_kernel_libraries") == 1.0
            before = metric(text, "kavier_twin_kernel_libraries_compiled_total")
            assert before is not None
            assert not answers
        finally:
            go_on.set()
        asker.join(60.0)
        assert len(answers) == 1
        page = until(
            lambda: (
                (text := get(f"{daemon.http.url}/metrics")[1])
                and metric(text, "kavier_twin_compiling_kernel_libraries") == 0.0
                and text
            ),
            "no compiling shown",
        )
        assert metric(page, "kavier_twin_kernel_libraries_compiled_total") == before + 1.0
    assert "compiling kernels: policies" in caplog.text
    assert "kernels compiled: policies, in" in caplog.text
