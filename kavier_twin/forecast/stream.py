"""What is to be learnt from the recent requests: which were next turns of which, and what they shared.

Content tells it. Keys are chained, so two requests with a key in common share everything up to it, and what a request
shares with any before it ends at one key, its deepest known one. If the request that had this key last is wholly
contained, prompt to the last full key, this one is its next turn; otherwise it is a first turn that shares a prefix
(a system prompt). Session labels, where given, decide the rest: turns of different sessions are not turns of one, and
without labels the earlier request must have had content of its own to be known by.

The older half of the window serves to know what came before; the newer half is what futures are drawn from. Without
that, a request whose past lies before the window would pass for one without a past.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.workload import Workload

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """Recent requests, rows in order of arrival; a key covers `recent.hash_tokens` tokens."""

    recent: Workload
    full_keys: Integers  # [n] keys that cover their hash block whole (the last one of a prompt may not)
    known: Integers  # [n] leading keys that an earlier request had
    previous: Integers  # [n] the row whose next turn this is, -1: a first turn
    first_turns: Integers  # rows to draw first turns from: finished
    next_turns: Integers  # rows to draw next turns from: finished
    next_turn_ratio: float  # next turns per request
    open_rows: Integers  # rows without a next turn yet
    covers_output: bool  # chains run over prompt and output

    def chain(self, row: int) -> npt.NDArray[np.uint64]:
        """The keys of a request's full hash blocks."""
        start = int(self.recent.chain_starts[row])
        return self.recent.chain[start : start + int(self.full_keys[row])]


def read_stream(recent: Workload) -> Stream:
    """Understand recent requests, sorted by arrival; `output` 0 marks those still in flight."""
    n = recent.index.size
    hash_tokens = np.maximum(recent.hash_tokens, 1)
    full_keys = np.minimum(np.diff(recent.chain_starts), recent.covered // hash_tokens)
    prompt_keys = np.minimum(full_keys, recent.prompt // hash_tokens)
    known, candidate = _known(recent, prompt_keys)
    row = np.maximum(candidate, 0)
    contained = (known >= prompt_keys[row]) & (recent.prompt > recent.prompt[row])
    labelled = (recent.session >= 0) & (recent.session[row] >= 0)
    own_content = prompt_keys[row] > known[row]
    same_session = np.where(labelled, recent.session == recent.session[row], own_content)
    previous = np.where((candidate >= 0) & contained & same_session, candidate, -1)
    finished = recent.output > 0
    newer = np.arange(n) >= n // 2
    continued = np.zeros(n, bool)
    continued[previous[previous >= 0]] = True
    first = finished & (previous < 0)
    return Stream(
        recent=recent,
        full_keys=full_keys,
        known=known,
        previous=previous,
        first_turns=_first_with_any(first & newer, first, finished),
        next_turns=np.flatnonzero(finished & newer & (previous >= 0)),
        next_turn_ratio=float((previous[newer] >= 0).mean()) if n else 0.0,
        open_rows=np.flatnonzero(~continued & (recent.hash_tokens > 0)),
        covers_output=bool((recent.covered > recent.prompt).any()),
    )


def _first_with_any(*choices: npt.NDArray[np.bool_]) -> Integers:
    return np.flatnonzero(next((choice for choice in choices if choice.any()), choices[-1]))


def _known(recent: Workload, prompt_keys: Integers) -> tuple[Integers, Integers]:
    """How many leading keys of each prompt an earlier request had, and the last row before it that had the deepest."""
    n = recent.index.size
    rows = np.repeat(np.arange(n), np.diff(recent.chain_starts))
    order = np.argsort(recent.chain, kind="stable")  # equal keys in order of arrival
    earlier = np.full(rows.size, -1)
    same = recent.chain[order[1:]] == recent.chain[order[:-1]]
    earlier[order[1:][same]] = rows[order[:-1][same]]
    known = np.minimum(np.bincount(rows[earlier >= 0], minlength=n), prompt_keys)
    deepest = np.where(known > 0, recent.chain_starts[:-1] + known - 1, 0)
    return known, np.where(known > 0, earlier[deepest] if rows.size else -1, -1)
