"""The process that makes records, and the hand-over to it.

It is a process of its own because tokenising and hashing a long prompt takes milliseconds of Python, which would hold
up the bytes of every answer on its way. If it dies, traffic passes on and another one is started.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import pickle
import signal
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from prometheus_client import start_http_server

from kavier_twin.errors import UserError, set_up_logging
from kavier_twin.tap.bodies import MOST_BYTES_TOGETHER
from kavier_twin.tap.engine import Engine
from kavier_twin.tap.exchanges import EngineAt, Passed, Request
from kavier_twin.tap.hashing import BlockHasher
from kavier_twin.tap.local_tokenizer import LocalTokenizer
from kavier_twin.tap.metrics import TapMetrics
from kavier_twin.tap.producer import FileSink, KafkaSink, Producer, Sink
from kavier_twin.tap.recorder import Recorder

_MAKE_SECONDS: Final = 10.0  # for records under way, after the last answer
_HAND_ON_SECONDS: Final = 10.0  # for records that then wait for Kafka
_START_SECONDS: Final = 60.0
_AGAIN_SECONDS: Final = 1.0
_NICENESS: Final = 10  # where processors are short, traffic goes first
_MOST_PORTS: Final = 64  # that are tried, one after the other
_LENGTH: Final = struct.Struct("!Q")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordSettings:
    """How records are made and where they go. `engine` is asked for tokens; exactly one of `output` and `kafka`.

    With `shares_ports` the port of the metrics is the first free one from `metrics_port` on: an engine may have several
    API servers, each with a worker of its own.
    """

    pool: str
    pod: str | None
    block_tokens: int
    hash_algorithm: str
    python_hash_seed: str | None
    tokenizer: Path | None
    engine: str | None
    engine_ca: Path | None
    topic: str
    output: Path | None
    kafka: Mapping[str, Any] | None = field(repr=False)  # kafka-python's options, passwords among them
    host: str
    metrics_port: int
    shares_ports: bool = False


class Worker:
    """The first process' end. `take` returns at once, whatever the worker does."""

    def __init__(self, settings: RecordSettings | Sequence[str]) -> None:
        """`settings`, or the options of `kavier-twin tap` from which the worker makes them itself."""
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._engine: EngineAt | None = None
        self._lost = 0  # requests that could not be handed over since that was last told
        self._ending = False
        self._restarting: asyncio.Future[None] | None = None

    def start(self) -> int:
        """Start it. Returns the port of /metrics. Raises UserError for what its settings get wrong."""
        ours, theirs = socket.socketpair()
        with theirs:
            # A program of its own: forking would copy an engine, and multiprocessing would import its main module.
            self._process = subprocess.Popen(self._command(theirs.fileno()), pass_fds=[theirs.fileno()])
        ours.settimeout(_START_SECONDS)
        told = b""
        try:
            if isinstance(self._settings, RecordSettings):
                settings = pickle.dumps(self._settings)
                ours.sendall(_LENGTH.pack(len(settings)) + settings)  # passwords are in it: never an argument
            while not told.endswith(b"\n"):
                if not (piece := ours.recv(1)):
                    raise UserError("the process that makes records ended at its start; its log above says why")
                told += piece
        except OSError as error:
            raise UserError("the process that makes records does not start") from error
        answer = json.loads(told)
        if "error" in answer:
            raise UserError(answer["error"])
        ours.settimeout(None)
        self._socket = ours
        return int(answer["port"])

    def _command(self, descriptor: int) -> list[str]:
        if isinstance(self._settings, RecordSettings):
            return [sys.executable, "-m", "kavier_twin.tap", str(descriptor)]
        program = [sys.executable, "-m", "kavier_twin.commands.main", "tap"]
        return [*program, "--hand-over", str(descriptor), *self._settings]

    async def attend(self) -> None:
        """Take over the hand-over for this event loop."""
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(lambda: _Watch(self._lost_it), sock=self._socket)
        if self._engine is not None:
            self.take(self._engine)

    def take(self, told: Request | Passed | EngineAt) -> None:
        """Hand over; a request that does not fit is counted as dropped, when that can be told."""
        transport, is_request = self._transport, isinstance(told, Request)
        if isinstance(told, EngineAt):
            self._engine = told  # for the next worker, too
        if transport is None or (is_request and transport.get_write_buffer_size() > MOST_BYTES_TOGETHER):
            self._lost += is_request
            return
        lost, self._lost = self._lost, 0
        data = pickle.dumps((told, lost))
        transport.write(_LENGTH.pack(len(data)) + data)

    async def end(self) -> None:
        """Let it finish the records that it has, and end."""
        self._ending = True
        if self._restarting is not None:
            await self._restarting
        if self._transport is not None:
            self._transport.write_eof()
        await asyncio.to_thread(self._reap, _MAKE_SECONDS + _HAND_ON_SECONDS + 10.0)

    async def leave(self, seconds: float) -> None:
        """Let it finish and end, and wait for these seconds at most: it goes on without this process."""
        self._ending = True
        if self._transport is not None and self._process is not None:
            self._transport.write_eof()
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, seconds)

    def _reap(self, seconds: float) -> None:
        """Wait for its end; past these seconds, enforce it."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("records were not handed on in time; those that are left are lost")
            self._process.kill()
            self._process.wait()

    def _lost_it(self) -> None:
        self._transport = None
        if not self._ending:
            log.error("the process that makes records died; traffic passes on, another one is started")
            self._restarting = asyncio.ensure_future(self._again())

    async def _again(self) -> None:
        await asyncio.to_thread(self._reap, 1.0)
        while not self._ending:
            await asyncio.sleep(_AGAIN_SECONDS)
            try:
                await asyncio.to_thread(self.start)
            except UserError as error:
                log.error("%s", error)
                continue
            await self.attend()
            return


class _Watch(asyncio.Protocol):
    """Sees the worker go."""

    def __init__(self, gone: Callable[[], None]) -> None:
        self._gone = gone

    def connection_lost(self, error: Exception | None) -> None:
        self._gone()


def sent_settings(hand_over: socket.socket) -> RecordSettings:
    """Those that the first process sends."""
    with hand_over.makefile("rb", buffering=0) as reader:
        (length,) = _LENGTH.unpack(_exactly(reader, _LENGTH.size))
        settings = pickle.loads(_exactly(reader, length))
    assert isinstance(settings, RecordSettings)
    return settings


def main(hand_over: socket.socket, read_settings: Callable[[], RecordSettings]) -> None:
    """The worker. In one line it tells how the start went; it ends when the hand-over does.

    What is wrong with the settings `read_settings` raises as a UserError.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # meant for the first process, which ends this one when it is done
    os.nice(_NICENESS)
    set_up_logging("info")
    metrics = TapMetrics()
    try:
        settings = read_settings()
        hasher = BlockHasher(settings.hash_algorithm, settings.block_tokens, settings.python_hash_seed)
        tokenizer = None if settings.tokenizer is None else LocalTokenizer(settings.tokenizer)
        sink = _sink(settings)
        server = _serve_metrics(settings, metrics)
    except UserError as error:
        hand_over.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
        return
    hand_over.sendall(json.dumps({"port": server.server_port}).encode() + b"\n")
    producer = Producer(sink, metrics)
    asyncio.run(_record(settings, hand_over, producer, metrics, hasher, tokenizer))
    producer.close(_HAND_ON_SECONDS)
    server.shutdown()


def _exactly(reader: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (piece := reader.read(size - len(data))):
            raise SystemExit(1)  # the first process is gone
        data += piece
    return bytes(data)


def _serve_metrics(settings: RecordSettings, metrics: TapMetrics) -> Any:
    """The running server of /metrics. Raises UserError."""
    port = settings.metrics_port
    last = port + _MOST_PORTS if settings.shares_ports and port else port
    while True:
        try:
            return start_http_server(port, settings.host, metrics.registry)[0]
        except OSError as error:
            if port >= last or error.errno != errno.EADDRINUSE:
                problem = f"--metrics-port {settings.metrics_port}: {error.strerror}; give another one"
                raise UserError(problem) from error
            port += 1


def _sink(settings: RecordSettings) -> Sink:
    if settings.output is None:
        return KafkaSink(settings.topic, settings.kafka or {})
    try:
        return FileSink(settings.output)
    except OSError as error:
        raise UserError(f"--output {settings.output}: {error.strerror}; give a file that can be written") from error


async def _record(
    settings: RecordSettings,
    hand_over: socket.socket,
    producer: Producer,
    metrics: TapMetrics,
    hasher: BlockHasher,
    tokenizer: LocalTokenizer | None,
) -> None:
    reader, _ = await asyncio.open_connection(sock=hand_over)
    tls = ssl.create_default_context(cafile=settings.engine_ca)
    async with aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(), connector=aiohttp.TCPConnector(ssl=tls)
    ) as session:
        engine = None if settings.engine is None else Engine(session, settings.engine)
        recorder = Recorder(producer, metrics, hasher, tokenizer, engine, settings.pool, settings.pod)
        while True:
            try:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                told, lost = pickle.loads(await reader.readexactly(length))
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            if lost:
                metrics.dropped.labels("too-busy").inc(lost)
            if isinstance(told, EngineAt):
                recorder.engine = recorder.engine or Engine(session, told.url)
            else:
                recorder.take(told)
        await recorder.drain(_MAKE_SECONDS)
