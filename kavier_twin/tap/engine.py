"""What the tap asks of the engines itself, always outside the path of a request."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import aiohttp

from kavier_twin.tap.prompts import Asked, NoTokens

AT_ONCE: Final = 4  # questions; more would take the engine's front end from its clients
_LIMIT: Final = aiohttp.ClientTimeout(total=30.0)
_MODELS_KEPT_SECONDS: Final = 60.0


class Engine:
    """Asks `/tokenize` and `/v1/models` of a vLLM, with the authorization of the request that it asks for."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._at_once = asyncio.Semaphore(AT_ONCE)
        self._adapters: frozenset[str] = frozenset()
        self._adapters_until_seconds = 0.0

    async def token_ids(self, asked: Asked, authorization: str | None) -> list[int]:
        """The ids of the prompt. Raises NoTokens."""
        answer = await self._ask("POST", "/tokenize", authorization, json=asked.for_tokenize())
        tokens = answer.get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
            raise NoTokens("tokenize-failed")
        return tokens

    async def is_adapter(self, model: str | None, authorization: str | None) -> bool:
        """Whether the model is a LoRA adapter: vLLM lists those with a `parent`. Raises NoTokens."""
        if time.monotonic() >= self._adapters_until_seconds:
            listed = (await self._ask("GET", "/v1/models", authorization)).get("data")
            cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
            self._adapters = frozenset(str(card.get("id")) for card in cards if card.get("parent"))
            self._adapters_until_seconds = time.monotonic() + _MODELS_KEPT_SECONDS
        return model in self._adapters

    async def _ask(self, method: str, path: str, authorization: str | None, **content: Any) -> dict[str, Any]:
        headers = {"Authorization": authorization} if authorization else {}
        try:
            async with (
                self._at_once,
                self._session.request(method, self._url + path, headers=headers, timeout=_LIMIT, **content) as response,
            ):
                answer = await response.json(content_type=None) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise NoTokens("tokenize-failed") from error
        if not isinstance(answer, dict):
            raise NoTokens("tokenize-failed")
        return answer
