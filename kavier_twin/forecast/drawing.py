"""The compiled part of drawing a scenario: which recent request each new one resembles, and what it shares.

A node is a request of the stream's past or a drawn one: rows of the recent stream first, then the scenario's.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.compiler.kernel import entry, kernel
from kavier_twin.simulation.compiler.libraries import Library
from kavier_twin.simulation.compiler.reference import by_reference
from kavier_twin.simulation.kernels.cache.keys import mix

DRAWING: Final = Library("drawing", __name__)

_CANDIDATES = 8  # open nodes looked at on each side of the wanted age
_SHORTEST_GAP_SECONDS = 1e-3
_NOT_ENDED = 1e6  # distance of a node whose answer would not be there yet: taken where there is no other
_TOP_BIT = np.uint64(1 << 63)  # a chained key has it set and the low bits clear (kernels.keys.chain_key)
_HIGH_BITS = ~np.uint64(1023)


class Examples(NamedTuple):
    """The recent requests that new ones are drawn after: [rows]."""

    cumulative: npt.NDArray[np.float64]  # weights summed up, the last is 1
    parent: npt.NDArray[np.int64]
    returns: npt.NDArray[np.bool_]
    contained: npt.NDArray[np.bool_]
    waits: npt.NDArray[np.bool_]
    response_seconds: npt.NDArray[np.float64]  # NaN: not known
    known: npt.NDArray[np.int64]
    steady: npt.NDArray[np.int64]


class Nodes(NamedTuple):
    """Requests of the past and the scenario, in order of arrival: [rows + drawn]."""

    arrival: npt.NDArray[np.float64]  # seconds
    prompt: npt.NDArray[np.int64]
    output: npt.NDArray[np.int64]  # 0: not known, it is in flight
    keys: npt.NDArray[np.int64]  # full hash blocks
    hash_tokens: npt.NDArray[np.int64]
    priority: npt.NDArray[np.int64]
    session: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]  # the node that the leading keys are those of
    kept: npt.NDArray[np.int64]  # how many keys that are
    ended: npt.NDArray[np.float64]  # seconds, when the engine is as fast as lately; NaN: not known
    after: npt.NDArray[np.int64]  # the node whose end it waits for, -1: none
    think_seconds: npt.NDArray[np.float64]  # from that end to its arrival
    # The nearest open node at or before it and at or behind it; -1 and the number of nodes where there is none.
    before: npt.NDArray[np.int64]
    behind: npt.NDArray[np.int64]


@kernel
def _open_at(links, node):
    """Follow `links` to an open node (one that links to itself), and shorten the way for the next time."""
    found = node
    while 0 <= found < links.size and links[found] != found:
        found = links[found]
    while 0 <= node < links.size and links[node] != node:
        links[node], node = found, links[node]
    return found


@kernel
def _distance(nodes, node, now, gap, length, waits):
    age = max(now - nodes.arrival[node], _SHORTEST_GAP_SECONDS)
    early = _NOT_ENDED if waits and nodes.ended[node] > now else 0.0
    return early + abs(np.log(age / gap)) + abs(np.log((nodes.prompt[node] + nodes.output[node]) / length))


@kernel
def _most_alike(nodes, drawn, now, gap, length, waits):
    """The open node before `drawn` that arrived about `gap` seconds ago and is about `length` tokens long, or -1.

    If the new one `waits` for an answer, one that has ended by now.
    """
    gap = max(gap, _SHORTEST_GAP_SECONDS)
    middle = np.searchsorted(nodes.arrival[:drawn], now - gap)
    best, least = np.int64(-1), np.inf
    node = _open_at(nodes.before, middle - 1)
    for _ in range(_CANDIDATES):
        if node < 0:
            break
        distance = _distance(nodes, node, now, gap, length, waits)
        if distance < least:
            best, least = node, distance
        node = _open_at(nodes.before, node - 1)
    node = _open_at(nodes.behind, middle)
    for _ in range(_CANDIDATES):
        if node >= drawn:
            break
        distance = _distance(nodes, node, now, gap, length, waits)
        if distance < least:
            best, least = node, distance
        node = _open_at(nodes.behind, node + 1)
    return best


@kernel
def _close(nodes, node):
    nodes.before[node] = node - 1
    nodes.behind[node] = node + 1


@entry(DRAWING)
def draw_requests(
    nodes: Nodes,
    rows: int,
    examples: Examples,
    uniform: npt.NDArray[np.float64],
    max_model_len: int,
    covers_output: bool,
    next_session: int,
) -> None:
    """Fill in the nodes behind the first `rows`; their arrivals are given, `uniform` [drawn] picks their examples.

    A return to a request becomes a return to the open node most alike to that one, in age and in length.
    """
    nodes, examples = by_reference(nodes), by_reference(examples)
    for drawn in range(rows, nodes.arrival.size):
        now = nodes.arrival[drawn]
        example = min(np.searchsorted(examples.cumulative, uniform[drawn - rows], side="right"), rows - 1)
        prompt, output = nodes.prompt[example], nodes.output[example]
        hash_tokens = nodes.hash_tokens[example]
        source, kept, session = example, examples.steady[example], np.int64(-1)
        if examples.returns[example]:
            parent = examples.parent[example]
            gap = nodes.arrival[example] - nodes.arrival[parent]
            length = nodes.prompt[parent] + nodes.output[parent]
            node = _most_alike(nodes, drawn, now, gap, length, examples.waits[example])
            grown = prompt
            if node >= 0 and examples.contained[example]:
                grown = nodes.prompt[node] + prompt - nodes.prompt[parent]
                if prompt >= nodes.prompt[parent] + nodes.output[parent] and nodes.output[node] > 0:
                    grown += nodes.output[node] - nodes.output[parent]  # the answer came back, as long as it is here
            if node >= 0 and grown + output <= max_model_len:
                source, prompt, hash_tokens = node, grown, nodes.hash_tokens[node]
                kept = min(nodes.keys[node], examples.known[example])
                if examples.contained[example]:
                    kept = nodes.keys[node]
                    whole = nodes.keys[parent]
                    if examples.known[example] < min(whole, nodes.prompt[example] // nodes.hash_tokens[example]):
                        kept = min(kept, nodes.prompt[node] // hash_tokens)  # the answer did not come back
                    session = nodes.session[node]
                    if examples.waits[example] and not np.isnan(nodes.ended[node]):
                        nodes.after[drawn] = node
                        nodes.think_seconds[drawn] = max(0.0, now - nodes.ended[node])
                    _close(nodes, node)
        if hash_tokens == 0:  # without content there is nothing to tell sessions by but their labels, which recur
            session = nodes.session[example]
        elif nodes.session[example] < 0:  # a stream without labels stays one
            session = np.int64(-1 - drawn)
        elif session < 0:
            session = np.int64(next_session)
            next_session += 1
        nodes.prompt[drawn], nodes.output[drawn] = prompt, output
        nodes.hash_tokens[drawn] = hash_tokens
        nodes.ended[drawn] = now + examples.response_seconds[example]
        nodes.priority[drawn] = nodes.priority[example]
        nodes.session[drawn] = session
        if hash_tokens > 0:
            nodes.keys[drawn] = (prompt + output if covers_output else prompt) // hash_tokens
            nodes.source[drawn], nodes.kept[drawn] = source, min(kept, prompt // hash_tokens)
            nodes.before[drawn] = nodes.behind[drawn] = drawn
        else:
            _close(nodes, drawn)


@entry(DRAWING)
def fill_keys(
    nodes: Nodes,
    rows: int,
    past_starts: npt.NDArray[np.int64],
    past: npt.NDArray[np.uint64],
    starts: npt.NDArray[np.int64],
    chain: npt.NDArray[np.uint64],
    salt: np.uint64,
) -> None:
    """Write the keys of drawn nodes, `chain[starts[i]:starts[i + 1]]`: those they keep, then new ones."""
    for drawn in range(rows, nodes.arrival.size):
        at, source = starts[drawn - rows], nodes.source[drawn]
        begin = past_starts[source] if source < rows else starts[source - rows]
        for key in range(nodes.kept[drawn]):
            chain[at + key] = past[begin + key] if source < rows else chain[begin + key]
        own = mix(salt + np.uint64(drawn - rows))
        for key in range(nodes.kept[drawn], nodes.keys[drawn]):
            chain[at + key] = (mix(own + np.uint64(key)) & _HIGH_BITS) | _TOP_BIT
