"""Makes the two records of a request, beside the path of the request and of its text keeping only hashes."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError

from kavier_twin.tap.answers import Answer
from kavier_twin.tap.engine import Engine
from kavier_twin.tap.hashing import BlockHasher
from kavier_twin.tap.metrics import TapMetrics
from kavier_twin.tap.producer import Producer
from kavier_twin.tap.prompts import Asked, NoTokens, NotReadable, Tokenizer
from kavier_twin.telemetry import RequestFinished, RequestSeen

MOST_BODY_BYTES: Final = 32 << 20  # of one request; a larger one passes, without a record
MOST_BYTES_WAITING: Final = 256 << 20  # bodies not yet tokenised, all together

log = logging.getLogger(__name__)


@dataclass
class Request:
    """A request on its way. `body` is dropped once it is tokenised; times are of the monotonic clock."""

    path: str
    body: bytes
    session: str | None
    authorization: str | None
    arrived_unix_seconds: float
    arrived_seconds: float
    id: str = field(default_factory=lambda: f"tap-{uuid.uuid4().hex}")
    seen: asyncio.Task[bool] | None = None  # whether its first record was made
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Recorder:
    """Turns requests and answers into records for `producer`."""

    def __init__(
        self,
        producer: Producer,
        metrics: TapMetrics,
        hasher: BlockHasher,
        tokenizer: Tokenizer | None,
        engine: Engine | None,
        pool: str,
        pod: str | None,
    ) -> None:
        self._producer = producer
        self._metrics = metrics
        self._hasher = hasher
        self._tokenizer = tokenizer
        self._engine = engine
        self._pool = pool
        self._pod = pod
        self._waiting_bytes = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    def begun(self, request: Request, answer: Answer | None = None) -> None:
        """Its answer began, or it ended without one: make the first record. A second call does nothing."""
        if request.seen is None:
            request.seen = self._start(self._see(request, answer))

    def ended(self, request: Request, answer: Answer, reason: str | None, now_seconds: float) -> None:
        """It ended: make the second record, once the first is made. `reason` where the answer itself tells none."""
        self.begun(request, answer)
        answer.end()
        request.over.set()
        self._start(self._finish(request, answer, reason, now_seconds, time.time()))

    async def drain(self, seconds: float) -> None:
        """Wait for what is being made, for `seconds` at most; what is left then is counted as dropped."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in list(self._tasks):
            task.cancel()
            self._metrics.dropped.labels("ended").inc()

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _see(self, request: Request, answer: Answer | None) -> bool:
        size = len(request.body)
        if self._waiting_bytes + size > MOST_BYTES_WAITING:
            request.body = b""
            return self._drop("too-busy")
        self._waiting_bytes += size
        try:
            record = await self._seen(request, answer)
        except NotReadable as error:
            return self._drop(str(error))
        except ValidationError:
            return self._drop("bad-value")
        except Exception as error:  # a fault here must not become the client's; its text might hold a prompt
            log.error("no record of a request: %s", type(error).__name__)
            return self._drop("fault")
        finally:
            request.body = b""
            self._waiting_bytes -= size
        self._producer.put(record)
        return True

    async def _seen(self, request: Request, answer: Answer | None) -> RequestSeen:
        asked = await asyncio.to_thread(Asked.of, request.path, request.body, request.session)
        hashes: tuple[int, ...] = ()
        try:
            tokens = await self._tokens(asked, request.authorization)
            prompt_tokens = len(tokens)
            why_not = asked.without_hashes()
            if why_not is None and self._engine and await self._engine.is_adapter(asked.model, request.authorization):
                why_not = "lora"
            if why_not is None:
                hashes = await asyncio.to_thread(self._hasher.hashes, tokens)
        except NoTokens as error:
            why_not = str(error)
            # What is left is the engine's own count, at the end of the answer; of a stream only if the client wants it.
            if answer is not None:
                await request.over.wait()
            if answer is None or answer.prompt_tokens is None:
                raise NotReadable(why_not) from error
            prompt_tokens = answer.prompt_tokens
        if why_not is not None:
            self._metrics.without_hashes.labels(why_not).inc()
        return RequestSeen(
            id=request.id,
            time_seconds=request.arrived_unix_seconds,
            pool=self._pool,
            model=asked.model,
            session=asked.session,
            prompt_tokens=prompt_tokens,
            max_tokens=asked.max_tokens,
            block_hashes=hashes,
            block_tokens=self._hasher.block_tokens if hashes else None,
            priority=asked.priority,
            pod=self._pod,
        )

    async def _tokens(self, asked: Asked, authorization: str | None) -> list[int]:
        if asked.multimodal() or asked.body.get("prompt_embeds"):
            raise NoTokens("multimodal" if asked.multimodal() else "prompt-embeds")
        if (ids := asked.token_ids()) is not None:
            return ids
        if self._tokenizer is not None and not asked.is_chat:
            return await self._tokenizer.token_ids(asked, authorization)
        if self._engine is None:
            raise NoTokens("no-chat-template")
        return await self._engine.token_ids(asked, authorization)

    async def _finish(
        self, request: Request, answer: Answer, reason: str | None, now_seconds: float, unix_seconds: float
    ) -> None:
        assert request.seen is not None
        if not await request.seen:
            return
        if answer.output_tokens is None and answer.finish_reason is None and reason is None:
            self._drop("no-output-tokens")
            return
        first = answer.first_token_seconds
        self._producer.put(
            RequestFinished(
                id=request.id,
                time_seconds=unix_seconds,
                pool=self._pool,
                output_tokens=answer.output_tokens or 0,
                ttft_seconds=None if first is None else max(0.0, first - request.arrived_seconds),
                e2e_seconds=max(0.0, now_seconds - request.arrived_seconds),
                cached_tokens=answer.cached_tokens,
                finish_reason=answer.finish_reason or reason,
            )
        )

    def _drop(self, reason: str) -> bool:
        self._metrics.dropped.labels(reason).inc()
        return False
