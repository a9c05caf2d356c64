"""Makes the two records of a request, and of its text keeps only hashes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from pydantic import ValidationError

from kavier_twin.tap.bodies import MOST_BYTES_TOGETHER
from kavier_twin.tap.engine import Engine
from kavier_twin.tap.exchanges import End, Passed, Request
from kavier_twin.tap.hashing import BlockHasher
from kavier_twin.tap.metrics import TapMetrics
from kavier_twin.tap.producer import Producer
from kavier_twin.tap.prompts import Asked, NoTokens, NotReadable, Tokenizer
from kavier_twin.telemetry import RequestFinished, RequestSeen

_AT_ONCE: Final = 4  # prompts in the hands of threads

log = logging.getLogger(__name__)


class Recorder:
    """Turns requests and their ends into records for `producer`. Runs in an event loop."""

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
        self._threads = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._live: dict[str, tuple[asyncio.Task[bool], asyncio.Future[End]]] = {}  # those whose end is to come

    def take(self, told: Request | Passed) -> None:
        """A request began, or an exchange is over."""
        if isinstance(told, Request):
            end = asyncio.get_running_loop().create_future() if told.will_end else None
            task = self._start(self._see(told, end))
            if end is not None:
                self._live[told.id] = (task, end)
            return
        self._metrics.requests.labels(told.outcome).inc()
        if told.added_seconds is not None:
            self._metrics.added.observe(told.added_seconds)
        if told.dropped is not None:
            self._drop(told.dropped)
        if told.end is not None and (live := self._live.pop(told.end.id, None)) is not None:
            live[1].set_result(told.end)
            self._start(self._finish(live[0], told.end))

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

    async def _see(self, request: Request, end: asyncio.Future[End] | None) -> bool:
        """Make the first record. Returns whether there is one."""
        size = len(request.body)
        if self._waiting_bytes + size > MOST_BYTES_TOGETHER:
            return self._drop("too-busy")
        self._waiting_bytes += size
        try:
            facts, tokens, hashes, why_not = await self._read(request)
        except NotReadable as error:
            return self._drop(str(error))
        except Exception as error:  # its text might hold a prompt
            log.error("no record of a request: %s", type(error).__name__)
            return self._drop("fault")
        finally:
            self._waiting_bytes -= size
            del request
        if tokens is None and end is not None:
            # What is left is the engine's own count, at the end of the answer; of a stream only if the client wants it.
            tokens = (await end).prompt_tokens
        if tokens is None:
            return self._drop(why_not or "fault")
        if why_not is not None:
            self._metrics.without_hashes.labels(why_not).inc()
        try:
            block_tokens = self._hasher.block_tokens if hashes else None
            seen = RequestSeen(prompt_tokens=tokens, block_hashes=hashes, block_tokens=block_tokens, **facts)
        except ValidationError:
            return self._drop("bad-value")
        self._producer.put(seen)
        return True

    async def _read(self, request: Request) -> tuple[dict[str, Any], int | None, tuple[int, ...], str | None]:
        """What a record needs beside tokens and hashes, those where they are known, and why there are no hashes.

        Raises NotReadable.
        """
        async with self._threads:
            asked = await asyncio.to_thread(Asked.of, request.path, request.body, request.session)
        facts = {
            "id": request.id,
            "time_seconds": request.arrived_unix_seconds,
            "pool": self._pool,
            "model": asked.model,
            "session": asked.session,
            "max_tokens": asked.max_tokens,
            "priority": asked.priority,
            "pod": self._pod,
        }
        try:
            tokens = await self._tokens(asked, request.authorization)
            why_not = asked.without_hashes()
            if why_not is None and self._engine and await self._engine.is_adapter(asked.model, request.authorization):
                why_not = "lora"
        except NoTokens as error:
            return facts, None, (), str(error)
        if why_not is not None:
            return facts, len(tokens), (), why_not
        async with self._threads:
            return facts, len(tokens), await asyncio.to_thread(self._hasher.hashes, tokens), None

    async def _tokens(self, asked: Asked, authorization: str | None) -> Sequence[int]:
        if asked.multimodal() or asked.body.get("prompt_embeds"):
            raise NoTokens("multimodal" if asked.multimodal() else "prompt-embeds")
        if (ids := asked.token_ids()) is not None:
            return ids
        if self._tokenizer is not None and (self._engine is None or self._tokenizer.knows(asked)):
            async with self._threads:
                return await asyncio.to_thread(self._tokenizer.token_ids, asked)
        if self._engine is None:
            raise NoTokens("no-tokenizer")
        return await self._engine.token_ids(asked, authorization)

    async def _finish(self, seen: asyncio.Task[bool], end: End) -> None:
        """Make the second record, once the first is made."""
        if not await seen:
            return
        if end.output_tokens is None and end.finish_reason is None:
            self._drop("no-output-tokens")
            return
        finished = RequestFinished(
            id=end.id,
            time_seconds=end.unix_seconds,
            pool=self._pool,
            output_tokens=end.output_tokens or 0,
            ttft_seconds=end.ttft_seconds,
            e2e_seconds=end.e2e_seconds,
            cached_tokens=end.cached_tokens,
            finish_reason=end.finish_reason,
        )
        self._producer.put(finished)

    def _drop(self, reason: str) -> bool:
        self._metrics.dropped.labels(reason).inc()
        return False
