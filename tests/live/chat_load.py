"""Clients that chat: sessions with shared system prompts and several turns, streamed or not; a few leave early."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

import aiohttp

from live.tiny_model import words

_SYSTEM_WORDS = (60, 110, 180, 260, 90, 340)
_LEAVING = 0.04
_LONGEST_CHAT_CHARACTERS = 9_000


@dataclass
class Seen:
    """What a client saw of one request. Times are Unix seconds; `id` is the answer's, empty if none came."""

    began: float
    id: str = ""
    status: int = 0
    left: bool = False
    error: str = ""
    ttft_seconds: float | None = None
    e2e_seconds: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether the whole answer came."""
        return self.status == 200 and not self.left and not self.error


class ChatLoad:
    """Sessions that arrive at `sessions_per_second` times a factor of time, in a thread of its own.

    `shape` holds (seconds, factor) pairs between which the factor is interpolated; the load ends with the last, and the
    thread when every answer came. `addresses` may change meanwhile: a new session takes the next of them.
    """

    def __init__(
        self, addresses: list[str], sessions_per_second: float, shape: Sequence[tuple[float, float]], seed: int = 1
    ) -> None:
        self.addresses = addresses
        self.seen: list[Seen] = []
        self.began = time.time()
        self._rate, self._shape, self._rng = sessions_per_second, shape, random.Random(seed)
        self._words = words()
        self._cumulative = list(itertools.accumulate(1 / (rank + 1) ** 0.5 for rank in range(len(self._words))))
        self._systems = [self._text(count) for count in _SYSTEM_WORDS]
        self._stopping = False
        self._thread = Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """How long new sessions arrive."""
        return self._shape[-1][0]

    def stop(self) -> None:
        """Let no new session and no new turn begin, and wait for the answers under way."""
        self._stopping = True
        self.join()

    def join(self) -> None:
        self._thread.join()

    def _factor(self, at: float) -> float:
        for (start, low), (end, high) in itertools.pairwise(self._shape):
            if at <= end:
                return low + (high - low) * (at - start) / (end - start)
        return self._shape[-1][1]

    def _text(self, count: int) -> str:
        return " ".join(self._rng.choices(self._words, cum_weights=self._cumulative, k=count))

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http, asyncio.TaskGroup() as tasks:
            for number in itertools.count():
                rate = max(self._factor(time.time() - self.began) * self._rate, 1e-3)
                await asyncio.sleep(min(self._rng.expovariate(rate), 2.0))
                if self._stopping or time.time() - self.began >= self.seconds:
                    return
                tasks.create_task(self._session(http, self.addresses[number % len(self.addresses)]))

    async def _session(self, http: aiohttp.ClientSession, address: str) -> None:
        system = self._rng.choices(self._systems, [1 / (rank + 1) for rank in range(len(self._systems))])[0]
        messages = [{"role": "system", "content": system}]
        for _ in range(1 + min(int(self._rng.expovariate(1 / 1.5)), 6)):
            messages.append({"role": "user", "content": self._text(int(self._rng.lognormvariate(3.0, 0.7)) + 3)})
            seen, answer = await self._turn(http, address, messages)
            if not seen.answered or self._stopping:
                return
            messages.append({"role": "assistant", "content": answer})
            if sum(len(message["content"]) for message in messages) > _LONGEST_CHAT_CHARACTERS:
                return
            await asyncio.sleep(self._rng.expovariate(1 / 5))

    async def _turn(
        self, http: aiohttp.ClientSession, address: str, messages: list[dict[str, str]]
    ) -> tuple[Seen, str]:
        tokens = max(4, min(int(self._rng.lognormvariate(3.9, 0.55)), 200))
        mode = self._rng.choices(("usage", "stream", "plain"), (0.60, 0.15, 0.25))[0]
        body: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": tokens, "ignore_eos": True}
        if mode != "plain":
            body["stream"] = True
        if mode == "usage":
            body["stream_options"] = {"include_usage": True}
        leaves = self._rng.uniform(0.1, 2.0) if self._rng.random() < _LEAVING else None
        seen = Seen(time.time())
        parts: list[str] = []
        try:
            await asyncio.wait_for(self._ask(http, address, body, seen, parts), leaves)
        except TimeoutError:
            seen.left = True
        except aiohttp.ClientError as error:
            seen.error = repr(error)
        seen.e2e_seconds = time.time() - seen.began
        self.seen.append(seen)
        return seen, "".join(parts)

    @staticmethod
    async def _ask(
        http: aiohttp.ClientSession, address: str, body: dict[str, Any], seen: Seen, parts: list[str]
    ) -> None:
        async with http.post(f"{address}/v1/chat/completions", json=body) as answer:
            seen.status = answer.status
            if answer.status != 200:
                return
            if "stream" not in body:
                content = await answer.json()
                seen.id = content["id"]
                parts.append(content["choices"][0]["message"]["content"] or "")
                return
            async for line in answer.content:
                if not line.startswith(b"data: ") or b"[DONE]" in line:
                    continue
                chunk = json.loads(line[6:])
                seen.id = chunk.get("id", seen.id)
                for choice in chunk.get("choices", []):
                    text = choice.get("delta", {}).get("content") or ""
                    if text and seen.ttft_seconds is None:
                        seen.ttft_seconds = time.time() - seen.began
                    parts.append(text)
