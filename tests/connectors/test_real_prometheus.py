"""Against a real Prometheus server: what it stores of a recorded engine, and what follows about the workload."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from connectors.prometheus.http import Access
from connectors.prometheus.source import PrometheusSource, Selection
from connectors.secret import SecretPlace
from connectors.traces import read_trace
from connectors.traces.recording import read_metrics
from kavier_twin.mirror.phantoms import finished_requests
from kavier_twin.telemetry import EngineSample, GpuSample, RequestRecord, TelemetryRecord
from prometheus_server import Pages, RealPrometheus, openmetrics
from real_parts import openssl
from waiting import wait_until

pytestmark = pytest.mark.real

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"
STARTED = json.loads((RECORDING / "meta.json").read_text())["started_unix"]
LABELS = {"job": "vllm", "instance": "10.0.0.1:8000", "namespace": "chat", "pod": "vllm-0"}
RATE_TOLERANCE = 0.02
LENGTH_TOLERANCE = 0.05
HIT_RATIO_TOLERANCE = 0.01


@pytest.fixture(scope="module")
def scrapes() -> list[tuple[float, str]]:
    return read_metrics(RECORDING)


@pytest.fixture(scope="module")
def requests() -> list[RequestRecord]:
    """What really happened, by the client's account."""
    return list(read_trace(RECORDING).records)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, scrapes: list[tuple[float, str]]) -> Iterator[RealPrometheus]:
    """The recording, and two GPUs of which one is the engine's, in a server that was there all the time."""
    gpus = [
        (at, f'DCGM_FI_DEV_GPU_UTIL{{gpu="{gpu}",UUID="GPU-{gpu}",exported_namespace="chat",exported_pod="{pod}"}} 40')
        for at, _ in scrapes
        for gpu, pod in ((0, "vllm-0"), (1, "trainer"))
    ]
    server = RealPrometheus(tmp_path_factory.mktemp("prometheus"))
    exporter = {"job": "dcgm", "instance": "10.0.0.2:9400", "namespace": "gpu-operator", "pod": "dcgm-exporter-x"}
    page = openmetrics(scrapes, LABELS).removesuffix("# EOF\n") + openmetrics(gpus, exporter)
    server.backfill(page)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def reading() -> Iterator[list[PrometheusSource]]:
    """Sources to be closed at the end."""
    sources: list[PrometheusSource] = []
    yield sources
    for source in sources:
        source.close()


def collect(source: PrometheusSource, until_seconds: float, seconds: float = 60.0) -> list[TelemetryRecord]:
    """Records up to an event time."""
    records: list[TelemetryRecord] = []
    deadline = time.monotonic() + seconds
    while (source.last_record_seconds or -math.inf) < until_seconds:
        assert time.monotonic() < deadline, f"{len(records)} records in time; {source.trouble or 'no trouble'}"
        records += source.poll(1_000)
        time.sleep(0.02)
    return records


def engines(records: Sequence[TelemetryRecord]) -> list[EngineSample]:
    return [record for record in records if isinstance(record, EngineSample)]


def check(
    first: EngineSample, last: EngineSample, requests: Sequence[RequestRecord], start: float = 0.0, speed: float = 1.0
) -> None:
    """What an engine counted between two samples, beside the requests; the recording began at the samples' `start`."""
    begin, end = ((at - start) * speed for at in (first.time_seconds, last.time_seconds))
    came = [request for request in requests if begin <= request.time_seconds < end]
    left = [request for request in requests if begin <= request.time_seconds + (request.e2e_seconds or 0.0) < end]
    assert requests_in(last) - requests_in(first) == pytest.approx(len(came), rel=RATE_TOLERANCE)
    outputs = counted(last, "request_generation_tokens") - counted(first, "request_generation_tokens")
    assert outputs == pytest.approx(sum(request.output_tokens for request in left), rel=LENGTH_TOLERANCE)
    queries, hits = (
        (getattr(last, name) or 0.0) - (getattr(first, name) or 0.0)
        for name in ("prefix_cache_queries_tokens", "prefix_cache_hits_tokens")
    )
    prompt_tokens = sum(request.prompt_tokens for request in came)
    assert queries == pytest.approx(prompt_tokens, rel=LENGTH_TOLERANCE)
    hit_ratio = sum(request.cached_tokens or 0 for request in came) / prompt_tokens
    assert hits / queries == pytest.approx(hit_ratio, abs=HIT_RATIO_TOLERANCE)


def requests_in(sample: EngineSample) -> float:
    """Requests that ever came: those that left and those that are there."""
    return (finished_requests(sample) or 0.0) + (sample.requests_running or 0.0) + (sample.requests_waiting or 0.0)


def counted(sample: EngineSample, name: str) -> float:
    histogram = getattr(sample, name)
    return histogram.sum if histogram else 0.0


def test_the_workload_behind_stored_scrapes(
    stored: RealPrometheus, scrapes: list[tuple[float, str]], requests: list[RequestRecord], reading: Any
) -> None:
    """Every scrape comes once with its own time, and the workload follows: whole, in halves and in thirds."""
    source = PrometheusSource(
        stored.url,
        Access(),
        pool="chat",
        selection=Selection({"namespace": "chat"}),
        warm_up_seconds=time.time() - scrapes[0][0] + 60.0,
        max_backfill_seconds=1e9,
    )
    reading.append(source)
    records = collect(source, scrapes[-1][0] - 0.001)
    samples = engines(records)
    assert [sample.time_seconds for sample in samples] == pytest.approx([at for at, _ in scrapes], abs=1e-3)
    assert {(sample.namespace, sample.pod, sample.engine, sample.model) for sample in samples} == {
        ("chat", "vllm-0", "0", "tiny")
    }
    gpus = [record for record in records if isinstance(record, GpuSample)]
    assert {(gpu.gpu, gpu.pod, gpu.utilization_ratio) for gpu in gpus} == {("GPU-0", "vllm-0", 0.4)}
    assert len(gpus) == len(scrapes)
    assert source.rejected() == {}
    for parts in (1, 2, 3):
        edges = [samples[(len(samples) - 1) * part // parts] for part in range(parts + 1)]
        for first, last in pairwise(edges):
            check(first, last, requests, STARTED)


def test_a_live_server_that_scrapes(
    tmp_path: Path, scrapes: list[tuple[float, str]], requests: list[RequestRecord], reading: Any
) -> None:
    """Prometheus scrapes an exporter that plays the recording 30 times as fast, and goes away in between."""
    speed = 30.0
    began: list[float] = []

    def page(_: str, __: object) -> tuple[int, str, bytes]:
        at = (time.time() - began[0]) * speed + scrapes[0][0] if began else scrapes[0][0]
        text = next((text for scraped, text in reversed(scrapes) if scraped <= at), scrapes[0][1])
        return 200, "text/plain; version=0.0.4", text.encode()

    exporter = Pages(page)
    server = RealPrometheus(
        tmp_path,
        [
            {
                "job_name": "vllm",
                "scrape_interval": "100ms",
                "scrape_timeout": "100ms",
                "static_configs": [{"targets": [exporter.address], "labels": {"pod": "vllm-0"}}],
            }
        ],
    )
    source = PrometheusSource(server.url, Access(timeout_seconds=1.0), interval_seconds=0.2)
    reading.append(source)
    try:
        assert source.poll(10) == []
        wait_until(lambda: "unreachable" in source.trouble)
        server.start()
        wait_until(lambda: source.poll(100))
        assert source.trouble == ""
        began.append(time.time())
        middle = began[0] + 100.0 / speed
        samples = engines(collect(source, middle))
        server.suspend()
        wait_until(lambda: "timeout" in source.trouble)
        server.resume()
        last = (
            f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="tiny"}} {len(requests) + 1}'
        )
        assert last in scrapes[-1][1]  # the recording's warm-up is one more
        deadline = time.monotonic() + 60.0
        while not samples or samples[-1].requests_finished_by_reason["length"] <= len(requests):
            assert time.monotonic() < deadline
            samples += engines(source.poll(1_000))
            time.sleep(0.05)
        assert source.trouble == ""
        assert {sample.pod for sample in samples} == {"vllm-0"}
        assert len({sample.time_seconds for sample in samples}) == len(samples)
        # From rest to rest: a scrape that a busy machine makes late would be seconds of the recording at this speed.
        start = began[0] + (STARTED - scrapes[0][0]) / speed
        check(samples[0], samples[-1], requests, start, speed)
        assert source.configs.discovered().num_gpu_blocks == 400
    finally:
        server.stop()
        exporter.close()


def test_behind_tls_and_a_password(tmp_path: Path, scrapes: list[tuple[float, str]], reading: Any) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-keyout", str(key), "-out", str(certificate), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([openssl(), "req", *options.split(), *files], check=True, capture_output=True)
    hashed = "$2b$04$oZWEBapsHYAoqjelTh3hleVU60TxnYnZKWX2RIYFs8K3U/35FEeD."  # bcrypt of "open sesame"
    server = RealPrometheus(
        tmp_path,
        web={
            "tls_server_config": {"cert_file": str(certificate), "key_file": str(key)},
            "basic_auth_users": {"twin": hashed},
        },
    )
    server.backfill(openmetrics(scrapes[:3], LABELS))
    server.start()
    url = server.url.replace("http:", "https:")
    (tmp_path / "password").write_text("open sesame\n")
    (tmp_path / "wrong").write_text("open barley")
    right, wrong = SecretPlace(file=tmp_path / "password"), SecretPlace(file=tmp_path / "wrong")
    past = time.time() - scrapes[0][0] + 60.0

    def source(access: Access) -> PrometheusSource:
        reading.append(PrometheusSource(url, access, warm_up_seconds=past, max_backfill_seconds=1e9))
        reading[-1].poll(0)
        return reading[-1]  # type: ignore[no-any-return]

    try:
        stranger = source(Access(user="twin", password=right))
        wait_until(lambda: stranger.trouble.startswith("tls: "))
        intruder = source(Access(user="twin", password=wrong, ca_file=certificate))
        wait_until(lambda: intruder.trouble.startswith("http-401: "))
        assert "barley" not in intruder.trouble
        friend = source(Access(user="twin", password=right, ca_file=certificate))
        assert len(collect(friend, scrapes[2][0] - 0.001)) == 3
        assert friend.trouble == ""
    finally:
        server.stop()
