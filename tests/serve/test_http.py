from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from threading import Barrier, Event, Thread

import pytest

from kavier_twin.forecast.whatif import Busy, NothingYet
from kavier_twin.serve import http
from kavier_twin.serve.access import Access
from kavier_twin.serve.app import RefusedError, Twin
from kavier_twin.serve.http import AddressError, HttpServer
from kavier_twin.serve.limits import Limits
from kavier_twin.serve.models import Compiling
from serve.twins import TOKEN, Served
from serve.views import empty_view, full_view
from waiting import PATIENCE_SECONDS, until

AUTHORIZED = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
TWIN = Twin(lambda: {"chat": full_view()})


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    yield found
    found.server.close()


@pytest.fixture
def with_token() -> Iterator[Served]:
    found = Served(Access(token=lambda: TOKEN))
    yield found
    found.server.close()


def test_metrics_in_the_format_asked_for(served: Served) -> None:
    status, headers, body = served.ask("GET", "/metrics")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
    assert b"kavier_twin_calibrated" in body
    status, headers, body = served.ask("GET", "/metrics?x=1", Accept="application/openmetrics-text; version=1.0.0")
    assert (status, headers["content-type"].split(";")[0]) == (200, "application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_health_and_readiness(served: Served) -> None:
    assert served.ask("GET", "/healthz")[0] == 200
    assert served.ask("GET", "/readyz")[0] == 200
    served.views["code"] = empty_view("code")
    assert served.ask("GET", "/healthz")[0] == 200
    status, _, body = served.ask("GET", "/readyz")
    assert status == 200  # no traffic yet is a state of the pool, not of the process
    assert body.decode().splitlines() == [
        "ready",
        "pool code: no telemetry record has been processed yet",
        "pool code: no forecast has been made yet",
    ]
    for change, why in (
        ({"compiling": Compiling(1, 3)}, "compiling kernels, 1 of 3"),
        ({"warming_up": True}, "warming up: the past of the logs is being mirrored"),
    ):
        served.views["code"] = replace(empty_view("code"), **change)
        assert served.ask("GET", "/healthz")[0] == 200
        status, _, body = served.ask("GET", "/readyz")
        assert (status, body.decode()) == (503, f"not ready: pool code: {why}\n")


@pytest.mark.parametrize("path", ["/", "/metrics", "/v1/forecast", "/healthz", "/readyz", "/nothing"])
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


@pytest.mark.parametrize("method", ["PUT", "OPTIONS"])
def test_a_static_file_is_only_read(served: Served, method: str) -> None:
    status, headers, _ = served.ask(method, "/static/page.js")
    assert (status, headers["allow"], headers["content-type"]) == (405, "GET, HEAD", "application/problem+json")


@pytest.mark.parametrize(
    "sent",
    [
        b"no request\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # names no host
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000,
    ],
)
def test_what_is_no_http_is_told_as_a_problem(served: Served, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(sent)
        answered = b""
        while part := _received(connection):
            answered += part
    head, _, body = answered.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"application/problem+json" in head
    assert json.loads(body)["status"] == 400


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except ConnectionResetError:  # what was sent has not been read to its end
        return b""


@pytest.mark.parametrize(
    "path", ["/kavier_twin", "/static/../app.py", "/static/%2e%2e/app.py", "/static", "/docs", "/redoc"]
)
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


def test_an_error_inside_is_told_without_its_inside(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.views["chat"] = None  # type: ignore[assignment]
    status, headers, body = served.ask("GET", "/v1/state")
    assert (status, headers["content-type"]) == (500, "application/problem+json")
    assert "content-security-policy" in headers
    assert b"NoneType" not in body
    until(lambda: "NoneType" in caplog.text, "the log says more, a moment later")


def test_a_port_in_use_is_named(served: Served) -> None:
    with pytest.raises(AddressError, match=rf"127\.0\.0\.1:{served.server.port}"):
        HttpServer(TWIN, "127.0.0.1", served.server.port)


def test_an_address_that_is_not_here() -> None:
    with pytest.raises(AddressError, match=r"no\.such\.host\.invalid:0"):
        HttpServer(TWIN, "no.such.host.invalid", 0)
    with pytest.raises(AddressError):
        HttpServer(TWIN, "192.0.2.1", 0)


def test_close_frees_the_port_and_may_come_twice() -> None:
    server = HttpServer(TWIN, "127.0.0.1", 0)
    server.start()
    server.close()
    server.close()
    again = HttpServer(TWIN, "127.0.0.1", server.port)
    again.close()
    assert again.port == server.port


def test_an_answer_that_takes_long_does_not_keep_the_server_from_ending(served: Served) -> None:
    asked, go_on, answered = Event(), Event(), Event()

    def slow(number: int) -> None:
        asked.set()
        go_on.wait(PATIENCE_SECONDS)
        answered.set()

    served.pools["chat"].replica = slow  # type: ignore[method-assign]
    asking = Thread(target=served.ask, args=("GET", "/v1/state/chat/replicas/0"))
    asking.start()
    assert asked.wait(PATIENCE_SECONDS)
    served.server.close()
    assert not answered.is_set()
    go_on.set()
    asking.join(PATIENCE_SECONDS)


def test_a_client_that_leaves_its_request_unfinished_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "IDLE_SECONDS", 0.1)
    for begun in (b"", b"GET /metrics HTT", b"PUT /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE_SECONDS) as hanging:
            hanging.sendall(begun)
            while hanging.recv(4096):
                pass


def test_a_client_that_does_not_take_its_answer_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "IDLE_SECONDS", 0.1)
    served.server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # or the system takes all of it
    view = served.views["chat"]
    served.views["chat"] = replace(view, replicas=view.replicas * 500)
    with socket.socket() as hanging:
        hanging.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        hanging.connect(("127.0.0.1", served.server.port))
        hanging.sendall(b"GET /v1/state HTTP/1.1\r\nHost: x\r\n\r\n")
        assert hanging.recv(1)  # the answer is under way
        time.sleep(2.0)
        taken = 0
        while part := _received(hanging):
            taken += len(part)
    assert taken < len(served.ask("GET", "/v1/state")[2])


# --- the API's guards ---------------------------------------------------------------------------------------------


def test_reading_is_open_and_changing_is_shut_without_a_token(served: Served) -> None:
    assert served.ask("GET", "/v1/policies")[0] == 200
    status, headers, body = served.ask("PUT", "/v1/policies", b"{}", **AUTHORIZED)
    assert (status, headers["content-type"]) == (403, "application/problem+json")
    assert "http.token" in json.loads(body)["detail"]


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe4\xf6"]
)
def test_changing_needs_the_token(with_token: Served, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    status, answered, body = with_token.ask("PUT", "/v1/policies", b"not even JSON", **headers)
    assert status == 401
    assert answered["www-authenticate"].startswith("Bearer")
    assert TOKEN.encode() not in body
    assert len(with_token.pools["chat"].set.policies) == 6


def test_the_token_opens(with_token: Served) -> None:
    body = b'{"policies": [{"name": "now"}, {"name": "fp8", "overrides": {"kv_cache_dtype": "fp8"}}]}'
    status, _, answered = with_token.ask("PUT", "/v1/policies", body, **AUTHORIZED)
    assert status == 200
    told = json.loads(answered)["pools"][0]["policies"]
    assert [(policy["name"], policy["flags"]) for policy in told] == [("now", []), ("fp8", ["--kv-cache-dtype fp8"])]
    assert [policy.name for policy in with_token.pools["chat"].set.policies] == ["now", "fp8"]


def test_reading_may_need_the_token_too() -> None:
    served = Served(Access(token=lambda: TOKEN, open_reading=False))
    try:
        for path in ("/v1/state", "/v1/forecast", "/v1/history", "/metrics"):
            assert served.ask("GET", path)[0] == 401
            assert served.ask("GET", path, **AUTHORIZED)[0] == 200
        for path in ("/healthz", "/readyz", "/", "/static/page.js", "/openapi.json"):  # no figure of the fleet in them
            assert served.ask("GET", path)[0] == 200
    finally:
        served.server.close()


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        (b"{", "body", "not JSON"),
        (b"[]", "body", "valid dictionary"),
        (b"{}", "policies", "missing; add it"),
        (b'{"policies": []}', "policies", "at least 1"),
        (b'{"policies": [{"name": "a", "oh": 1}]}', "policies.0.oh", "unknown; remove it"),
        (b'{"policies": [{"name": "a", "overrides": {"x": 1}}]}', "policies", "current policy"),
        (b'{"policies": [{"name": "a"}, {"name": "a"}]}', "policies", "more than once: a"),
        (b'{"policies": [{"name": "a"}, {"name": "b", "overrides": {"x": 1}}]}', "policies.1.overrides", "unknown"),
    ],
)
def test_a_problem_names_the_field(with_token: Served, body: bytes, field: str, says: str) -> None:
    status, headers, answered = with_token.ask("PUT", "/v1/policies", body, **AUTHORIZED)
    assert (status, headers["content-type"]) == (422, "application/problem+json")
    problem = json.loads(answered)
    assert (problem["status"], problem["title"]) == (422, "Unprocessable Entity")
    assert [error["field"] for error in problem["errors"]] == [field]
    assert says in problem["errors"][0]["detail"]
    assert says in problem["detail"]


@pytest.mark.parametrize(
    ("refusal", "status", "field"),
    [
        (RefusedError("overrides", "unknown policy setting"), 422, "overrides"),
        (Busy("8 questions wait already"), 429, None),
        (NothingYet("no telemetry yet"), 503, None),
    ],
)
def test_what_if_is_answered_or_refused(with_token: Served, refusal: Exception, status: int, field: str | None) -> None:
    body = b'{"overrides": {"kv_cache_dtype": "fp8"}, "load": 1.5, "horizon_seconds": 3600}'
    answered = with_token.ask("POST", "/v1/whatif", body, **AUTHORIZED)
    assert answered[0] == 200
    assert json.loads(answered[2])["cases"][1]["kpis"]["ttft_p99_seconds"] == {"p10": 0.4, "p50": 0.5, "p90": None}
    assert with_token.pools["chat"].asked[0].load == 1.5
    with_token.pools["chat"].refusal = refusal
    answered = with_token.ask("POST", "/v1/whatif", body, **AUTHORIZED)
    assert answered[0] == status
    problem = json.loads(answered[2])
    assert problem["detail"] == str(refusal)
    assert [error["field"] for error in problem["errors"]] == ([field] if field else [])
    assert ("retry-after" in answered[1]) == (status != 422)


def test_a_what_if_looks_no_further_than_is_allowed(with_token: Served) -> None:
    status, _, body = with_token.ask("POST", "/v1/whatif", b'{"horizon_seconds": 3601}', **AUTHORIZED)
    assert status == 422
    assert json.loads(body)["errors"] == [
        {"field": "horizon_seconds", "detail": "at most 3600 (http.max_horizon_seconds)"}
    ]
    assert not with_token.pools["chat"].asked


def test_a_what_if_has_no_more_requests_than_can_be_simulated() -> None:
    served = Served(Access(token=lambda: TOKEN), Limits(requests=1_000))
    try:
        status, _, body = served.ask("POST", "/v1/whatif", b'{"horizon_seconds": 300, "load": 2}', **AUTHORIZED)
        assert (status, json.loads(body)["errors"][0]["field"]) == (422, "load")
        assert "1500 requests" in json.loads(body)["detail"]
        assert served.ask("POST", "/v1/whatif", b'{"horizon_seconds": 300}', **AUTHORIZED)[0] == 200
    finally:
        served.server.close()


def test_an_unknown_pool_is_named_beside_those_there_are(with_token: Served) -> None:
    for answered in (
        with_token.ask("GET", "/v1/state?pool=chatt"),
        with_token.ask("GET", "/v1/state/chatt/replicas/0"),
        with_token.ask("PUT", "/v1/policies", b'{"pool": "chatt", "policies": [{"name": "a"}]}', **AUTHORIZED),
    ):
        assert answered[0] == 404
        problem = json.loads(answered[2])
        assert problem["errors"][0]["field"] == "pool"
        assert "'chatt'; there are: chat" in problem["detail"]


def test_a_long_body_is_refused_with_a_length_and_in_chunks() -> None:
    served = Served(Access(token=lambda: TOKEN), Limits(body_bytes=1000))
    try:
        assert served.ask("PUT", "/v1/policies", b" " * 1001, **AUTHORIZED)[0] == 413
        assert served.ask("PUT", "/v1/policies", b" " * 1000, **AUTHORIZED)[0] == 422
        head = "PUT /v1/policies HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in AUTHORIZED.items())
        with socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE_SECONDS) as connection:
            connection.sendall(f"{head}\r\n".encode() + (b"1f4\r\n" + b" " * 500 + b"\r\n") * 3 + b"0\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    finally:
        served.server.close()


def test_requests_beyond_the_limit_wait_outside_but_probes_get_through() -> None:
    served = Served(limits=Limits(at_once=1))
    asked, go_on = Barrier(2), Event()

    def slow(number: int) -> None:
        asked.wait(PATIENCE_SECONDS)
        go_on.wait(PATIENCE_SECONDS)

    served.pools["chat"].replica = slow  # type: ignore[method-assign]
    asking = Thread(target=served.ask, args=("GET", "/v1/state/chat/replicas/0"))
    asking.start()
    try:
        asked.wait(PATIENCE_SECONDS)
        status, headers, _ = served.ask("GET", "/v1/state")
        assert (status, headers["retry-after"]) == (503, "1")
        assert served.ask("GET", "/healthz")[0] == 200
        assert served.ask("GET", "/metrics")[0] == 200
    finally:
        go_on.set()
        asking.join(PATIENCE_SECONDS)
    assert served.ask("GET", "/v1/state")[0] == 200
    served.server.close()
