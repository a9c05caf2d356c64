"""What the tap asks of the engines itself, always outside the path of a request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any, Final

import aiohttp

from kavier_twin.tap.hashing import Adapter
from kavier_twin.tap.paths import prefix_of
from kavier_twin.tap.prompts import Asked, NoTokens

AT_ONCE: Final = 4  # questions; more would take the engine's front end from its clients
_LIMIT: Final = aiohttp.ClientTimeout(total=30.0)
_MODELS_KEPT_SECONDS: Final = 60.0
_MODELS_AGAIN_SECONDS: Final = 5.0  # for a model that was not listed
_ABSENT_SECONDS: Final = 300.0  # after which the tap asks again for what the engine did not have
_ABSENT_STATUSES: Final = frozenset((403, 404, 405, 501))


class Engine:
    """Asks a vLLM for token ids and models, with the authorization of the request that it asks for.

    Behind an ingress the paths of `/tokenize` and `/v1/models` may have the prefix of the request or none: both are
    tried, and what answered is kept.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._at_once = asyncio.Semaphore(AT_ONCE)
        self._adapters: dict[str, Adapter | None] = {}  # of every model listed
        self._listed_seconds = -_MODELS_KEPT_SECONDS
        self._bare: set[str] = set()  # prefixes that the engine's own paths do not have
        self._absent_until: dict[str, float] = {}

    async def token_ids(self, asked: Asked, path: str, authorization: str | None) -> list[list[int]]:
        """The ids of each prompt. Raises NoTokens."""
        prefix = prefix_of(path)
        answers = [
            await self._ask("POST", prefix, "/tokenize", authorization, "tokens", json=question)
            for question in asked.for_tokenize()
        ]
        return [_ids(answer.get("tokens")) for answer in answers]

    async def text_ids(self, text: str, path: str, authorization: str | None) -> list[int]:
        """The ids of an answer's text. Raises NoTokens."""
        question = {"prompt": text, "add_special_tokens": False}
        answer = await self._ask("POST", prefix_of(path), "/tokenize", authorization, "tokens", json=question)
        return _ids(answer.get("tokens"))

    async def rendered(self, path: str, body: bytes, authorization: str | None) -> list[list[int]] | None:
        """The ids of each prompt as the engine itself renders the request, from vLLM's `.../render`.

        None where the engine has no such path, as without `--enable-scale-out`, or will not render this request.
        """
        place = path.rstrip("/") + "/render"
        if time.monotonic() < self._absent_until.get(place, 0.0):
            return None
        try:
            status, answer = await self._send("POST", place, authorization, data=body, content_type="application/json")
        except NoTokens:
            return None
        several = answer if isinstance(answer, list) else [answer]
        if status != 200 or not all(isinstance(each, Mapping) and each.get("token_ids") for each in several):
            if status in _ABSENT_STATUSES or status == 200:
                if len(self._absent_until) > 1_000:
                    self._absent_until.clear()
                self._absent_until[place] = time.monotonic() + _ABSENT_SECONDS
            return None
        return [_ids(each["token_ids"]) for each in several]

    async def adapter(self, model: str | None, path: str, authorization: str | None) -> Adapter | None:
        """The LoRA adapter of that name: vLLM lists those with a `parent`. Raises NoTokens."""
        age_seconds = time.monotonic() - self._listed_seconds
        kept_seconds = _MODELS_KEPT_SECONDS if model is None or model in self._adapters else _MODELS_AGAIN_SECONDS
        if age_seconds >= kept_seconds:
            answer = await self._ask("GET", prefix_of(path), "/v1/models", authorization, "data")
            cards = answer.get("data")
            self._adapters = {
                str(card.get("id")): Adapter(str(card.get("id")), str(card.get("root"))) if card.get("parent") else None
                for card in (cards if isinstance(cards, list) else ())
                if isinstance(card, dict)
            }
            self._listed_seconds = time.monotonic()
        return self._adapters.get(model or "")

    async def _ask(
        self, method: str, prefix: str, path: str, authorization: str | None, key: str, **content: Any
    ) -> Mapping[str, Any]:
        """The answer that has the key, from the path behind the prefix or without. Raises NoTokens."""
        for tried in dict.fromkeys(("",) if prefix in self._bare else (prefix, "")):
            status, answer = await self._send(method, tried + path, authorization, **content)
            if status == 200 and isinstance(answer, Mapping) and key in answer:
                if tried != prefix and len(self._bare) < 1_000:
                    self._bare.add(prefix)
                return answer
        raise NoTokens("tokenize-failed")

    async def _send(
        self, method: str, path: str, authorization: str | None, *, content_type: str | None = None, **content: Any
    ) -> tuple[int, Any]:
        headers = {"Authorization": authorization} if authorization else {}
        if content_type:
            headers["Content-Type"] = content_type
        try:
            async with (
                self._at_once,
                self._session.request(method, self._url + path, headers=headers, timeout=_LIMIT, **content) as response,
            ):
                return response.status, json.loads(await response.read()) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError) as error:
            raise NoTokens("tokenize-failed") from error


def _ids(tokens: Any) -> list[int]:
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise NoTokens("tokenize-failed")
    return tokens
