"""The replicas of a mirrored fleet as they stand: all of them in short, one with its cache and batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
from pydantic import Field

from kavier_twin.mirror.mirror import Mirror
from kavier_twin.simulation import state as layout
from kavier_twin.simulation.plain import Figure
from kavier_twin.simulation.replica_state import ReplicaState, replica_state
from kavier_twin.simulation.state import FleetState

REQUESTS_SHOWN: Final = 256  # of a replica, in its own order
_STATES: Final = {
    layout.WAITING: "waiting",
    layout.RUNNING: "running",
    layout.PREEMPTED: "preempted",
    layout.LOADING: "loading",
}


@dataclass(frozen=True)
class Replica:
    """A mirrored replica; counters since it joined."""

    replica: Annotated[int, Field(examples=[0])]
    pod: Annotated[
        str, Field(description="Pod that the replica mirrors. Empty if no pod is assigned.", examples=["vllm-0"])
    ]
    state: Annotated[ReplicaState, Field(examples=["ready"])]
    requests_running: Annotated[int, Field(examples=[12])]
    requests_waiting: Annotated[int, Field(examples=[3])]
    kv_cache_usage_ratio: Annotated[Figure, Field(examples=[0.71])]
    prefix_cache_hit_ratio: Annotated[Figure, Field(description="Null if there was no request yet.", examples=[0.44])]
    requests_finished: Annotated[int, Field(examples=[1830])]
    output_tokens: Annotated[int, Field(examples=[240113])]
    preemptions: Annotated[int, Field(examples=[0])]


@dataclass(frozen=True)
class LiveRequest:
    """A request in a replica."""

    state: Annotated[str, Field(description="prefill, decode, waiting, preempted or loading.", examples=["decode"])]
    age_seconds: Annotated[float, Field(examples=[1.25])]
    prompt_tokens: Annotated[int, Field(examples=[812])]
    output_tokens: Annotated[int, Field(description="So far.", examples=[57])]
    cached_tokens: Annotated[
        int, Field(description="Prompt tokens found in the prefix cache at admission.", examples=[512])
    ]
    blocks: Annotated[int, Field(examples=[28])]
    preemptions: Annotated[int, Field(examples=[0])]


@dataclass(frozen=True)
class ReplicaDetail:
    """A mirrored replica with its cache and its batch."""

    summary: Replica
    block_tokens: Annotated[int, Field(description="Tokens in a block.", examples=[16])]
    blocks: Annotated[int, Field(description="Without vLLM's null block.", examples=[2999])]
    blocks_in_use: Annotated[int, Field(description="Blocks held by requests.", examples=[2130])]
    blocks_cached: Annotated[
        int, Field(description="Blocks that no request holds and whose content can still be reused.", examples=[869])
    ]
    blocks_empty: Annotated[int, Field(examples=[0])]
    evictions: Annotated[int, Field(description="Blocks evicted since the replica joined.", examples=[14031])]
    max_num_seqs: Annotated[int, Field(examples=[256])]
    max_num_batched_tokens: Annotated[int, Field(examples=[8192])]
    requests: Annotated[
        tuple[LiveRequest, ...], Field(description="Requests: running first, then waiting. At most 256.")
    ]


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
        state=replica_state(replica),
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
