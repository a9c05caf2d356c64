"""Makes the records of requests, and of their text keeps only hashes.

An arrival leaves at once: complete where its prompt is tokenised within a moment, else with an estimated length, and
a second record completes it once the tokens are known. The same holds for the end and the hashes of the answer. So
neither waits for a tokenizer that an overload slows down.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pydantic import ValidationError

from kavier_twin.tap.agreement import Agreement, Estimate
from kavier_twin.tap.answer_tokens import known_tokens, shared
from kavier_twin.tap.bodies import MOST_BYTES_TOGETHER
from kavier_twin.tap.engine import Engine
from kavier_twin.tap.exchanges import ChoiceEnd, End, Passed, Request
from kavier_twin.tap.hashing import BlockHasher, ExtraKeys
from kavier_twin.tap.metrics import TapMetrics
from kavier_twin.tap.producer import Producer
from kavier_twin.tap.prompts import MEDIA_TOKENS, Asked, NoTokens, NotReadable, Tokenizer
from kavier_twin.telemetry import RequestFinished, RequestSeen

AT_ONCE_SECONDS: Final = 0.05  # that a record waits for tokens, before it leaves without
_THREADS: Final = 4  # prompts in the hands of threads
_MOST_PATHS: Final = 50  # that are counted apart

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tokens:
    """The ids of each prompt, and their block hashes, or why there are none.

    `certain`: the engine itself or its client gave the ids.
    """

    ids: list[Sequence[int]] = field(repr=False)
    hashes: list[tuple[int, ...]] | None
    why_not: str | None
    extra: ExtraKeys = field(repr=False)
    certain: bool


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
        self.engine = engine
        self._pool = pool
        self._pod = pod
        self._agreement = Agreement()
        self._estimate = Estimate()
        self._waiting_bytes = 0
        self._threads = asyncio.Semaphore(_THREADS)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._live: dict[str, asyncio.Future[End | None]] = {}  # those whose end is to come
        self._paths: set[str] = set()

    def take(self, told: Request | Passed) -> None:
        """A request began, or an exchange is over."""
        if isinstance(told, Request):
            end = asyncio.get_running_loop().create_future() if told.will_end else None
            if end is not None:
                self._live[told.id] = end
            self._start(self._record(told, end))
            return
        self._metrics.requests.labels(told.outcome).inc()
        if told.added_seconds is not None:
            self._metrics.added.observe(told.added_seconds)
        if told.dropped is not None:
            self._drop(told.dropped)
        if told.unrecorded is not None:
            self._not_recorded(told.unrecorded)
        if told.end is not None and (live := self._live.pop(told.end.id, None)) is not None:
            live.set_result(told.end)

    async def drain(self, seconds: float) -> None:
        """Wait for what is being made, for `seconds` at most; what is left then is counted as dropped."""
        for live in self._live.values():
            live.set_result(None)  # no end is to come any more
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

    async def _record(self, request: Request, ended: asyncio.Future[End | None] | None) -> None:
        """All records of one request."""
        size = len(request.body)
        if self._waiting_bytes + size > MOST_BYTES_TOGETHER:
            self._drop("too-busy")
            return
        path = request.path
        try:
            self._waiting_bytes += size
            try:
                async with self._threads:
                    asked = await asyncio.to_thread(
                        Asked.of, request.path, request.body, request.session, request.priority
                    )
            finally:
                self._waiting_bytes -= size
            recording = _Recording(self, request, asked)
            del request, asked  # which last until they are tokenised, not until the answer ends
            await recording.run(ended)
        except NotReadable as error:
            self._drop(str(error))
            if str(error) == "background":
                self._not_recorded(path)
        except Exception as error:  # its text might hold a prompt
            log.error("no record of a request: %s", type(error).__name__)
            self._drop("fault")

    def _drop(self, reason: str) -> None:
        self._metrics.dropped.labels(reason).inc()

    def _not_recorded(self, path: str) -> None:
        """A path that generates and makes no record: counted, and logged once."""
        path = path[:200]
        if path not in self._paths:
            if len(self._paths) >= _MOST_PATHS:
                path = "other"
            if path not in self._paths:
                self._paths.add(path)
                log.warning("requests of %r generate, and make no records: the twin does not see their load", path)
        self._metrics.unrecorded.labels(path).inc()


class _Recording:
    """One request, and its records."""

    def __init__(self, recorder: Recorder, request: Request, asked: Asked) -> None:
        self._of = recorder
        self._request = request
        self._asked = asked
        self._characters = asked.characters()
        self._kind = (asked.kind, asked.model, asked.uncertain)
        self._doubted = recorder._agreement.doubted(self._kind, uncertain=bool(asked.uncertain))
        self._estimated = self._estimate()
        count = len(asked.prompts) * asked.choices
        self._ids = [request.id] if count == 1 else [f"{request.id}-{number}" for number in range(count)]

    async def run(self, ended: asyncio.Future[End | None] | None) -> None:
        """Until the last record is made."""
        making = self._of._start(self._tokens())
        self._of._waiting_bytes += len(self._request.body)
        making.add_done_callback(lambda _: self._forget())
        waits_for: set[asyncio.Future[Any]] = {making} if ended is None else {making, ended}
        await asyncio.wait(waits_for, timeout=AT_ONCE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if ended is not None and ended.done():
            if (soon := ended.result()) is not None and soon.refused:
                making.cancel()
                return  # at once: there is no record that would need an end
            await asyncio.wait({making}, timeout=AT_ONCE_SECONDS)
        whole = self._see_if_known(making)
        if not whole:
            tokens = making.result() if making.done() and making.exception() is None else None
            self._see(self._estimated if tokens is None else [len(ids) for ids in tokens.ids], "estimate", None)
            await asyncio.wait(waits_for, return_when=asyncio.FIRST_COMPLETED)
            whole = self._see_if_known(making)
        end = None if ended is None else await ended
        if end is not None:
            await self._end(making, end, whole=whole)
        elif not whole:
            self._see_without_end(await self._settled(making))

    async def _end(self, making: asyncio.Task[_Tokens], end: End, *, whole: bool) -> None:
        """The answer ended. `whole` tells that the arrival's record needs no other that completes it."""
        if end.refused:
            making.cancel()
            self._finish(end, None)
            return
        answers = self._of._start(self._answers(making, end))
        await asyncio.wait({answers}, timeout=AT_ONCE_SECONDS)
        at_once = answers.done()
        if not at_once:
            self._finish(end, None)
        doubtful = self._check(await self._settled(making), end, whole=whole)
        hashes = [()] * len(self._ids) if doubtful else await answers
        self._finish(end, hashes, again=not at_once)

    def _forget(self) -> None:
        """The prompts, which are tokenised or never will be."""
        self._of._waiting_bytes -= len(self._request.body)
        self._request = replace(self._request, body=b"")
        self._asked = replace(self._asked, body={}, prompts=[None] * len(self._asked.prompts))

    # The arrival.

    async def _tokens(self) -> _Tokens:
        """Raises NoTokens."""
        asked, request, recorder = self._asked, self._request, self._of
        if (why := asked.why_no_tokens()) is not None:
            raise NoTokens(why)
        ids, certain = await self._token_ids()
        adapter = why_not = None
        if recorder.engine is not None:
            try:
                adapter = await recorder.engine.adapter(asked.model, request.path, request.authorization)
            except NoTokens:
                why_not = "no-models"  # a name that may be an adapter's
        recorder._estimate.told(self._characters, sum(map(len, ids)))
        extra = ExtraKeys(adapter, asked.salt)
        hashes = None if why_not else [await self._hashes(each, extra) for each in ids]
        return _Tokens(ids, hashes, why_not, extra, certain)

    async def _token_ids(self) -> tuple[list[Sequence[int]], bool]:
        """The ids of each prompt, and whether they are certain. Raises NoTokens."""
        asked, request, engine = self._asked, self._request, self._of.engine
        if (given := asked.token_ids()) is not None:
            return [asked.truncated(each) for each in given], True
        if engine is not None and asked.uncertain:
            rendered = await engine.rendered(request.path, request.body, request.authorization)
            if rendered is not None and len(rendered) == len(asked.prompts):
                return list(rendered), True
        return [asked.truncated(each) for each in await self._tokenized()], False

    async def _tokenized(self) -> list[list[int]]:
        asked, request, recorder = self._asked, self._request, self._of
        if recorder._tokenizer is not None and (recorder.engine is None or recorder._tokenizer.knows(asked)):
            async with recorder._threads:
                return await asyncio.to_thread(recorder._tokenizer.token_ids, asked)
        if recorder.engine is None:
            raise NoTokens("no-tokenizer")
        return await recorder.engine.token_ids(asked, request.path, request.authorization)

    async def _hashes(self, ids: Sequence[int], extra: ExtraKeys) -> tuple[int, ...]:
        async with self._of._threads:
            return await asyncio.to_thread(self._of._hasher.hashes, ids, extra)

    def _see_if_known(self, making: asyncio.Task[_Tokens]) -> bool:
        """Make the arrival's record if its tokens are there and not in doubt. Returns whether it did."""
        if not making.done() or making.cancelled() or making.exception() is not None:
            return False
        tokens = making.result()
        if self._doubted and not tokens.certain:
            return False
        self._see_tokens(tokens)
        return True

    def _see_tokens(self, tokens: _Tokens) -> None:
        if tokens.why_not is not None:
            self._without_hashes(tokens.why_not)
        self._see([len(ids) for ids in tokens.ids], "tokenizer", tokens.hashes)

    def _see_without_end(self, tokens: _Tokens | str) -> None:
        """Complete the arrival of a request whose end nobody tells."""
        if isinstance(tokens, str):
            self._without_hashes(tokens)
        elif self._doubted and not tokens.certain:  # no count of the engine will come
            self._without_hashes("unconfirmed")
            self._see([len(ids) for ids in tokens.ids], "tokenizer", None)
        else:
            self._see_tokens(tokens)

    async def _settled(self, making: asyncio.Task[_Tokens]) -> _Tokens | str:
        """The tokens, or the reason why there are none."""
        try:
            return await making
        except NoTokens as error:
            return str(error)
        except Exception as error:  # its text might hold a prompt
            log.error("a prompt cannot be tokenised: %s", type(error).__name__)
            return "fault"

    def _check(self, tokens: _Tokens | str, end: End, *, whole: bool) -> bool:
        """Compare with the engine's count, and complete the arrival. Returns whether the engine contradicts."""
        counted = end.prompt_tokens or None
        if isinstance(tokens, str):
            self._without_hashes(tokens)
            if counted is not None:
                self._of._estimate.told(self._characters, counted)
                self._see(shared(counted, self._estimated), "usage", None)
            return True
        lengths = [len(ids) for ids in tokens.ids]
        if counted is not None:
            self._of._agreement.told(self._kind, agrees=counted == sum(lengths))
            if counted != sum(lengths):
                self._without_hashes("usage-contradicts")
                self._of._estimate.told(self._characters, counted)
                self._see(shared(counted, lengths), "usage", None)
                return True
        unconfirmed = self._doubted and counted is None and not tokens.certain
        if unconfirmed:
            self._without_hashes("unconfirmed")
            self._see(lengths, "tokenizer", None)
        elif not whole:
            self._see_tokens(tokens)
        return unconfirmed

    def _estimate(self) -> list[int]:
        """The tokens of each prompt, before they are counted."""
        asked = self._asked
        if (ids := asked.token_ids()) is not None:
            return [len(each) for each in ids]
        total = self._of._estimate.tokens(self._characters) + MEDIA_TOKENS * asked.media()
        several = len(asked.prompts) > 1
        return shared(total, [len(str(prompt)) if several else 1 for prompt in asked.prompts])

    def _see(self, lengths: Sequence[int], source: str, hashes: Sequence[tuple[int, ...]] | None) -> None:
        """Make the records of an arrival, one for each request that the engine makes of it."""
        asked = self._asked
        for number, id in enumerate(self._ids):
            prompt = number // asked.choices
            try:
                seen = RequestSeen(
                    id=id,
                    time_seconds=self._request.arrived_unix_seconds,
                    pool=self._of._pool,
                    model=asked.model,
                    session=asked.session,
                    prompt_tokens=max(1, lengths[prompt]),
                    prompt_tokens_from=source,  # type: ignore[arg-type]
                    max_tokens=asked.max_tokens,
                    block_hashes=() if hashes is None else hashes[prompt],
                    block_tokens=None if hashes is None else self._of._hasher.block_tokens,
                    priority=asked.priority,
                    pod=self._of._pod,
                )
            except ValidationError:
                self._of._drop("bad-value")
                continue
            self._of._producer.put(seen)

    def _without_hashes(self, reason: str) -> None:
        self._of._metrics.without_hashes.labels(reason).inc()

    # The end.

    def _choices(self, end: End) -> list[ChoiceEnd]:
        nothing = ChoiceEnd()
        return [end.choices[number] if number < len(end.choices) else nothing for number in range(len(self._ids))]

    def _output_tokens(self, end: End) -> list[int | None]:
        """Of each choice."""
        choices = self._choices(end)
        if len(choices) == 1 or end.output_tokens is None:
            return [end.output_tokens if len(choices) == 1 else choice.tokens for choice in choices]
        counts = [
            choice.tokens if choice.tokens is not None else len(choice.token_ids or ()) or choice.chunks
            for choice in choices
        ]
        return list(counts if sum(counts) == end.output_tokens else shared(end.output_tokens, counts))

    async def _answers(self, making: asyncio.Task[_Tokens], end: End) -> list[tuple[int, ...]]:
        """The hashes over prompt and answer of each choice; none where the answer adds no block that is known."""
        tokens = await self._settled(making)
        choices, outputs = self._choices(end), self._output_tokens(end)
        if isinstance(tokens, str):
            return [()] * len(choices)
        found = []
        for number, (choice, output) in enumerate(zip(choices, outputs, strict=True)):
            prompt = tokens.ids[number // self._asked.choices]
            size = self._of._hasher.block_tokens
            hashes: tuple[int, ...] = ()
            if output and (len(prompt) + output) // size > len(prompt) // size:
                answer = list(await self._answer_ids(choice, output))[:output]
                if (len(prompt) + len(answer)) // size > len(prompt) // size:
                    hashes = await self._hashes([*prompt, *answer], tokens.extra)
            found.append(hashes)
        return found

    async def _answer_ids(self, choice: ChoiceEnd, output_tokens: int) -> Sequence[int]:
        """The first tokens of an answer, as far as they are known."""
        recorder, request = self._of, self._request
        if choice.token_ids is not None:
            return choice.token_ids
        text = "".join(choice.pieces or ())
        if not text:
            return ()
        ends: list[int] | None = None
        try:
            if recorder._tokenizer is not None:
                async with recorder._threads:
                    ids, ends = await asyncio.to_thread(recorder._tokenizer.text_ids, text)
            elif recorder.engine is not None:
                ids = await recorder.engine.text_ids(text, request.path, request.authorization)
            else:
                return ()
        except NoTokens:
            return ()
        return ids[: known_tokens(ids, ends, choice, output_tokens)]

    def _finish(self, end: End, hashes: Sequence[tuple[int, ...]] | None, *, again: bool = False) -> None:
        """Make the records of an end, one for each choice; `again` those that complete an earlier one."""
        choices = self._choices(end)
        for number, (id, choice, output) in enumerate(zip(self._ids, choices, self._output_tokens(end), strict=True)):
            reason = choice.finish_reason or end.finish_reason
            if again and not (hashes and hashes[number]):
                continue
            if output is None and reason is None:
                self._of._drop("no-output-tokens")
                continue
            e2e_seconds = end.e2e_seconds if choice.end_seconds is None or len(choices) == 1 else choice.end_seconds
            finished = RequestFinished(
                id=id,
                time_seconds=end.unix_seconds - (end.e2e_seconds - e2e_seconds),
                pool=self._of._pool,
                output_tokens=output or 0,
                ttft_seconds=choice.first_seconds,
                e2e_seconds=e2e_seconds,
                cached_tokens=end.cached_tokens if len(choices) == 1 else None,
                finish_reason=reason,
                block_hashes=hashes[number] if hashes else (),
            )
            self._of._producer.put(finished)
