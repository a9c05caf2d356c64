"""The replicas of a mirrored fleet as they stand: all of them in short, one with its cache and batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.state import FleetState
from kavier_twin.twin.mirror import Mirror

REQUESTS_SHOWN: Final = 256  # of a replica, in its own order
_STATES: Final = {
    layout.WAITING: "waiting",
    layout.RUNNING: "running",
    layout.PREEMPTED: "preempted",
    layout.LOADING: "loading",
}


@dataclass(frozen=True)
class Replica:
    """One replica now; counters since it joined."""

    replica: int
    pod: str  # that it stands for; empty where none has claimed it
    state: str  # serving, draining
    requests_running: int
    requests_waiting: int
    kv_cache_usage_ratio: float
    prefix_cache_hit_ratio: float  # NaN before its first request
    requests_finished: int
    output_tokens: int
    preemptions: int


@dataclass(frozen=True)
class LiveRequest:
    """A request in a replica."""

    state: str  # prefill, decode, waiting, preempted, loading
    age_seconds: float
    prompt_tokens: int
    output_tokens: int  # so far
    cached_tokens: int  # prefix hits at its admission
    blocks: int
    preemptions: int


@dataclass(frozen=True)
class ReplicaDetail:
    """A replica with its cache and its batch. Blocks without the null block, as vLLM counts what it can use."""

    summary: Replica
    block_tokens: int
    blocks: int
    blocks_in_use: int
    blocks_cached: int  # not in use, their content can still be found
    blocks_empty: int
    evictions: int
    max_num_seqs: int
    max_num_batched_tokens: int
    requests: tuple[LiveRequest, ...]  # running first, then waiting, as the engine orders them; the first 256


def replicas(mirror: Mirror) -> tuple[Replica, ...]:
    """All replicas that are there."""
    return tuple(_replica(mirror, int(number)) for number in np.flatnonzero(mirror.fleet.state.replicas["alive"]))


def replica_detail(mirror: Mirror, number: int) -> ReplicaDetail | None:
    """One replica, or None where there is none of this number."""
    state = mirror.fleet.state
    if not 0 <= number < state.replicas.size or not state.replicas["alive"][number]:
        return None
    replica, engine = state.replicas[number], state.engines[number]
    blocks = state.blocks[number][1 : int(engine["num_blocks"])]
    in_use = blocks["refs"] > 0
    cached = int(np.count_nonzero(~in_use & (blocks["key"] != layout.UNHASHED)))
    slots = [*state.running[number][: int(replica["running"])], *_waiting(state, number)]
    return ReplicaDetail(
        summary=_replica(mirror, number),
        block_tokens=int(engine["block_size"]),
        blocks=blocks.size,
        blocks_in_use=int(np.count_nonzero(in_use)),
        blocks_cached=cached,
        blocks_empty=blocks.size - int(np.count_nonzero(in_use)) - cached,
        evictions=int(replica["evictions"]),
        max_num_seqs=int(engine["max_num_seqs"]),
        max_num_batched_tokens=int(engine["max_num_batched_tokens"]),
        requests=tuple(_request(state, number, slot, mirror.time_seconds) for slot in slots[:REQUESTS_SHOWN]),
    )


def _replica(mirror: Mirror, number: int) -> Replica:
    state = mirror.fleet.state
    replica = state.replicas[number]
    usable = int(state.engines[number]["num_blocks"]) - 1
    queries = int(replica["query_tokens"])
    return Replica(
        replica=number,
        pod=mirror.pods.name_of(number),
        state="draining" if replica["leaving"] or not replica["accepting"] else "serving",
        requests_running=int(replica["running"]),
        requests_waiting=int(replica["waiting"] + replica["loading"]),
        kv_cache_usage_ratio=(usable - int(replica["free_blocks"])) / usable,
        prefix_cache_hit_ratio=int(replica["hit_tokens"]) / queries if queries else math.nan,
        requests_finished=int(replica["finished"]),
        output_tokens=int(replica["output_tokens"]),
        preemptions=int(replica["preemptions"]),
    )


def _waiting(state: FleetState, number: int) -> list[Any]:
    """Slots that wait, the next one first."""
    requests = state.requests[number]
    slots = np.flatnonzero((requests["state"] != layout.FREE) & (requests["state"] != layout.RUNNING))
    found = requests[slots]
    if state.engines[number]["priority_policy"]:
        return list(slots[np.lexsort((found["sequence"], found["arrival"], found["priority"]))])
    return list(slots[np.argsort(found["sequence"])])


def _request(state: FleetState, number: int, slot: int, now_seconds: float) -> LiveRequest:
    request = state.requests[number][slot]
    tokens = int(request["tokens"])
    if request["flowing"]:  # its tokens follow from the replica's batches: `tokens_now` in kernels/step/flow.py
        batches = int(state.replicas[number]["completed_batches"] - request["flow_start"])
        tokens = max(int(request["flow_tokens"]), int(request["flow_computed"]) + 1 + batches)
    prompt = int(request["prompt"])
    told = _STATES[int(request["state"])]
    if told == "running":
        told = "decode" if tokens > prompt else "prefill"
    return LiveRequest(
        state=told,
        age_seconds=max(0.0, now_seconds - float(request["arrival"])),
        prompt_tokens=prompt,
        output_tokens=tokens - prompt,
        cached_tokens=int(request["cached"]),
        blocks=int(request["blocks"]),
        preemptions=int(request["preemptions"]),
    )
