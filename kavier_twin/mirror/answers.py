"""The block hashes of answers, from the KV events of the engine that computed them.

A request record identifies the blocks of its prompt. The next turn of the session also finds the blocks of the answer
in the cache, which only the engine knows: it publishes each block with the hash of its parent when the block is full
(vLLM's v1/core/block_pool.py, `cache_full_blocks`). From the last block of the prompt the published chain leads through
the answer. A finish record without hashes is completed with that chain.

Prompts that begin alike may end in the same full block, so a block can have several children. A request takes the one
that was published when it should have filled its block, and that no other request took.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import astuple, dataclass
from typing import Any, Final, NamedTuple

from kavier_twin.telemetry import KvBlocksStored, KvEventBatch, RequestFinished, RequestSeen

REMEMBERED_SECONDS: Final = 900.0  # for which published blocks are remembered
MOST_BLOCKS: Final = 200_000
MOST_REQUESTS: Final = 10_000
SLACK_SECONDS: Final = 1.0  # between the clocks of the engine and of who wrote the records
_NEWER: Final = 0.1  # the weight of the newest request


class Prompt(NamedTuple):
    """What is needed of an arrival."""

    pod: str | None
    time_seconds: float
    tokens: int
    block_tokens: int
    hashes: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Stored:
    time_seconds: float
    pod: str
    parent: int
    block: int
    taken_by: str = ""  # the request whose block it is


class Answers:
    """Completes finish records with what engines published. Bounded in time and number."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()
        self._incomplete: OrderedDict[str, RequestFinished] = OrderedDict()  # waiting for an arrival or for events
        self._stored: deque[_Stored] = deque()
        self._children: dict[int, list[_Stored]] = {}  # by parent, in the order of time
        self._token_seconds = 0.0  # of recent requests, by token after the first

    def seen(self, record: RequestSeen) -> RequestFinished | None:
        """Take an arrival in. Returns the end that it helps to complete, if there is one."""
        if not record.block_hashes:
            return None
        self._prompts[record.id] = Prompt(
            record.pod, record.time_seconds, record.prompt_tokens, record.block_tokens or 0, record.block_hashes
        )
        if len(self._prompts) > MOST_REQUESTS:
            self._prompts.popitem(last=False)
        waiting = self._incomplete.pop(record.id, None)
        return None if waiting is None else self.finished(waiting)

    def finished(self, record: RequestFinished) -> RequestFinished:
        """The record, with the hashes of its answer as far as they are known."""
        if record.block_hashes or not self._stored:
            self._prompts.pop(record.id, None)
            return record
        prompt = self._prompts.get(record.id)
        hashes = () if prompt is None else self._chain(prompt, record)
        if prompt is not None and len(hashes) >= _full_blocks(prompt, record):
            del self._prompts[record.id]
        else:
            self._incomplete[record.id] = record
            if len(self._incomplete) > MOST_REQUESTS:
                self._incomplete.popitem(last=False)
        return record.model_copy(update={"block_hashes": hashes}) if hashes else record

    def take(self, batch: KvEventBatch) -> list[RequestFinished]:
        """Take events in. Returns the ends that they complete."""
        found = False
        for event in batch.events:
            if isinstance(event, KvBlocksStored) and (event.group, event.medium) == (0, "GPU"):
                parent = event.parent_hash
                for block in event.block_hashes:
                    if parent is not None:
                        stored = _Stored(batch.time_seconds, batch.pod, parent, block)
                        self._stored.append(stored)
                        self._children.setdefault(parent, []).append(stored)
                        found = True
                    parent = block
        self._forget(batch.time_seconds - REMEMBERED_SECONDS)
        if not found:
            return []
        completed = []
        for name in [name for name in self._incomplete if name in self._prompts]:
            waiting = self._incomplete.pop(name)
            if waiting.time_seconds > batch.time_seconds - 2.0 * SLACK_SECONDS:
                completed.append(self.finished(waiting))
            else:  # what the engine published of it has come
                del self._prompts[name]
        return [one for one in completed if one.block_hashes]

    def save(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "prompts": [[name, *prompt] for name, prompt in self._prompts.items()],
            "incomplete": [one.model_dump(mode="json", exclude_defaults=True) for one in self._incomplete.values()],
            "stored": [astuple(stored) for stored in self._stored],
            "token_seconds": self._token_seconds,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """What `save` gave."""
        for name, pod, time_seconds, tokens, block_tokens, hashes in saved["prompts"]:
            self._prompts[name] = Prompt(pod, time_seconds, tokens, block_tokens, tuple(hashes))
        for one in map(RequestFinished.model_validate, saved["incomplete"]):
            self._incomplete[one.id] = one
        self._token_seconds = saved["token_seconds"]
        for stored in (_Stored(*one) for one in saved["stored"]):
            self._stored.append(stored)
            self._children.setdefault(stored.parent, []).append(stored)

    def _chain(self, prompt: Prompt, record: RequestFinished) -> tuple[int, ...]:
        """The chain over prompt and answer as far as events tell it; empty where they tell nothing of the answer."""
        if not prompt.hashes or prompt.block_tokens <= 0:
            return ()
        begin, end = prompt.time_seconds - SLACK_SECONDS, record.time_seconds + SLACK_SECONDS
        token_seconds = self._learn(record)
        hashes = list(prompt.hashes)
        for number in range(len(hashes) + 1, _full_blocks(prompt, record) + 1):
            found = [
                one
                for one in self._children.get(hashes[-1], ())
                if begin <= one.time_seconds <= end
                and (not prompt.pod or not one.pod or one.pod == prompt.pod)
                and one.taken_by in ("", record.id)
            ]
            if not found:
                break
            tokens_after = prompt.tokens + record.output_tokens - number * prompt.block_tokens
            filled_seconds = record.time_seconds - tokens_after * token_seconds
            nearest = min(found, key=lambda one: abs(one.time_seconds - filled_seconds))
            nearest.taken_by = record.id
            hashes.append(nearest.block)
        return tuple(hashes) if len(hashes) > len(prompt.hashes) else ()

    def _learn(self, record: RequestFinished) -> float:
        """Seconds for a token of the answer, or of recent answers where the record does not say."""
        if record.e2e_seconds is None or record.ttft_seconds is None or record.output_tokens < 2:
            return self._token_seconds
        found = max(0.0, record.e2e_seconds - record.ttft_seconds) / (record.output_tokens - 1)
        self._token_seconds += _NEWER * (found - self._token_seconds)
        return found

    def _forget(self, before_seconds: float) -> None:
        while self._stored and (self._stored[0].time_seconds < before_seconds or len(self._stored) > MOST_BLOCKS):
            stored = self._stored.popleft()
            children = self._children[stored.parent]
            children.remove(stored)
            if not children:
                del self._children[stored.parent]


def _full_blocks(prompt: Prompt, record: RequestFinished) -> int:
    """Blocks of which every token went through the model: the last output token does not."""
    return (prompt.tokens + record.output_tokens - 1) // prompt.block_tokens if prompt.block_tokens > 0 else 0
