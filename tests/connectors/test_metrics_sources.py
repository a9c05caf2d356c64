"""The two ways to read metrics, against servers that are slow, broken, closed or wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from connectors.background import Backoff
from connectors.prometheus.api import PrometheusApi
from connectors.prometheus.http import Access, FetchError, HttpClient
from connectors.prometheus.scrape import EngineTarget, VllmMetricsSource
from connectors.prometheus.source import PrometheusSource
from connectors.secret import SecretPlace
from kavier_twin.telemetry import EngineSample
from prometheus_server import Pages
from waiting import wait_until

Page = tuple[int, str, bytes]
METRICS = b"""vllm:num_requests_running{engine="0",model_name="m"} 3
vllm:cache_config_info{engine="0",block_size="16",num_gpu_blocks="400",enable_prefix_caching="True"} 1
process_start_time_seconds 1000
"""


@pytest.fixture
def serve() -> Iterator[Callable[..., Pages]]:
    made: list[Pages] = []

    def start(page: Callable[[str, Mapping[str, str]], Page]) -> Pages:
        made.append(Pages(page))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    sources: list[Any] = []
    yield sources
    for source in sources:
        source.close()


def text(body: bytes, status: int = 200) -> Page:
    return status, "text/plain", body


def answer(data: Any) -> Page:
    return 200, "application/json", json.dumps({"status": "success", "data": data}).encode()


# --- requests --------------------------------------------------------------------------------------------------------


def fetch(url: str, access: Access | None = None) -> bytes:
    return HttpClient(access or Access()).get(url)


def test_the_way_in(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(lambda _, headers: text(headers.get("authorization", headers.get("Authorization", "none")).encode()))
    monkeypatch.setenv("TWIN_TOKEN", "abc")
    token = tmp_path / "token"
    token.write_text("first\n")
    client = HttpClient(Access(bearer_token=SecretPlace(file=token)))
    assert client.get(server.url) == b"Bearer first"
    token.write_text("second\n")  # Kubernetes renews it
    assert client.get(server.url) == b"Bearer second"
    assert fetch(server.url, Access(bearer_token=SecretPlace(env="TWIN_TOKEN"))) == b"Bearer abc"
    assert fetch(server.url, Access(user="Aladdin", password=SecretPlace(file=token))) == b"Basic QWxhZGRpbjpzZWNvbmQ="
    assert fetch(server.url) == b"none"
    token.unlink()
    with pytest.raises(FetchError, match=r"^no-secret: .*token: cannot be read"):
        client.get(server.url)
    assert "abc" not in repr(Access(bearer_token=SecretPlace(env="TWIN_TOKEN")))


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (text(b"broken", 500), "http-500"),
        (text(b"no", 403), "http-403"),
        (text(b"", 302), "http-302"),  # a redirect is not followed: it could carry the token away
        (text(b"x" * 2_000), "too-large"),
    ],
)
def test_answers_that_are_none(serve: Any, page: Page, reason: str) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(serve(lambda *_: page).url, Access(max_bytes=1_000))
    assert caught.value.reason == reason


def test_an_answer_that_does_not_come_or_does_not_end() -> None:
    """A server that sends a byte now and then never lets a plain socket time out."""
    import socket
    from threading import Thread

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                    for _ in range(1000):
                        connection.sendall(b"x")
                        time.sleep(0.05)
                except OSError:
                    pass

        Thread(target=trickle, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(FetchError, match=r"^timeout: the answer did not end"):
            fetch(url, Access(timeout_seconds=0.3))
        with pytest.raises(FetchError, match=r"^timeout: no answer"):  # accepted by the system, never read
            fetch(url, Access(timeout_seconds=0.2))


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(FetchError, match=r"^unreachable: http://127\.0\.0\.1:1/x: "):
        fetch("http://127.0.0.1:1/x?token=abc")


# --- Prometheus ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"{}",
        b'{"status":"success"}',
        b'{"status":"success","data":5}',
        b'{"status":"success","data":{"resultType":"vector","result":5}}',
        b'{"status":"success","data":{"resultType":"matrix","result":[]}}',
        b'{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"x"]}]}}',
        b'{"status":"success","data":{"resultType":"vector","result":[{"value":[1,"1"]}]}}',
    ],
)
def test_answers_that_no_prometheus_gives(serve: Any, body: bytes) -> None:
    api = PrometheusApi(serve(lambda *_: text(body)).url, HttpClient(Access()), 1.0)
    with pytest.raises(FetchError, match="bad-answer"):
        api.instant("up")


def test_a_refused_query_says_why(serve: Any) -> None:
    body = b'{"status":"error","errorType":"execution","error":"too many samples"}'
    with pytest.raises(FetchError, match=r"query-refused: too many samples"):
        PrometheusApi(serve(lambda *_: text(body)).url, HttpClient(Access()), 1.0).now()


def test_prometheus_answering_500_and_then_again(serve: Any, closing: Any) -> None:
    failing = [True]

    def page(*_: object) -> Page:
        if failing[0]:
            return text(b"on fire", 500)
        return answer({"resultType": "scalar", "result": [2_000.0, "2000"]})

    source = PrometheusSource(serve(page).url, Access(), interval_seconds=0.05, clock=lambda: 1_970.0)
    closing.append(source)
    assert source.poll(5) == []
    wait_until(lambda: source.rejected().get("http-500", 0) >= 2)  # it tries again
    assert "on fire" in source.trouble
    failing[0] = False
    wait_until(lambda: source.rejected().get("bad-answer", 0) >= 1, 30.0)  # past the clock: no vector is scalar
    assert source.clock_skew_seconds == pytest.approx(30.0)


def test_every_scrape_once_whatever_the_windows(serve: Any, closing: Any) -> None:
    """Two targets; a scrape that is stored late, behind one that was read already, is not lost."""
    now = [1_000.0]
    stored = {"a": [990.0, 1_000.0], "b": [991.0]}

    def series(name: str, pod: str, value: int, times: list[float]) -> Any:
        labels = {"__name__": name, "engine": "0", "pod": pod, "namespace": "n", "job": "j", "instance": pod}
        return {"metric": labels, "values": [[at, str(value)] for at in times]}

    def page(path: str, headers: Mapping[str, str]) -> Page:
        query = headers["X-Query"]
        if "time()" in query:
            return answer({"resultType": "scalar", "result": [now[0], str(now[0])]})
        if "cache_config" in query:
            return answer({"resultType": "vector", "result": []})
        if "DCGM" in query:
            return answer({"resultType": "matrix", "result": []})
        found = [series("vllm:num_requests_running", pod, 1, times) for pod, times in stored.items()]
        return answer({"resultType": "matrix", "result": found})

    def made() -> PrometheusSource:
        source = PrometheusSource("http://unused", Access(), interval_seconds=0.02, warm_up_seconds=60.0)
        closing.append(source)
        source._http = _Direct(page)  # type: ignore[assignment]
        source._api._http = source._http
        return source

    source = made()
    found: list[EngineSample] = []

    def polled(count: int, at_once: int = 100) -> bool:
        found.extend(record for record in source.poll(at_once) if isinstance(record, EngineSample))
        return len(found) >= count

    wait_until(lambda: polled(3))
    assert [(sample.pod, sample.time_seconds) for sample in found] == [("a", 990), ("b", 991), ("a", 1_000)]
    now[0] = 1_010.0
    stored["b"].append(999.0)  # late
    stored["a"].append(1_010.0)
    wait_until(lambda: polled(5))
    time.sleep(0.1)
    assert polled(5)
    assert [(sample.pod, sample.time_seconds) for sample in found[3:]] == [("b", 999), ("a", 1_010)]
    assert source.trouble == ""
    # After a restart nothing comes again and nothing is lost, polled in part or not at all.
    now[0] = 1_020.0
    stored["a"].append(1_015.0)
    stored["b"].append(1_016.0)
    wait_until(lambda: polled(6, at_once=1))
    positions = json.loads(json.dumps(source.positions()))
    source.close()
    now[0] = 1_300.0
    stored["b"].append(1_280.0)
    source = made()
    source.seek(positions)
    wait_until(lambda: polled(8))
    time.sleep(0.1)
    assert polled(8)
    assert [(sample.pod, sample.time_seconds) for sample in found[5:]] == [("a", 1_015), ("b", 1_016), ("b", 1_280)]


class _Direct:
    """Answers without a network, told the query."""

    def __init__(self, page: Callable[[str, Mapping[str, str]], Page]) -> None:
        self._page = page

    def post(self, url: str, fields: Mapping[str, str]) -> bytes:
        return self._page(url, {"X-Query": fields["query"]})[2]

    def close(self) -> None:
        pass


# --- the engines' own pages ------------------------------------------------------------------------------------------


def test_scraping_engines_one_of_which_is_gone(serve: Any, closing: Any) -> None:
    asked: list[str] = []

    def page(path: str, _: object) -> Page:
        asked.append(path)
        if path == "/v1/models":
            return 200, "application/json", b'{"data": [{"id": "m", "max_model_len": 4096}]}'
        return text(METRICS) if path == "/metrics" else text(b"not found", 404)

    server = serve(page)
    source = VllmMetricsSource(
        [EngineTarget(f"{server.url}/metrics", "vllm-0"), EngineTarget("http://127.0.0.1:1/metrics")],
        Access(timeout_seconds=2.0),
        pool="chat",
        interval_seconds=0.02,
        configured={"num_gpu_blocks": 500, "max_model_len": 4096},
        clock=lambda: 5_000.0,
    )
    closing.append(source)
    found: list[Any] = []
    wait_until(lambda: found.extend(source.poll(10)) or len(found) >= 3)
    assert found[0] == EngineSample(
        time_seconds=5_000.0,
        pool="chat",
        pod="vllm-0",
        engine="0",
        model="m",
        requests_running=3,
        started_seconds=1_000.0,
    )
    wait_until(lambda: source.trouble.startswith("1 of 2 servers not scraped: 127.0.0.1:1: unreachable"))
    assert source.last_record_seconds == 5_000.0
    assert asked.count("/v1/models") == 1  # asked once for each process
    assert asked.count("/server_info?config_format=json") == 1
    (contradiction,) = source.configs.contradictions()
    assert contradiction.startswith("num_gpu_blocks is 400 (vllm-0, engine 0, vllm:cache_config_info) but 500")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html></html>", "bad-answer"),
        (b"\xff\xfe", "bad-answer"),
        (b'vllm:num_requests_running{engine="0" 3', "bad-answer"),
        (b"up 1\n", "no-engine"),
        (b"", "no-engine"),
    ],
)
def test_pages_that_are_no_engines(serve: Any, closing: Any, body: bytes, reason: str) -> None:
    source = VllmMetricsSource([EngineTarget(f"{serve(lambda *_: text(body)).url}/metrics", "p")], Access())
    closing.append(source)
    assert source.poll(1) == []
    wait_until(lambda: source.rejected().get(reason))
    assert source.trouble.startswith(f"1 of 1 servers not scraped: p: {reason}")


def test_a_twin_that_does_not_poll_slows_the_scraping_down(serve: Any, closing: Any) -> None:
    source = VllmMetricsSource(
        [EngineTarget(f"{serve(lambda *_: text(METRICS)).url}/metrics", "p")], Access(), interval_seconds=0.001
    )
    closing.append(source)
    source._max_buffered = 5
    source.poll(0)
    wait_until(lambda: len(source._buffer) == 5)
    time.sleep(0.1)
    assert len(source._buffer) == 5
    assert len(source.poll(100)) == 5
    wait_until(lambda: source.poll(100))  # it goes on
    source.poll(0)
    wait_until(lambda: len(source._buffer) == 5)
    source.close()  # while its thread waits for room
    assert not source._thread.is_alive()
    assert source.poll(10) == []


def test_backing_off_doubles_up_to_a_limit_and_begins_anew() -> None:
    backoff = Backoff(1.0, 60.0)
    waits = [backoff.next() for _ in range(200)]
    assert all(0.5 * min(2.0**n, 60.0) <= wait <= min(2.0**n, 60.0) for n, wait in enumerate(waits))
    backoff.reset()
    assert backoff.next() <= 1.0
