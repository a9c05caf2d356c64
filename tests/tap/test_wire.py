"""The proxy, byte by byte: raw clients before it, a raw server behind it."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from urllib.parse import urlsplit

import pytest

from kavier_twin.tap import upstream
from tap.openai_server import Running, tapped
from waiting import PATIENCE_SECONDS

GET = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class RawServer:
    """Answers every request with `answer`, byte for byte, and keeps what it got, connection by connection."""

    def __init__(self) -> None:
        self.answer: bytes | Callable[[socket.socket], None] = EMPTY
        self.got: list[bytearray] = []
        self.waits_for_bodies = True
        self.closed = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self.got.append(bytearray())
            threading.Thread(target=self._serve, args=(client, self.got[-1]), daemon=True).start()

    def _serve(self, client: socket.socket, got: bytearray) -> None:
        answered = 0
        with client:
            while True:
                try:
                    data = client.recv(65_536)
                except OSError:
                    data = b""
                if not data:
                    self.closed.set()
                    return
                got += data
                while answered < got.count(b" HTTP/1.1\r\n") and (not self.waits_for_bodies or _is_whole(got)):
                    answered += 1
                    if isinstance(self.answer, bytes):
                        client.sendall(self.answer)
                        if b"until-close" in self.answer:
                            return
                    else:
                        self.answer(client)


def _is_whole(got: bytearray) -> bool:
    last = got[got.rfind(b" HTTP/1.1\r\n") :]
    head, _, body = last.partition(b"\r\n\r\n")
    if b"transfer-encoding" in head:
        return last.endswith(b"0\r\n\r\n")
    named = [line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"content-length")]
    return b"\r\n\r\n" in last and len(body) >= (int(named[0]) if named else 0)


@pytest.fixture
def server() -> Iterator[RawServer]:
    with closing(RawServer()) as running:
        yield running


@pytest.fixture
def tap(server: RawServer) -> Iterator[Running]:
    with tapped(server.url, ask_engine=False) as running:
        yield running


def ask(tap: Running, *parts: bytes, pause_seconds: float = 0.02) -> bytes:
    """Send, and all that comes back until the tap closes, or says no more for a moment."""
    place = urlsplit(tap.url)
    with socket.create_connection((place.hostname, place.port), timeout=PATIENCE_SECONDS) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(pause_seconds if len(parts) > 1 else 0.0)
        answer = bytearray()
        try:
            while piece := client.recv(65_536):
                answer += piece
                client.settimeout(0.15)
        except TimeoutError:
            pass
        return bytes(answer)


# What frames a request decides where the next one begins: the engine must see what the tap saw, or nothing.
SMUGGLED = b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length : 5\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"X: a\rTransfer-Encoding: chunked\r\n",
        b"X: a\0b\r\n",
        b" Transfer-Encoding: chunked\r\n",
    ],
)
def test_a_body_framed_in_two_ways_never_reaches_the_engine(tap: Running, server: RawServer, head: bytes) -> None:
    answer = ask(tap, b"POST /x HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n0\r\n\r\n" + SMUGGLED)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert not server.got


@pytest.mark.parametrize(
    "chunk", [b"5;\r\n\n", b"0x5\r\nhello\r\n", b"-1\r\n", b"fffffffffffffffff\r\n", b"5\r\nhelloX\r\n"]
)
def test_a_chunk_that_is_none_ends_the_request_for_the_engine_too(
    tap: Running, server: RawServer, chunk: bytes
) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = ask(tap, head + b"2\r\nok\r\n", chunk + b"0\r\n\r\n" + SMUGGLED)
    assert b"200" not in answer
    assert b"/admin" not in b"".join(server.got)
    assert not any(bytes(got).endswith(b"0\r\n\r\n") for got in server.got)


@pytest.mark.parametrize("target", [b"@127.0.0.1:1/", b"127.0.0.1:1", b"*", b"x", b":1/", b"\\\\evil", b"ftp:x"])
def test_a_target_cannot_name_another_server(tap: Running, server: RawServer, target: bytes) -> None:
    answer = ask(tap, b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert not server.got


@pytest.mark.parametrize(
    ("target", "passed"),
    [
        (b"http://evil.example/v1/models?a=1", b"/v1/models?a=1"),
        (b"//evil.example/x", b"//evil.example/x"),
        (b"/a%2Fb/%2e%2e/c;d?e=%00&f", b"/a%2Fb/%2e%2e/c;d?e=%00&f"),
        (b"/../x", b"/../x"),
    ],
)
def test_a_target_passes_as_a_path(tap: Running, server: RawServer, target: bytes, passed: bytes) -> None:
    ask(tap, b"GET " + target + b" HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    authority = server.url.removeprefix("http://").encode()
    assert bytes(server.got[0]).startswith(b"GET " + passed + b" HTTP/1.1\r\nhost: " + authority + b"\r\n")


@pytest.mark.parametrize("method", [b"GET", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"POST", b"HEAD", b"TRACE"])
def test_every_method_passes(tap: Running, server: RawServer, method: bytes) -> None:
    assert ask(tap, method + b" /x HTTP/1.1\r\nHost: a\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert bytes(server.got[0]).startswith(method + b" /x HTTP/1.1\r\n")


def test_fields_pass_as_they_are_but_those_of_a_connection(tap: Running, server: RawServer) -> None:
    kept = [b"x-latin: caf\xe9", b"x-twice: 1", b"x-twice: 2", b"x-empty: ", b"cookie: a=b", b"accept-encoding: br"]
    left = [b"connection: close, x-mine", b"x-mine: 1", b"keep-alive: 5", b"te: trailers", b"upgrade: h2c"]
    ask(tap, b"GET /x HTTP/1.1\r\nHost: a\r\n" + b"\r\n".join(kept + left) + b"\r\n\r\n")
    head = bytes(server.got[0]).split(b"\r\n\r\n")[0].split(b"\r\n")
    assert head[2:] == kept


def test_a_body_in_chunks_goes_in_chunks(tap: Running, server: RawServer) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    ask(tap, head, b"5\r\nhello\r\n", b"6;a=b\r\n world\r\n", b"0\r\nx-trailer: 1\r\n\r\n")
    got_head, body = bytes(server.got[0]).split(b"\r\n\r\n", 1)
    assert (b"transfer-encoding: chunked" in got_head, b"content-length" in got_head) == (True, False)
    assert body == b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"


def test_a_client_that_waits_for_100_continue_gets_it(tap: Running, server: RawServer) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    answer = ask(tap, head, b"ok", pause_seconds=0.1)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert b"expect" not in server.got[0]


def test_a_head_without_end_is_refused(tap: Running, server: RawServer) -> None:
    answer = ask(tap, b"GET /x HTTP/1.1\r\nHost: a\r\nx: ", *[b"y" * 30_000] * 3)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert not server.got


def test_connections_to_the_engine_are_kept_and_requests_in_a_row_answered_in_turn(
    tap: Running, server: RawServer
) -> None:
    assert ask(tap, GET + GET + GET).count(b"HTTP/1.1 200 OK") == 3
    assert ask(tap, GET).count(b"HTTP/1.1 200 OK") == 1
    assert len(server.got) == 1
    server.answer = EMPTY.replace(b"Content", b"Connection: close\r\nContent")
    assert ask(tap, GET + GET).count(b"HTTP/1.1 200 OK") == 2
    assert len(server.got) == 2


@pytest.mark.parametrize(
    ("method", "answer", "expected"),
    [
        (b"GET", b"HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n", b"HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\netag: 1\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\netag: 1\r\n\r\n"),
        (
            b"HEAD",
            b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n",
        ),
        (
            b"GET",
            b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        ),
        (
            b"GET",
            b"HTTP/1.1 200 OK\r\nx: until-close\r\n\r\nwhole",
            b"HTTP/1.1 200 OK\r\nx: until-close\r\ntransfer-encoding: chunked\r\n\r\n5\r\nwhole\r\n0\r\n\r\n",
        ),
        (
            b"GET",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n0\r\nx-trailer: 1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n0\r\n\r\n",
        ),
    ],
)
def test_answers_without_body_and_with_odd_ends(
    tap: Running, server: RawServer, method: bytes, answer: bytes, expected: bytes
) -> None:
    server.answer = answer
    for _ in range(2):  # the second over a kept connection, where there is one
        assert ask(tap, method + b" /x HTTP/1.1\r\nHost: a\r\n\r\n") == expected


def test_a_compressed_answer_passes_compressed(tap: Running, server: RawServer) -> None:
    body = gzip.compress(b"hello" * 1000)
    fields = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    server.answer = b"HTTP/1.1 200 OK\r\n" + fields.lower() + body
    assert ask(tap, GET) == server.answer


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000, b"HTTP/1.1 101 X\r\n\r\nab"]
)
def test_an_engine_that_talks_nonsense_is_a_502(tap: Running, server: RawServer, answer: bytes) -> None:
    server.answer = answer
    assert ask(tap, GET).startswith(b"HTTP/1.1 502 ")


def test_an_engine_that_accepts_no_connection_is_a_502_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_CONNECT_SECONDS", 0.3)
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # until its queue is full, and further ones wait
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with tapped(f"http://127.0.0.1:{full.getsockname()[1]}", ask_engine=False) as tap:
            assert ask(tap, GET).startswith(b"HTTP/1.1 502 ")


def test_a_client_of_http_1_0_is_answered_and_left(tap: Running, server: RawServer) -> None:
    server.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    assert ask(tap, b"GET /x HTTP/1.0\r\n\r\n").endswith(b"connection: close\r\n\r\nok")
    assert bytes(server.got[0]).startswith(b"GET /x HTTP/1.1\r\n")


def test_an_answer_before_the_whole_request_ends_both(tap: Running, server: RawServer) -> None:
    """As an engine that finds a body too large."""

    def refuse(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")

    server.answer = refuse
    head = b"POST /x HTTP/1.1\r\nHost: a\r\ncontent-length: 1000\r\n\r\n"
    server.waits_for_bodies = False
    answer = ask(tap, head, b"a" * 10, pause_seconds=0.1)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert server.closed.wait(PATIENCE_SECONDS)  # what is left of the request is nobody's


def test_a_client_that_stops_reading_holds_up_the_engine_and_not_the_tap(tap: Running, server: RawServer) -> None:
    sent = 0

    def stream(client: socket.socket) -> None:
        nonlocal sent
        client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.settimeout(0.5)
        try:
            while sent < 200_000_000:
                client.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
                sent += 65_536
        except OSError:
            client.close()

    server.answer = stream
    place = urlsplit(tap.url)
    with socket.create_connection((place.hostname, place.port), timeout=PATIENCE_SECONDS) as client:
        client.sendall(GET)
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
        time.sleep(1.5)
        assert sent < 50_000_000
    tap.counted("kavier_twin_tap_requests_total", outcome="cancelled")
