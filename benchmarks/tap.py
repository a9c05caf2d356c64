"""(l) What the tap adds to the time to first byte of a streamed answer, and what it costs.

A small streaming server, and three ways to it that a client takes in turn, so that all meet the same moments of the
machine: direct, through `kavier-twin tap`, and through a process that only copies bytes, which is what any proxy costs
there. The client waits for the first byte of the answer on a connection that is kept; the server gives it at once, so
that no timer blurs it. Prompts are tokenised by the server and hashed by the tap meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.common import report

CONCURRENCIES = (1, 8, 32, 64)
SECONDS = 13.0  # of each
PROMPT_CHARACTERS = 8_000
CHARACTERS_OF_A_TOKEN = 4
OUTPUT_TOKENS = 10
TOKEN_SECONDS = 0.02
THINK_SECONDS = 0.05


def _whole(answer: dict[str, Any]) -> bytes:
    data = json.dumps(answer).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data


# Made beforehand: a server that tokenises would hold up its own answers.
_TOKENS = _whole({"tokens": [number * 7919 % 128_000 for number in range(PROMPT_CHARACTERS // CHARACTERS_OF_A_TOKEN)]})
_MODELS = _whole({"data": [{"id": "m", "parent": None}]})
_CHOICE = {"index": 0, "delta": {"content": " time"}, "finish_reason": None}
_EVENT = json.dumps(
    {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m", "choices": [_CHOICE]}
).encode()


def main() -> None:
    """Measure each concurrency."""
    listening, copying = (socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(2))
    port = listening.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    helpers = [
        fork.Process(target=lambda: uvloop.run(_serve(listening)), daemon=True),
        fork.Process(target=lambda: uvloop.run(_copy(copying, port)), daemon=True),
    ]
    for helper in helpers:
        helper.start()
    try:
        with tempfile.TemporaryDirectory() as directory:
            rows = _measure(port, copying.getsockname()[1], Path(directory) / "records.jsonl")
    finally:
        for helper in helpers:
            helper.terminate()
    notes = (
        "milliseconds from the request to the first byte of its answer; added: the quantile of a way less that of the "
        "direct one; clients take the ways in turn; copied: by a process that only copies bytes; CPU: of the tap's "
        "two processes"
    )
    report("(l) the tap", rows, notes)


def _measure(port: int, copying_port: int, records: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "kavier_twin.commands.main", "tap", "--upstream", f"http://127.0.0.1:{port}"]
    tap = subprocess.Popen(
        [*command, "--port", "0", "--metrics-port", "0", "--output", str(records)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert tap.stdout is not None
        found = re.search(r"tap at http://[^:]+:(\d+)", tap.stdout.readline())
        assert found is not None
        ports = (port, copying_port, int(found[1]))
        uvloop.run(_load(ports, 4, 1.0))
        return [_row(concurrency, tap.pid, ports) for concurrency in CONCURRENCIES]
    finally:
        tap.terminate()
        tap.wait(30)


def _row(concurrency: int, process: int, ports: tuple[int, ...]) -> dict[str, Any]:
    cpu = _cpu_seconds(process)
    waited = uvloop.run(_load(ports, concurrency, SECONDS))
    cpu = _cpu_seconds(process) - cpu
    (d50, d99), (c50, c99), (t50, t99) = (np.quantile(np.array(of) * 1e3, (0.5, 0.99)) for of in waited)
    return {
        "clients": concurrency,
        "requests": len(waited[2]),
        "direct p50": d50,
        "direct p99": d99,
        "copied: added p50": c50 - d50,
        "copied: added p99": c99 - d99,
        "tap: added p50": t50 - d50,
        "tap: added p99": t99 - d99,
        "tap's CPU": f"{cpu / SECONDS:.0%}",
        "CPU ms / request": cpu / len(waited[2]) * 1e3,
    }


def _cpu_seconds(process: int) -> float:
    """Of a process and those that it started."""
    total = 0.0
    for each in (process, *map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


async def _load(ports: tuple[int, ...], concurrency: int, seconds: float) -> list[list[float]]:
    """Seconds to the first byte, by each way."""
    waited: list[list[float]] = [[] for _ in ports]
    until = time.perf_counter() + seconds
    await asyncio.gather(*(_client(ports, waited, until, number) for number in range(concurrency)))
    return waited


async def _client(ports: tuple[int, ...], waited: list[list[float]], until: float, number: int) -> None:
    loop = asyncio.get_running_loop()
    ways = [(await loop.create_connection(_Client, "127.0.0.1", port))[1] for port in ports]
    chance = random.Random(number)
    turn = number
    while time.perf_counter() < until:
        await asyncio.sleep(chance.expovariate(1.0 / THINK_SECONDS))  # or else all would come at once
        turn += 1
        way = turn % len(ports)
        waited[way].append(await ways[way].ask(_request(number, turn)))
    for each in ways:
        each.transport.close()


def _request(number: int, turn: int) -> bytes:
    text = (f"{number} {turn} " + "once upon a time " * (PROMPT_CHARACTERS // 17 + 1))[:PROMPT_CHARACTERS]
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], "stream": True}).encode()
    fields = f"Host: x\r\nAuthorization: Bearer k\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST /v1/chat/completions HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body


class _Client(asyncio.Protocol):
    """One kept connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self._end = b""

    async def ask(self, request: bytes) -> float:
        """Send, wait for the whole answer, tell when its first byte came."""
        self._over = asyncio.get_running_loop().create_future()
        self._first_seconds: float | None = None
        self._end = b""
        sent_seconds = time.perf_counter()
        self.transport.write(request)
        await self._over
        assert self._first_seconds is not None
        return self._first_seconds - sent_seconds

    def data_received(self, data: bytes) -> None:
        if self._first_seconds is None:
            self._first_seconds = time.perf_counter()
            assert data.startswith(b"HTTP/1.1 200"), data
        self._end = (self._end + data)[-5:]
        if self._end == b"0\r\n\r\n":
            self._over.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._over.done():
            self._over.set_exception(ConnectionError())


class _Copier(asyncio.Protocol):
    """Copies what comes to the other side."""

    other: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.other.transport.close()


async def _copy(listening: socket.socket, port: int) -> None:
    loop = asyncio.get_running_loop()
    listening.setblocking(False)
    while True:
        accepted, _ = await loop.sock_accept(listening)
        _, theirs = await loop.create_connection(_Copier, "127.0.0.1", port)
        ours = _Copier()
        ours.other, theirs.other = theirs, ours
        await loop.connect_accepted_socket(lambda made=ours: made, accepted)


async def _serve(listening: socket.socket) -> None:
    server = await asyncio.start_server(_answer, sock=listening, limit=2**20)
    await server.serve_forever()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(length[1]) if length else 0)
            if head.startswith(b"POST /v1/"):
                await _stream(writer)
            else:
                writer.write(_TOKENS if head.startswith(b"POST /tokenize") else _MODELS)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _stream(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    for number in range(OUTPUT_TOKENS):
        if number:
            await asyncio.sleep(TOKEN_SECONDS)
        _chunk(writer, b"data: " + _EVENT + b"\n\n")
    _chunk(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


if __name__ == "__main__":
    main()
