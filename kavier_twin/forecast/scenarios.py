"""Future requests that resemble the recent ones: the same sharing of prefixes, the same course of sessions.

Every arrival is drawn after a recent request. One that came back to another, as a next turn, a repeated prompt or a
branch, comes back to the open request most like that one, in age and in length, and goes on by a message of the same
length: the time between uses is kept, which decides what a cache still has. A first turn keeps the steady prefix that
its example has; the rest of its content is new. An output length always comes with the prompt it was seen with.

Arrivals are drawn for an engine that is as fast as lately. A next turn waits for an answer: what lies between is the
user's, and on another engine it comes as long after the answer's true end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kavier_twin.forecast.drawing import Examples, Nodes, draw_requests, fill_keys
from kavier_twin.forecast.load import LoadForecast, LoadForecaster
from kavier_twin.forecast.recent import read_stream
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.state import FREE
from kavier_twin.simulation.turns import Turns
from kavier_twin.simulation.workload import Workload

_LATELY = 1_000  # finished requests that tell how long those in flight will be: lengths drift


def draw_scenario(snapshot: Snapshot, horizon_seconds: float, seed: int | Sequence[int]) -> Workload:
    """Requests that arrive in the `horizon_seconds` behind the snapshot, sorted by arrival.

    Deterministic in its arguments; a shorter horizon gives the beginning of a longer one. Empty if nothing arrived
    lately. Requests of an unknown length (none has finished yet) get one as `assumed_output` says.
    """
    return Scenarios(snapshot, horizon_seconds).draw(seed)[0]


def draw_scenarios(
    snapshot: Snapshot,
    horizon_seconds: float,
    seeds: Sequence[int | Sequence[int]],
    arrivals: LoadForecast | None = None,
) -> list[Workload]:
    """One `draw_scenario` per seed; `arrivals` are forecast from the snapshot if they are not given."""
    scenarios = Scenarios(snapshot, horizon_seconds, arrivals=arrivals)
    return [scenarios.draw(seed)[0] for seed in seeds]


class Scenarios:
    """The scenarios of one snapshot: the recent stream is read once, each scenario drawn when it is asked for.

    `load` times as many requests arrive as `arrivals` says, which is forecast from the snapshot if not given.
    """

    def __init__(
        self, snapshot: Snapshot, horizon_seconds: float, load: float = 1.0, arrivals: LoadForecast | None = None
    ) -> None:
        recent = snapshot.recent
        if recent.index.size and not (recent.output > 0).any():
            recent = recent._replace(output=np.full_like(recent.output, _assumed_by_live(snapshot.fleet)))
        self._snapshot = snapshot
        self._horizon_seconds = horizon_seconds
        self._arrivals = (arrivals or LoadForecaster().forecast(snapshot, horizon_seconds)).scaled(load)
        self._stream = read_stream(recent, snapshot.ended_seconds)
        self._first_index = _first_free_index(snapshot)
        live = [request.index for request in snapshot.fleet.live()]
        self._live = (snapshot.recent.output == 0) & np.isin(recent.index, live)

    def draw(self, seed: int | Sequence[int], trending: bool = False) -> tuple[Workload, Turns]:
        """The scenario of this seed: its requests as they arrive if the engine is as fast as lately, and who waits.

        `trending`: their rate goes on as it lately rose or fell.
        """
        snapshot, stream = self._snapshot, self._stream
        arrivals_rng, rng, ends_rng = np.random.default_rng(seed).spawn(3)
        arrivals = self._arrivals.draw_arrivals(self._horizon_seconds, arrivals_rng, trending)
        n = stream.recent.index.size
        if not n:
            arrivals = arrivals[:0]
        nodes = self._nodes(arrivals, ends_rng)
        cumulative = np.cumsum(stream.weight)
        examples = Examples(
            cumulative=cumulative / cumulative[-1] if n else cumulative,
            parent=stream.parent,
            returns=stream.returns,
            contained=stream.contained,
            waits=stream.waits,
            response_seconds=stream.response_seconds,
            known=stream.known,
            steady=stream.steady,
        )
        salt = rng.integers(0, 1 << 64, dtype=np.uint64)
        next_session = 1 + max(0, int(stream.recent.session.max(initial=0)))
        max_model_len = snapshot.fleet.settings.engine.max_model_len
        draw_requests(nodes, n, examples, rng.random(arrivals.size), max_model_len, stream.covers_output, next_session)
        starts = np.zeros(arrivals.size + 1, np.int64)
        np.cumsum(nodes.keys[n:], out=starts[1:])
        chain = np.empty(int(starts[-1]), np.uint64)
        fill_keys(nodes, n, stream.recent.chain_starts, stream.recent.chain, starts, chain, salt)
        workload = Workload(
            index=np.arange(self._first_index, self._first_index + arrivals.size),
            arrival=arrivals,
            delivered=arrivals + snapshot.frontend_seconds,
            prompt=nodes.prompt[n:],
            output=nodes.output[n:],
            priority=nodes.priority[n:],
            session=nodes.session[n:],
            held=np.zeros(arrivals.size, np.int8),
            replica=np.full(arrivals.size, -1),
            adapter=np.zeros(arrivals.size, np.int64),
            skips_lookup=np.zeros(arrivals.size, np.int8),
            chain_starts=starts,
            chain=chain,
            hash_tokens=nodes.hash_tokens[n:],
            covered=nodes.keys[n:] * nodes.hash_tokens[n:],
        )
        # What has ended by now needs no waiting for.
        numbers = np.concatenate([np.where(self._live, stream.recent.index, -1), workload.index])
        after = np.where(nodes.after[n:] >= 0, numbers[nodes.after[n:]], -1)
        return workload, Turns(after, nodes.think_seconds[n:], snapshot.frontend_seconds)

    def _ends(self, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """When the recent requests ended; those in flight last as long as one of the recent ones of their age did."""
        arrival, response = self._stream.recent.arrival, self._stream.response_seconds
        known = np.sort(response[np.isfinite(response)])
        age = self._snapshot.time_seconds - arrival
        shorter = np.searchsorted(known, age, side="right")
        picks = shorter + (rng.random(age.size) * (known.size - shorter)).astype(np.int64)
        drawn = np.where(shorter < known.size, np.append(known, np.nan)[picks], 1.25 * age)
        return arrival + np.where(self._live & (known.size > 0), drawn, response)

    def _nodes(self, arrivals: npt.NDArray[np.float64], ends_rng: np.random.Generator) -> Nodes:
        """The recent requests, and room for those that arrive at these times."""
        stream, recent = self._stream, self._stream.recent
        n = recent.index.size

        def with_room(column: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return np.concatenate([column, np.zeros(arrivals.size, np.int64)])

        numbers = np.arange(n + arrivals.size)
        closed = np.ones(n, bool)
        closed[stream.open_rows] = False
        before, behind = numbers.copy(), numbers.copy()
        before[:n] -= closed
        behind[:n] += closed
        return Nodes(
            arrival=np.concatenate([recent.arrival, arrivals]),
            prompt=with_room(recent.prompt),
            output=with_room(recent.output),
            keys=with_room(stream.full_keys),
            hash_tokens=with_room(recent.hash_tokens),
            priority=with_room(recent.priority),
            session=with_room(recent.session),
            source=with_room(numbers[:n]),
            kept=with_room(stream.full_keys),
            ended=np.concatenate([self._ends(ends_rng), np.full(arrivals.size, np.nan)]),
            after=np.full(n + arrivals.size, -1),
            think_seconds=np.zeros(n + arrivals.size),
            before=before,
            behind=behind,
        )


def _first_free_index(snapshot: Snapshot) -> int:
    live = max((live.index for live in snapshot.fleet.live()), default=-1)
    return 1 + max(live, int(snapshot.recent.index.max(initial=-1)))


# --- requests in flight -------------------------------------------------------------------------------------------


def settle_lengths(fleet: Fleet, recent: Workload, rng: np.random.Generator) -> None:
    """Give every live request an output length and let it end by itself, in place.

    The length is drawn from those of the last finished requests that are longer than what this one generated so far; if
    none is, it is what `assumed_output` says. One that the model cannot make longer ends now.
    """
    finished = np.sort(recent.output[recent.output > 0][-_LATELY:])
    for live in fleet.live():
        request = fleet.state.requests[live.replica, live.slot]
        if request["tokens"] >= fleet.settings.engine.max_model_len:
            fleet.finish(live, int(request["tokens"] - request["prompt"]), None, 0)
            continue
        generated = _generated(request)
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
