"""Transfers between GPU, host and disk: queues of links, and when the scheduler learns that one is complete.

Each direction of a link serves one transfer at a time, in order (vLLM 0.32 `v1/kv_offload/cpu/gpu_worker.py`: the
stream of a transfer waits for that of the one before and for the model's work submitted so far). A store is submitted
before the model's step that follows the one that decided it, a load behind the step that decided it. A transfer takes
the link's latency plus its bytes at the link's rate. A worker looks for completed copies when it starts a batch, and
the scheduler learns of them when that batch ends (`kv_connector/v1/offloading/worker.py`); disk transfers it asks for
itself whenever it schedules (`v1/kv_offload/tiering/manager.py`).

A transfer's chunks are linked, and its first chunk carries what describes it.
"""

import numpy as np

from kavier_twin.simulation.compiler.kernel import kernel, linked
from kavier_twin.simulation.kernels import TIERS
from kavier_twin.simulation.kernels.tiers.chunks import disk_of, drop, find, host_of, move, put
from kavier_twin.simulation.state import RECENT, VACANT, FleetState


@kernel
def chunk_bytes(tier):
    """Bytes that one chunk moves."""
    return tier.block_bytes * tier.blocks_per_chunk


@kernel
def decide_store(tier, host, first):
    """Queue a store: it is submitted with the next batch."""
    host[first].after = 0
    if tier.decided_first == 0:
        tier.decided_first = first
    else:
        host[tier.decided_last].after = first
    tier.decided_last = first


@kernel
def submit_stores(replica, tier, host, start, before):
    """Submit the stores with numbers below `before`; the GPU lets them start at `start`."""
    while tier.decided_first != 0 and host[tier.decided_first].number < before:
        job = tier.decided_first
        tier.decided_first = host[job].after
        size = host[job].count * chunk_bytes(tier)
        tier.store_free = max(start, tier.store_free) + tier.host_latency + size / tier.host_rate
        replica.stored_bytes += size
        host[job].done = tier.store_free
        host[job].after = 0
        if tier.stores_first == 0:
            tier.stores_first = job
        else:
            host[tier.stores_last].after = job
        tier.stores_last = job


@linked(TIERS)
def submit_loads(state: FleetState, number: int, start: float) -> None:
    """Submit the loads begun by the batch just scheduled, which ends at `start`."""
    replica, tier, requests = state.replicas[number], state.tiers[number], state.requests[number]
    loading = state.tier_slots[number, 0]
    for place in range(replica.loading):
        request = requests[loading[place]]
        if request.load_done == np.inf:
            # The blocks behind the local hits, all of them still without content.
            size = (request.blocks - request.registered) * tier.block_bytes
            tier.load_free = max(start, tier.load_free) + tier.host_latency + size / tier.host_rate
            replica.loaded_bytes += size
            request.load_done = tier.load_free


@kernel
def submit_read(replica, tier, host, first, time):
    """Queue a promotion: disk to host."""
    size = host[first].count * chunk_bytes(tier)
    tier.read_free = max(time, tier.read_free) + tier.disk_latency + size / tier.read_rate
    replica.read_bytes += size
    host[first].done = tier.read_free
    host[first].after = 0
    if tier.reads_first == 0:
        tier.reads_first = first
    else:
        host[tier.reads_last].after = first
    tier.reads_last = first


@kernel
def _submit_write(tier, host, first, time):
    """Queue a copy from host to disk of what a store just brought; its chunks are pinned until it is done."""
    chunk = first
    while chunk != 0:
        host[chunk].refs = 1
        tier.idle -= 1
        chunk = host[chunk].link
    size = host[first].count * chunk_bytes(tier)
    tier.write_free = max(time, tier.write_free) + tier.disk_latency + size / tier.write_rate
    host[first].done = tier.write_free
    host[first].after = 0
    if tier.writes_first == 0:
        tier.writes_first = first
    else:
        host[tier.writes_last].after = first
    tier.writes_last = first


@kernel
def _make_ready(tier, host, first):
    chunk = first
    while chunk != 0:
        host[chunk].refs = 0
        tier.idle += 1
        chunk = host[chunk].link


@kernel
def _complete_store(state, number, time):
    tier, host, requests = state.tiers[number], host_of(state, number), state.requests[number]
    job = tier.stores_first
    tier.stores_first = host[job].after
    tier.oldest_store = host[job].number + 1
    _make_ready(tier, host, job)
    if requests[host[job].slot].uid == host[job].uid:
        requests[host[job].slot].stores -= 1
    if tier.disk_chunks > 0:
        _submit_write(tier, host, job, time)


@kernel
def unpin(tier, host, chunk, load):
    """A transfer has read a chunk."""
    host[chunk].refs -= 1
    if load:
        host[chunk].loads -= 1
    if host[chunk].refs == 0:
        tier.idle += 1


@kernel
def _complete_write(state, number):
    replica, tier, host = state.replicas[number], state.tiers[number], host_of(state, number)
    disk = disk_of(state, number)
    chunk = tier.writes_first
    tier.writes_first = host[chunk].after
    while chunk != 0:
        unpin(tier, host, chunk, False)
        copy = find(disk, host[chunk].key)
        if copy != 0:
            move(disk, copy, RECENT)  # vLLM does not write a file that exists
        else:
            if disk[VACANT].refs == 0:
                drop(disk, disk[RECENT].next)
            put(disk, host[chunk].key, RECENT)
            replica.written_bytes += chunk_bytes(tier)
        chunk = host[chunk].link


@kernel
def observe_disk(state, number, until):
    """The scheduler learns of the disk transfers complete by `until`."""
    tier, host = state.tiers[number], host_of(state, number)
    while tier.reads_first != 0 and host[tier.reads_first].done <= until:
        job = tier.reads_first
        tier.reads_first = host[job].after
        _make_ready(tier, host, job)
    while tier.writes_first != 0 and host[tier.writes_first].done <= until:
        _complete_write(state, number)


@kernel
def observe_copies(state, number, until, time):
    """At `time` the scheduler learns of the copies between GPU and host that were complete by `until`.

    Loads: see `loads.observe_loads`.
    """
    tier, host = state.tiers[number], host_of(state, number)
    while tier.stores_first != 0 and host[tier.stores_first].done <= until:
        # An engine at rest looks all the time.
        _complete_store(state, number, host[tier.stores_first].done if tier.resting else time)


@kernel
def store_done(tier, host, number):
    """When the store with this number, submitted and not known to be complete, is complete."""
    job = tier.stores_first
    while job != 0 and host[job].number != number:
        job = host[job].after
    return host[job].done if job != 0 else -np.inf


@kernel
def store_uid(tier, host, number):
    """The request whose store has this number, -1 if it is complete."""
    for first in (tier.stores_first, tier.decided_first):
        job = first
        while job != 0:
            if host[job].number == number:
                return host[job].uid
            job = host[job].after
    return np.int64(-1)


@linked(TIERS)
def next_done(state: FleetState, number: int) -> float:
    """When the next transfer under way is complete, infinity if there is none."""
    replica, tier, host = state.replicas[number], state.tiers[number], host_of(state, number)
    requests, loading = state.requests[number], state.tier_slots[number, 0]
    time = np.inf
    for job in (tier.stores_first, tier.reads_first, tier.writes_first):
        if job != 0:
            time = min(time, host[job].done)
    for place in range(replica.loading):
        request = requests[loading[place]]
        if not request.arrived:
            time = min(time, request.load_done)
    return time
