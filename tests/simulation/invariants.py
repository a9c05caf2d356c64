"""The invariants of docs/invariants.md, checked over the arrays of a fleet.

Plain numpy and Python, on purpose: a checker that shared code with the kernels would share their mistakes. The one
exception is content hashing (`private_key`, `find`), whose results are opaque.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.build import chunk_tables
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.kernels.cache.blocks import find
from kavier_twin.simulation.kernels.cache.keys import private_key
from kavier_twin.simulation.kernels.entries import count_all
from kavier_twin.simulation.state import FleetState, Records

GROWING = (  # fields of a replica that never become less, whatever happens to it
    "now",
    "accounted",
    "last_completion",
    "next_uid",
    "next_sequence",
    "steps",
    "finished",
    "rejected",
    "query_tokens",
    "hit_tokens",
    "external_query_tokens",
    "host_hit_tokens",
    "disk_hit_tokens",
    "loaded_bytes",
    "stored_bytes",
    "read_bytes",
    "written_bytes",
    "dropped_stores",
    "prompt_tokens",
    "computed_tokens",
    "preemptions",
    "evictions",
    "stranded_tokens",
    "busy_seconds",
    "running_seconds",
    "waiting_seconds",
    "used_block_seconds",
)


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size)


def check_state(state: FleetState) -> None:
    """Every invariant that can be seen in one state."""
    for number in range(state.replicas.size):
        check_block_conservation(state, number)
        check_eviction(state, number)
        check_reference_counts(state, number)
        check_hash_table(state, number)
        check_lists(state, number)
        check_queue_order(state, number)
        check_arena(state, number)
        check_tokens(state, number)
        check_batches(state, number)
        check_flow(state, number)
        check_tiers(state, number)
    live = int((state.requests["state"] != layout.FREE).sum())
    assert int(state.fleet["live"][0]) == live, f"fleet counts {state.fleet['live'][0]} live requests of {live}"
    counted = state._replace(pending=state.pending.copy(), holders=state.holders.copy())
    count_all(counted)
    assert (state.pending >= counted.pending).all(), "a live request is not counted among those that bring blocks"
    assert (state.holders >= counted.holders).all(), "a copy of a block is not counted"


def live_rows(state: FleetState, number: int) -> list[tuple[int, Any]]:
    """(slot, request) of every live request of a replica."""
    requests = state.requests[number]
    return [(int(slot), requests[slot]) for slot in np.flatnonzero(requests["state"] != layout.FREE)]


def block_table(state: FleetState, number: int, request: Any) -> list[int]:
    """The blocks that a request holds, in order."""
    start = int(request["cells"]) + int(request["chain_length"])
    return [int(block) for block in state.arena[number, start : start + int(request["blocks"])]]


def ring(rows: Records, sentinel: int) -> list[int]:
    """The doubly linked ring that begins and ends at this row, without it."""
    before, after = rows["prev"], rows["next"]
    found: list[int] = []
    at = sentinel
    while True:
        step = int(after[at])
        assert before[step] == at, f"ring: {at} -> {step}, but {step} says {before[step]} comes before it"
        at = step
        if at == sentinel:
            return found
        found.append(at)
        assert len(found) < rows.size, "a ring does not come back to its sentinel"


def free_list(state: FleetState, number: int) -> list[int]:
    """The free blocks in the order in which they are handed out."""
    return ring(state.blocks[number], 0)


def queue(nodes: Records, which: int) -> list[int]:
    """The blocks that stand in a queue of an eviction policy, the newest first."""
    return ring(nodes, nodes.size - layout.QUEUES + which)


def check_block_conservation(state: FleetState, number: int) -> None:
    """Free blocks, evictable ones and those in use are all blocks, each once."""
    blocks, replica = state.blocks[number], state.replicas[number]
    count = int(state.engines[number]["num_blocks"])
    assert count == blocks.size, f"{count} blocks configured, {blocks.size} in the pool"
    free = free_list(state, number) + evictable(state, number)
    assert len(free) == int(replica["free_blocks"]), f"{len(free)} free blocks, counted {replica['free_blocks']}"
    used = np.flatnonzero(blocks["refs"][1:] > 0) + 1
    assert (blocks["refs"] >= 0).all(), "negative reference count"
    assert sorted([*free, *used.tolist()]) == list(range(1, count)), "a block is free and in use, or neither"
    assert int(blocks["refs"][0]) == 0, "the null block is referenced"


def evictable(state: FleetState, number: int) -> list[int]:
    """The unreferenced blocks with content that a policy other than LRU keeps, in no order."""
    if state.nodes.shape[1] == 1:
        return []
    heap = state.nodes[number]["heap"][: int(state.replicas[number]["eviction"]["evictable"])].tolist()
    standing = [block for which in range(layout.QUEUES) for block in queue(state.nodes[number], which)]
    return heap + [block for block in standing if state.blocks[number]["refs"][block] == 0]


def check_eviction(state: FleetState, number: int) -> None:
    """The structures of an eviction policy hold what it evicts from, and ghosts no more than the cache has blocks."""
    engine, eviction, nodes = state.engines[number], state.replicas[number]["eviction"], state.nodes[number]
    policy = int(engine["eviction"])
    if policy == layout.LRU:
        assert nodes.size == 1, "LRU needs none"
        return
    blocks = state.blocks[number]
    cached = np.flatnonzero(blocks["key"] != layout.UNHASHED)
    assert not set(free_list(state, number)) & set(cached.tolist()), "content in the list of blocks without any"
    heap = nodes["heap"][: int(eviction["evictable"])].tolist()
    order = [(float(nodes["priority"][block]), int(nodes["tie"][block])) for block in heap]
    assert all(order[(place - 1) // 2] < order[place] for place in range(1, len(order))), f"not a heap: {order}"
    assert [int(nodes["place"][block]) for block in heap] == list(range(len(heap)))
    assert (np.delete(nodes["place"], heap) == -1).all(), "a block outside the heap has a place in it"
    for which in range(layout.QUEUES):
        assert int(eviction["counts"][which]) == int((nodes["queue"][cached] == which).sum()), f"queue {which} counts"
        standing = queue(nodes, which)
        assert all(nodes["queue"][block] == which for block in standing), "a block stands in a queue of others"
        assert all(blocks["key"][block] != layout.UNHASHED for block in standing), (
            "a queue holds a block without content"
        )
    linked = {block for which in range(layout.QUEUES) for block in queue(nodes, which)}
    assert linked == set(np.flatnonzero(nodes["linked"]).tolist()), "linked blocks stand in no queue, or the reverse"
    if policy < layout.SIEVE:
        assert (blocks["refs"][sorted(linked)] == 0).all(), "a block in use stands in a list of evictable ones"
    hand = int(eviction["hand"])
    assert hand == 0 or hand in linked, "SIEVE's hand is at a block outside the queue"
    check_ghosts(state, number)


def check_ghosts(state: FleetState, number: int) -> None:
    """Ghosts stand in one list each, are found by their keys, and are at most as many as the cache has blocks."""
    ghosts, eviction = state.nodes[number]["ghost"], state.replicas[number]["eviction"]
    if int(state.engines[number]["eviction"]) not in (layout.ARC, layout.S3FIFO):
        return
    lists = [ring(ghosts, ghosts.size - 2 + which) for which in (0, 1)]
    assert [len(rows) for rows in lists] == eviction["ghosts"].tolist(), "ghosts are counted wrongly"
    spare, at = [], int(eviction["spare_ghost"])
    while at != 0:
        spare.append(at)
        at = int(ghosts["next"][at])
        assert len(spare) < ghosts.size, "the list of spare ghosts does not end"
    assert sorted([*lists[0], *lists[1], *spare]) == list(range(1, state.blocks.shape[1])), "a ghost is lost"
    for row in lists[0] + lists[1]:
        if ghosts["key"][row] != layout.PRIVATE:
            assert find(ghosts, state.nodes[number]["ghost_bucket"], ghosts["key"][row]) != 0, "a lost ghost"


def check_reference_counts(state: FleetState, number: int) -> None:
    """A block is referenced once by every live block table it stands in, and by nothing else."""
    holders: Counter[int] = Counter()
    for slot, request in live_rows(state, number):
        table = block_table(state, number, request)
        assert len(set(table)) == len(table), f"slot {slot} holds a block twice: {table}"
        holders.update(table)
    references = state.blocks[number]["refs"]
    expected = np.zeros(references.size, references.dtype)
    for block, times in holders.items():
        assert 0 < block < references.size, f"block table names block {block} of {references.size}"
        expected[block] = times
    wrong = np.flatnonzero(expected != references)
    assert wrong.size == 0, f"blocks {wrong.tolist()}: held {expected[wrong]} times, counted {references[wrong]}"


def check_hash_table(state: FleetState, number: int) -> None:
    """Findable blocks stand once in the bucket of their key, others in none; blocks hold what their request says."""
    blocks, buckets = state.blocks[number], state.buckets[number]
    keys, chains = blocks["key"].tolist(), blocks["chain"].tolist()
    place: dict[int, int] = {}
    for bucket, first in enumerate(buckets.tolist()):
        at = first
        while at != 0:
            assert at not in place, f"block {at} stands in buckets {place[at]} and {bucket}, or the chain is a ring"
            place[at] = bucket
            at = chains[at]
    special = (layout.UNHASHED, layout.PRIVATE)
    findable = {block for block in range(1, blocks.size) if keys[block] not in special}
    assert findable == set(place), f"in buckets but not findable, or the reverse: {findable ^ set(place)}"
    for block in findable:
        found = int(find(blocks, buckets, blocks["key"][block]))
        assert found != 0, f"block {block} is in a bucket where its key is not looked for"
        assert keys[found] == keys[block]
    size = int(state.engines[number]["block_size"])
    for slot, request in live_rows(state, number):
        table = block_table(state, number, request)
        registered = int(request["registered"])
        for at, block in enumerate(table):
            if at < registered:
                wanted = expected_key(state, number, request, at, size)
                assert keys[block] == wanted, f"slot {slot}: block {at} is cached as {keys[block]}, not as {wanted}"
            else:
                assert keys[block] == layout.UNHASHED, f"slot {slot}: block {at} is cached but not registered"
                assert int(blocks["refs"][block]) == 1, f"slot {slot}: block {at} is shared but not registered"


def expected_key(state: FleetState, number: int, request: Any, at: int, block_size: int) -> int:
    """The key of a request's block by its hash chain, or private where the chain ends."""
    last = (at + 1) * block_size - 1
    if last < int(request["covered"]):
        hash_tokens = int(request["hash_tokens"])
        link = last // hash_tokens
        assert link < int(request["chain_length"]), "covered tokens without a hash"
        return int(state.arena[number, int(request["cells"]) + link]) + (last % hash_tokens) // block_size
    return int(private_key(int(request["uid"]), at)) if request["published"] else layout.PRIVATE


def check_lists(state: FleetState, number: int) -> None:
    """Running list, queue and free slots are all slots, each once, and agree with the requests' states."""
    replica, requests = state.replicas[number], state.requests[number]
    running = state.running[number, : int(replica["running"])].tolist()
    waiting = state.waiting[number, : int(replica["waiting"])].tolist()
    free = state.slots[number, : int(replica["free_slots"])].tolist()
    loading = state.tier_slots[number, 0, : int(replica["loading"])].tolist()
    ended = state.tier_slots[number, 1, : int(state.tiers[number]["ended"])].tolist()
    every = sorted([*running, *waiting, *free, *loading, *ended])
    assert every == list(range(requests.size)), "a slot is in two lists or in none"
    states = requests["state"]
    assert all(states[slot] == layout.RUNNING for slot in running), "the running list holds one that does not run"
    assert all(states[slot] == layout.FREE for slot in free + ended), "a free slot holds a live request"
    assert all(states[slot] == layout.LOADING for slot in loading), "one that does not load is among those that do"
    for slot in waiting:
        request = requests[slot]
        waits = layout.PREEMPTED if request["preemptions"] > 0 else layout.WAITING
        assert states[slot] == waits, f"slot {slot} queues in state {states[slot]} after {request['preemptions']}"
        held = (int(request["blocks"]), int(request["registered"]), int(request["computed"]))
        assert held == (0, 0, 0), f"slot {slot} queues with (blocks, registered, computed) {held}"
        assert (waits == layout.PREEMPTED) != math.isnan(request["scheduled"]), f"slot {slot}: scheduled while waiting"
    order = requests["run_order"][running]
    assert (np.diff(order) > 0).all(), f"the running list is not in running order: {order}"
    if not replica["alive"]:
        assert not running, "a replica that is gone runs requests"
        assert not waiting + loading, "a replica that is gone has requests waiting"
        assert not replica["accepting"], "a replica that is gone accepts requests"


def check_queue_order(state: FleetState, number: int) -> None:
    """The queue is a heap: no request stands below one that is scheduled after it."""
    requests, by_priority = state.requests[number], bool(state.engines[number]["priority_policy"])
    order = [
        (int(row["priority"]), float(row["arrival"]), str(int(row["index"]))) if by_priority else int(row["sequence"])
        for row in requests[state.waiting[number, : int(state.replicas[number]["waiting"])]]
    ]
    assert len(set(order)) == len(order), f"two requests have the same place in the queue: {order}"
    for place in range(1, len(order)):
        parent = (place - 1) // 2
        assert order[parent] < order[place], f"queue place {place} {order[place]} before {parent} {order[parent]}"


def check_arena(state: FleetState, number: int) -> None:
    """Pieces of requests and free pieces tile the used part of the arena; what a request needs fits its piece."""
    replica, arena = state.replicas[number], state.arena[number]
    size = int(state.engines[number]["block_size"])
    top = int(replica["arena_top"])
    assert top <= arena.size
    pieces = []
    for slot, request in live_rows(state, number):
        cells = 1 << int(request["cell_class"])
        pieces.append((int(request["cells"]), cells, f"slot {slot}"))
        marks = marked_chunks(state, number, request)
        used = int(request["chain_length"]) + int(request["blocks"]) + marks
        assert used <= cells, f"slot {slot} uses {used} cells of {cells}"
        to_come = (
            int(request["chain_length"]) + blocks_for(int(request["prompt"]) + int(request["output"]), size) + marks
        )
        assert to_come <= cells, f"slot {slot} will use {to_come} cells of {cells}"
    for slot in state.tier_slots[number, 1, : int(state.tiers[number]["ended"])].tolist():
        request = state.requests[number, slot]
        pieces.append((int(request["cells"]), 1 << int(request["cell_class"]), f"ended, slot {slot}"))
    for size_class, first in enumerate(state.arena_free[number].tolist()):
        at = first
        while at >= 0:
            pieces.append((at, 1 << size_class, f"free, class {size_class}"))
            assert len(pieces) <= top, "the list of free pieces does not end"
            at = int(arena[at].astype(np.int64))
    end = 0
    for start, cells, owner in sorted(pieces):
        assert start == end, f"arena: piece {owner} starts at {start}, the one before ends at {end}"
        end = start + cells
    assert end == top, f"arena: pieces end at {end}, the top is {top}"


def check_tokens(state: FleetState, number: int) -> None:
    """A request's tokens, computed tokens, tokens in flight and blocks agree with each other and with the batches."""
    engine, replica = state.engines[number], state.replicas[number]
    size = int(engine["block_size"])
    in_flight: Counter[int] = Counter()
    emitting: Counter[int] = Counter()
    for place in batches_in_flight(state, number):
        for entry in state.entries[number, place, : int(state.batches[number, place]["count"])]:
            in_flight[int(entry["slot"])] += int(entry["tokens"])
            emitting[int(entry["slot"])] += int(entry["emits"])
    done = 0
    for slot, request in live_rows(state, number):
        who = f"slot {slot} (request {request['index']})"
        prompt, output, tokens = int(request["prompt"]), int(request["output"]), int(request["tokens"])
        computed, blocks, registered = int(request["computed"]), int(request["blocks"]), int(request["registered"])
        placeholders, stale = int(request["placeholders"]), int(request["stale"])
        done += bool(request["held"]) and tokens >= prompt + output
        assert prompt <= tokens <= prompt + output, f"{who}: {tokens} tokens of {prompt} + {output}"
        assert (tokens > prompt) != math.isnan(request["first_token"]), f"{who}: first token stamped wrongly"
        assert int(request["in_flight"]) == in_flight[slot], f"{who}: {request['in_flight']} tokens in flight"
        assert 0 <= stale <= in_flight[slot], f"{who}: {stale} stale of {in_flight[slot]} tokens in flight"
        if request["state"] != layout.RUNNING:
            assert placeholders == 0, f"{who}: placeholders while waiting"
            continue
        if stale == 0:
            emits = emitting[slot] if engine["async_scheduling"] else 0
            assert placeholders == emits, f"{who}: {placeholders} placeholders, {emits} tokens to come"
        ahead = placeholders
        if request["flowing"] and engine["async_scheduling"]:
            ahead += sum(flows_in(state, number, request, age) for age in range(int(replica["in_flight"])))
        elif request["flowing"] and replica["in_flight"]:
            ahead = int(flows_in(state, number, request, 0))
        elif not engine["async_scheduling"]:
            ahead = 0
        assert computed <= tokens + ahead, f"{who}: {computed} computed of {tokens} + {ahead}"
        assert blocks == blocks_for(computed, size), f"{who}: {blocks} blocks for {computed} tokens"
        assert registered * size <= min(computed, tokens), f"{who}: {registered} blocks registered, {tokens} tokens"
        assert request["scheduled"] >= request["arrival"], f"{who}: scheduled before it arrived"
    assert int(replica["holding"]) == done, f"{replica['holding']} held requests counted done, {done} are"
    assert replica["hit_tokens"] <= replica["query_tokens"]


def flows_in(state: FleetState, number: int, request: Any, age: int) -> bool:
    """Whether the batch in flight of this age (0 the oldest) brings the request a token with the flow."""
    return int(state.replicas[number]["completed_batches"]) + 1 + age > int(request["flow_start"])


def batches_in_flight(state: FleetState, number: int) -> list[int]:
    """Places of the batches in flight, the oldest first."""
    replica = state.replicas[number]
    return [(int(replica["oldest"]) + age) % 2 for age in range(int(replica["in_flight"]))]


def check_batches(state: FleetState, number: int) -> None:
    """Batches in flight end in order and not before now; a request is in a batch once."""
    replica, engine = state.replicas[number], state.engines[number]
    assert 0 <= replica["in_flight"] <= (2 if engine["async_scheduling"] else 1)
    time = float(replica["now"])
    for place in batches_in_flight(state, number):
        batch = state.batches[number, place]
        assert batch["end"] >= time, f"batch ends at {batch['end']}, before {time}"
        time = float(batch["end"])
        entries = state.entries[number, place, : int(batch["count"])]
        slots = [int(slot) for slot in entries["slot"] if slot >= 0]
        assert len(set(slots)) == len(slots), f"a request is twice in a batch: {slots}"
        assert all(state.requests[number, slot]["state"] != layout.FREE for slot in slots), "a batch holds a free slot"
        assert (entries["tokens"] > 0).all(), "a batch holds a request without tokens"


def check_flow(state: FleetState, number: int) -> None:
    """What the flow keeps as sums (kernels/step/flow.py) is what its requests add up to."""
    replica, requests = state.replicas[number], state.requests[number]
    running = state.running[number, : int(replica["running"])].tolist()
    flowing = [slot for slot in running if requests[slot]["flowing"]]
    flow = state.flow[number, : int(replica["flowing"])].tolist()
    assert sorted(flow) == sorted(flowing), f"the flow's heap {flow}, requests that flow {flowing}"
    ends = [(int(requests[slot]["flow_end"]), int(requests[slot]["run_order"])) for slot in flow]
    assert all(ends[(place - 1) // 2] < ends[place] for place in range(1, len(ends))), f"not a heap: {ends}"
    context = sum(int(requests[slot]["computed"]) + 1 for slot in flow)
    assert int(replica["flow_context"]) == context, f"flow context {replica['flow_context']}, sum {context}"
    size = state.phases.shape[1]
    assert size == int(state.engines[number]["block_size"])
    linked = []
    for phase, (first, last, count) in enumerate(state.phases[number].tolist()):
        slots, before, at = [], -1, first
        while at >= 0:
            assert int(requests[at]["flow_prev"]) == before
            slots.append(at)
            before, at = at, int(requests[at]["flow_next"])
            assert len(slots) <= len(flow), "the list of a phase does not end"
        assert (before, len(slots)) == (last, count), f"phase {phase}: list {slots}, last {last}, count {count}"
        order = [int(requests[slot]["run_order"]) for slot in slots]
        assert order == sorted(order), f"phase {phase} is not in running order"
        for slot in slots:
            due = (phase - int(replica["scheduled_batches"]) - 1) % size  # full batches until it needs a block
            room = int(requests[slot]["blocks"]) * size - int(requests[slot]["computed"])
            assert room == due, f"slot {slot} has room for {room} tokens, its phase says {due}"
        linked += slots
    assert sorted(linked) == sorted(flow)
    explicit = state.explicit[number, : int(replica["explicit"])].tolist()
    unfinished = []
    for slot in running:
        request = requests[slot]
        done = request["held"] and request["tokens"] >= request["prompt"] + request["output"]
        if not (request["flowing"] or done) and request["computed"] < request["prompt"] + request["output"] - 1:
            unfinished.append(slot)
    assert [slot for slot in explicit if slot in unfinished] == unfinished, f"{explicit} explicit, {unfinished} open"
    for age, place in enumerate(batches_in_flight(state, number)):
        # A request that got its last batch has left the flow; the batch before that may still be in flight.
        expected = sum(flows_in(state, number, requests[slot], age) for slot in flow)
        assert expected <= int(state.batches[number, place]["flowing"])


def marked_chunks(state: FleetState, number: int, request: Any) -> int:
    """Chunks of a request on which it may leave marks: all its full ones, if there is a host tier."""
    tier, size = state.tiers[number], int(state.engines[number]["block_size"])
    if not tier["chunks"]:
        return 0
    return (int(request["prompt"]) + int(request["output"])) // (int(tier["blocks_per_chunk"]) * size)


def check_table(cache: Records) -> dict[int, int]:
    """The rings of a tier's table and its hash table hold every record once. Returns chunk by key."""
    seen: list[int] = []
    for ring in range(layout.RINGS):
        before, at, members = ring, int(cache[ring]["next"]), []
        while at != ring:
            assert int(cache[at]["prev"]) == before
            assert int(cache[at]["ring"]) == ring, f"chunk {at} says it is in ring {cache[at]['ring']}, not {ring}"
            members.append(at)
            before, at = at, int(cache[at]["next"])
            assert len(members) < cache.size, f"ring {ring} does not close"
        assert int(cache[ring]["prev"]) == before
        assert int(cache[ring]["refs"]) == len(members), f"ring {ring}: {len(members)} chunks, counted otherwise"
        seen += members
    assert sorted(seen) == list(range(layout.RINGS, cache.size)), "a chunk is in two rings or in none"
    found: dict[int, int] = {}
    for first in cache["bucket"].tolist():
        at = first
        while at != 0:
            key = int(cache[at]["key"])
            assert key not in found, f"key {key} is there twice"
            found[key] = at
            at = int(cache[at]["chain"])
    assert sorted(found.values()) == np.flatnonzero(cache["key"] != 0).tolist(), "a chunk cannot be found"
    assert (cache["key"][cache["ring"] == layout.VACANT] == 0).all(), "a vacant record holds a key"
    return found


def transfers(cache: Records, first: int) -> list[list[int]]:
    """The chunks of the transfers of a queue."""
    jobs = []
    while first != 0:
        chunks, at = [], first
        while at != 0:
            chunks.append(at)
            assert len(chunks) < cache.size, "the list of a transfer's chunks does not end"
            at = int(cache[at]["link"])
        assert len(chunks) == int(cache[first]["count"]), (
            f"{len(chunks)} chunks in a transfer of {cache[first]['count']}"
        )
        jobs.append(chunks)
        first = int(cache[first]["after"])
    return jobs


def check_tiers(state: FleetState, number: int) -> None:
    """Chunks and their pins are those of the transfers under way; a tier holds no more than it can."""
    tier, replica = state.tiers[number], state.replicas[number]
    if not tier["chunks"]:
        assert int(replica["loading"]) == 0
        return
    host, disk, offers = chunk_tables(state, number)
    found = check_table(host)
    rings = host["refs"][: layout.RINGS]
    chunks = int(tier["chunks"])
    assert rings[layout.RECENT] + rings[layout.FREQUENT] <= chunks, "more chunks than the host tier holds"
    assert max(rings[layout.GHOST_RECENT], rings[layout.GHOST_FREQUENT]) <= chunks
    assert tier["arc"] or rings[layout.FREQUENT : layout.VACANT].sum() == 0
    if tier["disk_chunks"]:
        check_table(disk)
        assert int(disk["refs"][layout.RECENT]) <= int(tier["disk_chunks"])
    if tier["store_threshold"] >= 2:
        check_table(offers)
    resident = np.flatnonzero(host["ring"] <= layout.FREQUENT)
    resident = resident[resident >= layout.RINGS]
    assert int(tier["idle"]) == int((host["refs"][resident] == 0).sum()), "idle chunks miscounted"

    decided, stores = transfers(host, int(tier["decided_first"])), transfers(host, int(tier["stores_first"]))
    reads, writes = transfers(host, int(tier["reads_first"])), transfers(host, int(tier["writes_first"]))
    for jobs in (stores, reads, writes):
        ends = [float(host[job[0]]["done"]) for job in jobs]
        assert ends == sorted(ends), f"transfers of one link end out of order: {ends}"
    numbers = [int(host[job[0]]["number"]) for job in stores + decided]
    assert numbers == list(range(int(tier["oldest_store"]), int(tier["next_store"]))), f"stores open: {numbers}"
    written = [chunk for job in decided + stores + reads for chunk in job]
    assert sorted(written) == resident[host["refs"][resident] < 0].tolist(), "written by no transfer, or the reverse"
    pins: Counter[int] = Counter(chunk for job in writes for chunk in job)
    open_stores = Counter(int(host[job[0]]["uid"]) for job in stores + decided)
    size = int(state.engines[number]["block_size"])
    loads: Counter[int] = Counter()
    for slot, request in live_rows(state, number):
        assert int(request["stores"]) == open_stores[int(request["uid"])], f"slot {slot}: stores miscounted"
        if request["state"] != layout.LOADING:
            continue
        held, computed = int(request["blocks"]), int(request["computed"])
        assert held == blocks_for(computed, size), f"slot {slot} loads {computed} tokens into {held} blocks"
        assert np.isfinite(request["load_done"]), f"slot {slot}: a load was begun, but not submitted"
        if not request["arrived"]:
            for chunk in range(int(request["load_first"]), int(request["load_last"])):
                block = (chunk + 1) * int(tier["blocks_per_chunk"]) - 1
                loads[found[content_key(state, number, request, block, size)]] += 1
    for chunk in resident.tolist():
        refs = int(host[chunk]["refs"])
        assert int(host[chunk]["loads"]) == loads[chunk]
        assert refs == (pins[chunk] + loads[chunk] if refs >= 0 else -1), f"chunk {chunk}: {refs} transfers read it"


def content_key(state: FleetState, number: int, request: Any, at: int, block_size: int) -> int:
    """The key of a request's block, also where only the request itself can know it."""
    if (at + 1) * block_size - 1 < int(request["covered"]):
        return expected_key(state, number, request, at, block_size)
    return int(private_key(int(request["uid"]), at))


def check_limits(state: FleetState, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """No more requests run, and no more tokens are in a batch, than the largest limits the fleet ever had."""
    for number in range(state.replicas.size):
        assert state.replicas[number]["running"] <= max_num_seqs
        for place in batches_in_flight(state, number):
            batch = state.batches[number, place]
            tokens = int(state.entries[number, place, : int(batch["count"])]["tokens"].sum()) + int(batch["flowing"])
            assert tokens <= max_num_batched_tokens, f"a batch of {tokens} tokens"


class Books:
    """What was fed to a fleet and what came of it: checks what no single state can show.

    Call `visit` after every `Fleet.run`, and after whatever else was done to the fleet.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fed: dict[int, float] = {}  # arrival by index
        self.ended: dict[int, Any] = {}  # outcome by index
        self.time_seconds = self._since = fleet.now_seconds
        self._replicas = fleet.state.replicas.copy()
        self._itl_counts = fleet.state.itl_counts.copy()
        self._known: dict[int, Any] = {}

    def feed(self, indexes: Iterable[int], arrivals: Iterable[float]) -> None:
        self.fed |= {int(index): float(arrival) for index, arrival in zip(indexes, arrivals, strict=True)}

    def outcomes(self) -> Records:
        """Everything that ended, by index."""
        rows = np.zeros(len(self.ended), layout.OUTCOME)
        for at, index in enumerate(sorted(self.ended)):
            rows[at] = self.ended[index]
        return rows

    def visit(
        self, fleet: Fleet, *, settled: bool = False, failed: bool = False, resumed_from: float = math.inf
    ) -> None:
        """Check, and remember for the next visit.

        `settled`: a policy switch completed batches before their time. `failed`: a replica failed. `resumed_from`: a
        request that had generated everything got more to generate, and goes on from when it stopped.
        """
        self._since = min(self.time_seconds, resumed_from)
        state = fleet.state
        check_state(state)
        assert fleet.now_seconds >= self.time_seconds, f"clock ran back: {self.time_seconds} -> {fleet.now_seconds}"
        live = {int(row["index"]): row for row in state.requests[state.requests["state"] != layout.FREE]}
        fresh = fleet.collect()
        self._conserve_requests(fleet, live, fresh)
        for outcome in fresh:
            self._check_outcome(outcome, fleet.now_seconds, settled, failed)
        self._check_past(live, fresh, failed)
        self._check_counters(state)
        self.time_seconds = fleet.now_seconds
        self._replicas = state.replicas.copy()
        self._known = {index: row.copy() for index, row in live.items()}

    def _conserve_requests(self, fleet: Fleet, live: dict[int, Any], fresh: Records) -> None:
        for outcome in fresh:
            index = int(outcome["index"])
            assert index in self.fed, f"request {index} ended but was never fed"
            assert index not in self.ended, f"request {index} ended twice"
            self.ended[index] = outcome.copy()
        assert len(live) == int(fleet.state.fleet["live"][0]), "a request is live twice"
        assert not live.keys() & self.ended.keys(), f"ended and live: {live.keys() & self.ended.keys()}"
        seen = live.keys() | self.ended.keys()
        vanished = {i for i in self.fed.keys() - seen if self.fed[i] < fleet.now_seconds}
        assert not vanished, f"arrived, but neither live nor ended: {vanished}"
        early = {i for i in live if self.fed[i] > fleet.now_seconds}
        assert not early, f"in the fleet before they arrived: {early}"

    def _check_outcome(self, outcome: Any, now: float, settled: bool, failed: bool) -> None:
        who = f"request {outcome['index']}"
        times = [float(outcome[name]) for name in ("arrival", "scheduled", "first_token", "finish")]
        assert times[0] == self.fed[int(outcome["index"])], f"{who}: arrival changed"
        status = int(outcome["status"])
        if status == layout.LOST:
            assert all(math.isnan(time) for time in times[1:])
            return
        happened = [time for time in times if not math.isnan(time)]
        assert happened == sorted(happened), f"{who}: arrival, scheduled, first token, finish {times}"
        assert times[3] >= self._since, f"{who} ended at {times[3]}, before the last stop {self._since}"
        if not settled:
            assert times[3] <= now, f"{who} ended at {times[3]}, after the clock {now}"
        if status == layout.FINISHED:
            assert len(happened) == 4, f"{who} finished without {times}"
            assert outcome["output"] >= 1
        elif status == layout.REJECTED_LENGTH:
            assert times[3] == times[0] or failed, f"{who} was refused at {times[3]}"  # at its second arrival
            assert outcome["output"] == outcome["cached"] == 0
        assert 0 <= outcome["cached"] < outcome["prompt"], f"{who}: {outcome['cached']} of {outcome['prompt']} cached"
        assert 0 <= outcome["external"] <= outcome["prompt"] - outcome["cached"], (
            f"{who}: {outcome['external']} external"
        )

    def _check_past(self, live: dict[int, Any], fresh: Records, failed: bool) -> None:
        """What was known at the last stop still holds; what is new happened after it."""
        for row in [*live.values(), *fresh]:
            known = self._known.get(int(row["index"]))
            if failed or ("status" in row.dtype.names and row["status"] == layout.LOST):
                continue
            for name in ("scheduled", "first_token"):
                time = float(row[name])
                if known is not None and not math.isnan(known[name]):
                    assert time == known[name], f"request {row['index']}: {name} became {time}, was {known[name]}"
                elif not math.isnan(time):
                    assert time >= self._since, (
                        f"request {row['index']}: {name} at {time}, but by {self._since} it had not happened"
                    )

    def _check_counters(self, state: FleetState) -> None:
        before = self._replicas
        for number in range(before.size):
            for name in GROWING:
                was, now = before[number][name], state.replicas[number][name]
                assert now >= was, f"replica {number}: {name} fell from {was} to {now}"


def check_totals(fleet: Fleet, outcomes: Records) -> None:
    """Counters of the engines equal what the requests tell. For fleets where no replica failed."""
    state = fleet.state
    for number in range(state.replicas.size):
        replica = state.replicas[number]
        ended = outcomes[outcomes["replica"] == number]
        live = state.requests[number][state.requests[number]["state"] != layout.FREE]
        finished = ended[ended["status"] == layout.FINISHED]

        def total(name: str, rows: Records) -> int:
            return int(rows[name].sum())

        assert int(replica["received"]) == ended.size + live.size
        assert int(replica["finished"]) == finished.size
        assert int(replica["rejected"]) == ended.size - finished.size
        generated = total("output", ended) + total("tokens", live) - total("prompt", live)
        assert int(replica["output_tokens"]) == generated, f"{replica['output_tokens']} counted, {generated} generated"
        begun = [rows[np.isfinite(rows["first_token"])] for rows in (ended, live)]
        assert int(replica["prompt_tokens"]) == sum(total("prompt", rows) for rows in begun)
        assert int(replica["hit_tokens"]) == total("cached", ended) + total("cached", live)
        external = int(replica["host_hit_tokens"] + replica["disk_hit_tokens"])
        assert external == total("external", ended) + total("external", live)
        assert int(replica["preemptions"]) == total("preemptions", ended) + total("preemptions", live)


def check_work(fleet: Fleet, outcomes: Records) -> None:
    """Tokens computed and latencies observed follow from the requests. For runs that nobody ended from outside."""
    state = fleet.state
    for number in range(state.replicas.size):
        replica = state.replicas[number]
        done = outcomes[(outcomes["replica"] == number) & (outcomes["status"] == layout.FINISHED)]
        own = np.maximum(done["prompt"] - done["cached"] - done["external"], 1)  # the last token is never spared
        least = int((own + done["output"] - 1).sum())
        ended = outcomes[outcomes["replica"] == number]
        live = state.requests[number]["state"] != layout.FREE
        if not live.any() and done.size + int((ended["status"] == layout.REJECTED_LENGTH).sum()) == ended.size:
            # A preempted request computes again, but may also hit what others computed since: no bound either way.
            if int(done["preemptions"].sum()) == 0:
                computed = int(replica["computed_tokens"])
                assert computed == least, f"{computed} tokens computed, {least} needed"
            first = int(np.isfinite(done["first_token"]).sum())
            assert int(state.itl_counts[number].sum()) == int(replica["output_tokens"]) - first
        assert replica["busy_seconds"] <= replica["accounted"] * (1 + 1e-9) + 1e-9
