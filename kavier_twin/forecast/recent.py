"""What is to be learnt from the recent requests: which came back to which, what they shared, and after how long.

Content tells it. Keys are chained, so two requests with a key in common share everything up to it, and what a request
shares with any before it ends at one key, its deepest known one. The request that had this key last is its parent.
There are two ways to share:

- *Steady* prefixes (system prompts): several first turns used them, over most of the window. Who uses one next does not
  depend on who did last, so scenarios draw them by their popularity.
- Everything else is a *return*: to a session (the parent is wholly contained, prompt to the last full key: a next
  turn, or the same prompt again) or to a part of it (a branch: an edited message, a document asked about twice). How
  long after the parent it came is what decides about a cache, so scenarios keep that time.

Session labels, where given, decide whether a request that contains another is its next turn; without labels the earlier
one must have had content of its own to be known by.

Where the stream tells when requests ended, a next turn that came after the answer before it *waits* for that: the user
reads, thinks and asks again.

A return after g seconds is only seen where the window reaches back g seconds: it stands for all requests that a window
without a beginning would have shown (Horvitz and Thompson, 1952). Likewise a request without a parent is more surely a
first turn late in the window than early.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.workload import Workload

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_STEADY_USERS = 3  # first turns that must have used a prefix, over half of the window at least, to call it steady
_LONGEST_WEIGHT = 5.0  # one return stands for so many at most
# A first turn this much older counts 1 / e, as what people ask for drifts. Returns are too few for that, and their
# times decide about a cache.
_MEMORY_SECONDS = 200.0
_UNSEEN_RATIO = 0.02  # returns per request that first turns may be mistaken for


@dataclass(frozen=True)
class Stream:
    """Recent requests, n rows in order of arrival; a key covers `recent.hash_tokens` tokens."""

    recent: Workload
    full_keys: Integers  # [n] keys that cover their hash block whole (the last one of a prompt may not)
    known: Integers  # [n] leading keys of the prompt that an earlier request had
    steady: Integers  # [n] leading keys of the prompt that are a steady prefix
    parent: Integers  # [n] the last row before it that had the deepest known key, -1: none
    previous: Integers  # [n] the row whose next turn this is, -1: a first turn
    returns: Flags  # [n] comes back to its parent
    contained: Flags  # [n] comes back to all of its parent's prompt
    waits: Flags  # [n] a next turn that came when the one before had ended
    response_seconds: Floats  # [n] from arrival to end, NaN where no end is told
    weight: Floats  # [n] requests of the stream that this one stands for; 0: in flight, no example for others
    open_rows: Integers  # rows with content that no other contains yet
    covers_output: bool  # chains run over prompt and output

    @property
    def return_ratio(self) -> float:
        """Returns per request."""
        total = float(self.weight.sum())
        return float(self.weight[self.returns].sum()) / total if total else 0.0


def read_stream(recent: Workload, ended_seconds: Floats | None = None) -> Stream:
    """Understand recent requests, sorted by arrival; `output` 0 marks those still in flight.

    `ended_seconds` [n] tells when they ended, NaN where that is not known.
    """
    n = recent.index.size
    ended = np.full(n, np.nan) if ended_seconds is None else ended_seconds
    hash_tokens = np.maximum(recent.hash_tokens, 1)
    full_keys = np.minimum(np.diff(recent.chain_starts), recent.covered // hash_tokens)
    prompt_keys = np.minimum(full_keys, recent.prompt // hash_tokens)
    rows = np.repeat(np.arange(n), np.diff(recent.chain_starts))
    order = np.argsort(recent.chain, kind="stable")  # equal keys in order of arrival
    known, parent = _known(recent, prompt_keys, rows, order)
    at = np.maximum(parent, 0)
    contained = (parent >= 0) & (known >= prompt_keys[at])
    labelled = (recent.session >= 0) & (recent.session[at] >= 0)
    own_content = prompt_keys[at] > known[at]
    same_session = np.where(labelled, recent.session == recent.session[at], own_content)
    previous = np.where(contained & (recent.prompt > recent.prompt[at]) & same_session, parent, -1)
    steady = np.minimum(_steady(recent, previous < 0, rows, order), prompt_keys)
    returns = (previous >= 0) | (known > steady)
    contained &= returns & (recent.prompt >= recent.prompt[at])
    continued = np.zeros(n, bool)
    continued[parent[contained]] = True
    return Stream(
        recent=recent,
        full_keys=full_keys,
        known=known,
        steady=steady,
        parent=parent,
        previous=previous,
        returns=returns,
        contained=contained,
        waits=contained & (previous >= 0) & (ended[at] <= recent.arrival),
        response_seconds=ended - recent.arrival,
        weight=_weights(recent.arrival, recent.output > 0, returns, np.where(returns, parent, -1)),
        open_rows=np.flatnonzero(~continued & (recent.hash_tokens > 0)),
        covers_output=bool((recent.covered > recent.prompt).any()),
    )


def _known(recent: Workload, prompt_keys: Integers, rows: Integers, order: Integers) -> tuple[Integers, Integers]:
    """How many leading keys of each prompt an earlier request had, and the last row before it that had the deepest."""
    n = recent.index.size
    earlier = np.full(rows.size, -1)
    same = recent.chain[order[1:]] == recent.chain[order[:-1]]
    earlier[order[1:][same]] = rows[order[:-1][same]]
    known = np.minimum(np.bincount(rows[earlier >= 0], minlength=n), prompt_keys)
    deepest = np.where(known > 0, recent.chain_starts[:-1] + known - 1, 0)
    return known, np.where(known > 0, earlier[deepest] if rows.size else -1, -1)


def _steady(recent: Workload, first: Flags, rows: Integers, order: Integers) -> Integers:
    """How many leading keys of each row are a steady prefix: `first` turns all over the window have them."""
    n = recent.index.size
    if not rows.size:
        return np.zeros(n, np.int64)
    users = order[first[rows[order]]]
    keys, begins, counts = np.unique(recent.chain[users], return_index=True, return_counts=True)
    begin, end = recent.arrival[rows[users[begins]]], recent.arrival[rows[users[begins + counts - 1]]]
    half = (recent.arrival[-1] - recent.arrival[0]) / 2.0
    steady = keys[(counts >= _STEADY_USERS) & (end - begin >= half)]
    return np.bincount(rows[np.isin(recent.chain, steady)], minlength=n)


def _weights(arrival: Floats, finished: Flags, returns: Flags, parent: Integers) -> Floats:
    """How many requests each one stands for, returns by how rarely they can be seen; their sum is that of requests."""
    n = arrival.size
    if not n:
        return np.zeros(0)
    seen_since = arrival - arrival[0]  # ascending
    gap = np.where(returns, arrival - arrival[np.maximum(parent, 0)], np.inf)
    able = n - np.searchsorted(seen_since, gap, side="left")  # rows that could have seen such a return
    weight = np.where(returns, np.minimum(n / np.maximum(able, 1), _LONGEST_WEIGHT), 0.0)
    returning = min(float(weight.sum()) / n, 1.0)
    # A first turn is surely one where the window reaches back further than nearly all returns do; else take the newer
    # half of them.
    order = np.argsort(gap, kind="stable")
    later = np.concatenate([np.cumsum(weight[order][::-1])[::-1], np.zeros(1)]) / n
    unseen = later[np.searchsorted(gap[order], seen_since, side="right")]  # [n] returns after a longer gap, per request
    first = np.flatnonzero(~returns & finished)
    sure = np.zeros(n)
    sure[first[(unseen[first] <= _UNSEEN_RATIO) | (np.arange(first.size) >= first.size // 2)]] = 1.0
    result = np.zeros(n)
    newer = np.exp((arrival - arrival[-1]) / _MEMORY_SECONDS)
    for group, share, value in ((returns, returning, weight), (~returns, 1.0 - returning, sure * newer)):
        examples = group & finished
        total = float(value[examples].sum())
        if total > 0.0:
            result[examples] = value[examples] * (share * n / total)
    return result
