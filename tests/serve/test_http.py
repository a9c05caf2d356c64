from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator

import pytest

from kavier_twin.serve.http import AddressError, HttpServer
from kavier_twin.serve.view import TwinView
from serve.views import empty_view, full_view


class Served:
    """A server whose view the test sets."""

    def __init__(self) -> None:
        self.view: TwinView = full_view()
        self.server = HttpServer(lambda: {"chat": self.view}, "127.0.0.1", 0)
        self.server.start()

    def ask(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    yield found
    found.server.close()


def test_metrics_in_the_format_asked_for(served: Served) -> None:
    status, headers, body = served.ask("GET", "/metrics")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
    assert b"kavier_twin_calibrated" in body
    status, headers, body = served.ask("GET", "/metrics?x=1", Accept="application/openmetrics-text; version=1.0.0")
    assert (status, headers["content-type"].split(";")[0]) == (200, "application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_page_needs_nothing_from_elsewhere(served: Served) -> None:
    status, headers, body = served.ask("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    text = body.decode()
    assert "//" not in text.replace("http://www.w3.org/2000/svg", "")  # no other address
    assert "innerHTML" not in text  # names from outside are never markup


def test_status_is_the_view_as_json(served: Served) -> None:
    status, headers, body = served.ask("GET", "/status.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    found = json.loads(body)["pools"]["chat"]
    assert found["beside"][0]["observed"] == 0.1
    assert found["beside"][3]["error"] is None
    assert found["outlook"]["policies"][0]["horizons"][0]["predicted"][0]["quantiles"] == {
        "0.1": 0.5,
        "0.5": 0.75,
        "0.9": 1.0,
    }


def test_health_and_readiness(served: Served) -> None:
    assert served.ask("GET", "/healthz")[0] == 200
    assert served.ask("GET", "/readyz")[0] == 200
    served.view = empty_view()
    assert served.ask("GET", "/healthz")[0] == 200
    status, _, body = served.ask("GET", "/readyz")
    assert status == 503
    assert body.decode().splitlines() == [
        "not ready: pool chat: no telemetry record has been processed yet",
        "not ready: pool chat: no forecast has been made yet",
    ]


@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/healthz", "/readyz", "/nothing"])
def test_head_is_get_without_the_body(served: Served, path: str) -> None:
    status, headers, body = served.ask("GET", path)
    head_status, head_headers, head_body = served.ask("HEAD", path)
    assert (head_status, head_body) == (status, b"")
    assert head_headers["content-type"] == headers["content-type"]
    if path != "/metrics":  # the process's own figures change
        assert int(head_headers["content-length"]) == len(body)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_refused(served: Served, method: str) -> None:
    status, headers, _ = served.ask(method, "/metrics")
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/kavier_twin", "/../page.html", "/page.html", "/metrics/"])
def test_nothing_else_is_there(served: Served, path: str) -> None:
    assert served.ask("GET", path)[0] == 404


def test_a_client_that_hangs_blocks_nobody(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port)) as hanging:
        hanging.sendall(b"GET /metrics HTT")
        assert served.ask("GET", "/healthz")[0] == 200


def test_a_client_that_is_gone_harms_nothing(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port)) as gone:
        gone.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert served.ask("GET", "/healthz")[0] == 200


def test_a_view_that_fails_is_told_without_its_inside(served: Served) -> None:
    def fail() -> dict[str, TwinView]:
        raise RuntimeError("secret")

    served.server._current = fail
    status, _, body = served.ask("GET", "/status.json")
    assert status == 500
    assert b"secret" not in body


def test_a_port_in_use_is_named(served: Served) -> None:
    with pytest.raises(AddressError, match=rf"127\.0\.0\.1:{served.server.port}"):
        HttpServer(lambda: {}, "127.0.0.1", served.server.port)


def test_an_address_that_is_not_here() -> None:
    with pytest.raises(AddressError, match=r"no\.such\.host\.invalid:0"):
        HttpServer(lambda: {}, "no.such.host.invalid", 0)
    with pytest.raises(AddressError):
        HttpServer(lambda: {}, "192.0.2.1", 0)


def test_close_frees_the_port_and_may_come_twice() -> None:
    server = HttpServer(lambda: {}, "127.0.0.1", 0)
    server.start()
    server.close()
    server.close()
    HttpServer(lambda: {}, "127.0.0.1", server.port).close()
