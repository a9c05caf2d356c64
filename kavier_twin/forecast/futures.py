"""Future requests that resemble the recent ones: the same sharing of prefixes, the same course of sessions.

Every arrival is, in the proportion seen recently, a first turn or a next turn. A first turn repeats a recent one:
lengths, priority and the keys it shared with earlier requests; the rest of its content is new. A next turn repeats a
recent next turn: the open session that most resembles the one continued then, in age and in length, goes on by a
message of the same length; it keeps the keys of its last turn. An output length always comes with the prompt it was
seen with.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kavier_twin.forecast.load import arrival_rate, poisson_arrivals
from kavier_twin.forecast.stream import Stream, read_stream
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.state import FREE
from kavier_twin.simulation.workload import Workload, make_workload
from kavier_twin.twin.snapshot import Snapshot

Keys = npt.NDArray[np.uint64]

_CANDIDATES = 8  # open sessions looked at on each side of the wanted age
_SHORTEST_GAP_SECONDS = 1e-3
_TOP_BIT = np.uint64(1 << 63)  # a chained key has it set and the low bits clear (kernels.blocks.chain_key)
_LOW_BITS = np.uint64(1023)


class Turn(NamedTuple):
    """A request of a session as it is drawn. `keys` are those of its full hash blocks, `hash_tokens` tokens each."""

    arrival: float
    prompt: int
    output: int  # 0: not known, it is in flight
    keys: Keys
    hash_tokens: int
    priority: int
    session: int


def draw_future(snapshot: Snapshot, horizon_seconds: float, seed: int | Sequence[int]) -> Workload:
    """Requests that arrive in the `horizon_seconds` behind the snapshot, sorted by arrival.

    Deterministic in its arguments; a shorter horizon gives the beginning of a longer one. Empty if nothing arrived
    lately. Requests of an unknown length (none has finished yet) get one as `assumed_output` says.
    """
    return draw_futures(snapshot, horizon_seconds, [seed])[0]


def draw_futures(
    snapshot: Snapshot, horizon_seconds: float, seeds: Sequence[int | Sequence[int]], load: float = 1.0
) -> list[Workload]:
    """One `draw_future` per seed; requests arrive `load` times as often as foreseen."""
    recent = snapshot.recent
    if recent.index.size and not (recent.output > 0).any():
        recent = recent._replace(output=np.full_like(recent.output, _assumed_by_live(snapshot.fleet)))
    stream = read_stream(recent)
    rate = load * arrival_rate(snapshot)
    futures = []
    for seed in seeds:
        arrivals_rng, rng = np.random.default_rng(seed).spawn(2)
        arrivals = poisson_arrivals(rate, snapshot.time_seconds, horizon_seconds, arrivals_rng)
        drawing = _Drawing(stream, snapshot.fleet.settings.engine.max_model_len, rng)
        turns = [drawing.next(float(time)) for time in arrivals]
        futures.append(_workload(turns, _first_free_index(snapshot), snapshot.frontend_seconds))
    return futures


class _Drawing:
    """Draws one future, request by request."""

    def __init__(self, stream: Stream, max_model_len: int, rng: np.random.Generator) -> None:
        self._stream = stream
        self._max_model_len = max_model_len
        self._rng = rng
        self._next_session = 1 + max(0, int(stream.recent.session.max(initial=0)))
        # Open sessions by the arrival of their last turn; the times apart, for bisection.
        self._open = [_turn(stream, int(row)) for row in stream.open_rows]
        self._ages = [turn.arrival for turn in self._open]

    def next(self, arrival: float) -> Turn:
        """The request that arrives then."""
        turn = None
        if self._rng.random() < self._stream.next_turn_ratio:
            turn = self._next_turn(arrival)
        if turn is None:
            turn = self._first_turn(arrival)
        if turn.hash_tokens:
            self._open.append(turn)
            self._ages.append(arrival)
        return turn

    def _first_turn(self, arrival: float) -> Turn:
        stream = self._stream
        row = self._pick(stream.first_turns)
        seen = _turn(stream, row)
        session = seen.session
        if seen.hash_tokens:  # without content there is nothing to tell sessions by but their labels, which recur
            session = self._next_session
            self._next_session += 1
        keys = self._extend(seen.keys[: stream.known[row]], seen.prompt, seen.output, seen.hash_tokens)
        return seen._replace(arrival=arrival, keys=keys, session=session)

    def _next_turn(self, arrival: float) -> Turn | None:
        stream, recent = self._stream, self._stream.recent
        if not stream.next_turns.size or not self._open:
            return None
        row = self._pick(stream.next_turns)
        before = _turn(stream, int(stream.previous[row]))
        place = self._most_alike(arrival, float(recent.arrival[row]) - before.arrival, before.prompt + before.output)
        last = self._open[place]
        message = int(recent.prompt[row]) - before.prompt - before.output
        output = int(recent.output[row])
        prompt = max(last.prompt + 1, last.prompt + (last.output or before.output) + message)
        if prompt + output > self._max_model_len:
            return None
        del self._open[place], self._ages[place]
        keys = last.keys
        if stream.known[row] < before.keys.size and stream.known[row] < recent.prompt[row] // before.hash_tokens:
            keys = keys[: last.prompt // last.hash_tokens]  # the output did not come back in the prompt
        return last._replace(
            arrival=arrival,
            prompt=prompt,
            output=output,
            keys=self._extend(keys, prompt, output, last.hash_tokens),
            priority=int(recent.priority[row]),
        )

    def _most_alike(self, arrival: float, gap: float, length: int) -> int:
        """Place of the open session whose last turn began about `gap` seconds ago and was about `length` long."""
        gap = max(gap, _SHORTEST_GAP_SECONDS)
        middle = bisect_left(self._ages, arrival - gap)
        places = range(max(0, middle - _CANDIDATES), min(len(self._open), middle + _CANDIDATES))

        def distance(place: int) -> float:
            turn = self._open[place]
            age = max(arrival - turn.arrival, _SHORTEST_GAP_SECONDS)
            return abs(math.log(age / gap)) + abs(math.log((turn.prompt + turn.output) / length))

        return min(places, key=distance)

    def _extend(self, keys: Keys, prompt: int, output: int, hash_tokens: int) -> Keys:
        """The chain of a request that begins with these keys; the rest is new content."""
        if not hash_tokens:
            return keys[:0]
        kept = keys[: prompt // hash_tokens]
        full = (prompt + output if self._stream.covers_output else prompt) // hash_tokens
        fresh = self._rng.integers(0, 1 << 64, full - kept.size, dtype=np.uint64)
        return np.concatenate([kept, (fresh | _TOP_BIT) & ~_LOW_BITS])

    def _pick(self, rows: npt.NDArray[np.int64]) -> int:
        return int(rows[int(self._rng.random() * rows.size)])


def _turn(stream: Stream, row: int) -> Turn:
    recent = stream.recent
    return Turn(
        arrival=float(recent.arrival[row]),
        prompt=int(recent.prompt[row]),
        output=int(recent.output[row]),
        keys=stream.chain(row),
        hash_tokens=int(recent.hash_tokens[row]),
        priority=int(recent.priority[row]),
        session=int(recent.session[row]),
    )


def _first_free_index(snapshot: Snapshot) -> int:
    live = max((live.index for live in snapshot.fleet.live()), default=-1)
    return 1 + max(live, int(snapshot.recent.index.max(initial=-1)))


def _workload(turns: list[Turn], first_index: int, frontend_seconds: float) -> Workload:
    starts = np.zeros(len(turns) + 1, np.int64)
    np.cumsum([turn.keys.size for turn in turns], out=starts[1:])
    hash_tokens = np.array([turn.hash_tokens for turn in turns], np.int64)
    workload = make_workload(
        [turn.arrival for turn in turns],
        [turn.prompt for turn in turns],
        [turn.output for turn in turns],
        hash_tokens=hash_tokens,
        covered=np.diff(starts) * hash_tokens,
        priority=[turn.priority for turn in turns],
        session=[turn.session for turn in turns],
        index=np.arange(first_index, first_index + len(turns)),
    )
    return workload._replace(
        delivered=workload.arrival + frontend_seconds,
        chain_starts=starts,
        chain=np.concatenate([np.zeros(0, np.uint64), *(turn.keys for turn in turns)]),  # they are chained already
    )


# --- requests in flight -------------------------------------------------------------------------------------------


def settle_lengths(fleet: Fleet, recent: Workload, rng: np.random.Generator) -> None:
    """Give every live request an output length and let it end by itself, in place.

    The length is drawn from those of recent finished requests that are longer than what this one generated so far; if
    none is, it is what `assumed_output` says.
    """
    finished = np.sort(recent.output[recent.output > 0])
    for live in fleet.live():
        generated = _generated(fleet.state.requests[live.replica, live.slot])
        shorter = int(np.searchsorted(finished, generated, side="right"))
        pick = shorter + int(rng.random() * (finished.size - shorter))
        fleet.set_output(live, int(finished[pick]) if shorter < finished.size else assumed_output(generated))
        fleet.state.requests["held"][live.replica, live.slot] = 0
    fleet.state.replicas["holding"] = 0
    fleet.state.replicas["hold_until"] = -np.inf


def assumed_output(generated: int) -> int:
    """Tokens that a request will have generated which has generated so many already and resembles none before."""
    return int(1.25 * generated) + 1


def _generated(request: np.void) -> int:
    """Tokens generated, those of the batches in flight (two at most) included."""
    newest = max(int(request["tokens"]), int(request["computed"]) + 1)
    return newest - int(request["prompt"]) + min(int(request["stale"]), 2)


def _assumed_by_live(fleet: Fleet) -> int:
    """One output length for all, where no request has finished: the mean of what those in flight are given."""
    requests = fleet.state.requests[fleet.state.requests["state"] != FREE]
    return round(float(np.mean([assumed_output(_generated(request)) for request in requests]))) if requests.size else 1
