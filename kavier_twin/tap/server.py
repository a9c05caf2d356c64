"""A running tap: sockets, server, and the order in which it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from typing import Final

import uvicorn
from prometheus_client import start_http_server

from kavier_twin.errors import UserError
from kavier_twin.tap.engine import Engine
from kavier_twin.tap.hashing import BlockHasher
from kavier_twin.tap.metrics import TapMetrics
from kavier_twin.tap.mirror import Mirror
from kavier_twin.tap.producer import Producer
from kavier_twin.tap.prompts import Tokenizer
from kavier_twin.tap.proxy import Proxy, client_session
from kavier_twin.tap.recorder import Recorder

_DRAIN_SECONDS: Final = 10.0  # for records under way, after the last answer


@dataclass(frozen=True)
class TapSettings:
    """How a tap runs. `upstream` is None for a mirror without an engine to ask."""

    host: str
    port: int
    metrics_port: int
    upstream: str | None
    mirror: bool
    pool: str
    pod: str | None
    grace_seconds: float


def serve(
    settings: TapSettings, metrics: TapMetrics, producer: Producer, hasher: BlockHasher, tokenizer: Tokenizer | None
) -> None:
    """Run until a signal, then finish the answers under way and hand over the records."""
    with _listen(settings.host, settings.port) as listening:
        try:
            server, thread = start_http_server(settings.metrics_port, settings.host, metrics.registry)
        except OSError as error:
            raise UserError(f"--metrics-port {settings.metrics_port}: {error.strerror}; give another one") from error
        print(f"tap at http://{settings.host}:{listening.getsockname()[1]}, ", end="")
        print(f"metrics at http://{settings.host}:{server.server_port}/metrics", flush=True)
        try:
            asyncio.run(_serve(settings, metrics, producer, hasher, tokenizer, listening))
        finally:
            server.shutdown()
            thread.join()


async def _serve(
    settings: TapSettings,
    metrics: TapMetrics,
    producer: Producer,
    hasher: BlockHasher,
    tokenizer: Tokenizer | None,
    listening: socket.socket,
) -> None:
    async with client_session() as session:
        engine = None if settings.upstream is None else Engine(session, settings.upstream.rstrip("/"))
        recorder = Recorder(producer, metrics, hasher, tokenizer, engine, settings.pool, settings.pod)
        app: Proxy | Mirror
        if settings.mirror:
            app = Mirror(recorder, metrics)
        else:
            assert settings.upstream is not None
            app = Proxy(settings.upstream, session, recorder, metrics)
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            date_header=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            h11_max_incomplete_event_size=65_536,
            timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
        )
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # an answer that was cut is told by the proxy
        await uvicorn.Server(config).serve(sockets=[listening])
        await recorder.drain(_DRAIN_SECONDS)


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(f"--port {port}: cannot listen at {host}: {error.strerror}; give another one") from error
    return listening
