"""The whole state of a fleet: a handful of numpy arrays in one tuple.

Nothing of the data plane lives outside these arrays, so a fork is a memory copy and a checkpoint is their bytes.
Each array has the replica as its leading axis. Sizes: R replicas, S request slots, N blocks, H hash buckets, A arena
cells. Record layouts below are the vocabulary of the kernels; every field says its unit where it has one.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

# --- request states -----------------------------------------------------------------------------------------------
FREE: Final = 0
WAITING: Final = 1
RUNNING: Final = 2
PREEMPTED: Final = 3
LOADING: Final = 4  # its blocks are allocated and a load from a tier fills them: vLLM's WAITING_FOR_REMOTE_KVS

# --- how a request ended (Outcome.status) -------------------------------------------------------------------------
FINISHED: Final = 0
REJECTED_LENGTH: Final = 1  # prompt does not fit max_model_len: vLLM answers HTTP 400
REJECTED_KV_CAPACITY: Final = 2  # needs more blocks than the engine has: could never run
LOST: Final = 3  # its replica failed and no other could take it

# --- what kernels return that may lack room ------------------------------------------------------------------------
OK: Final = 0
GROW_SLOTS: Final = 1
GROW_ARENA: Final = 2
GROW_OUTCOMES: Final = 3
NO_REPLICA: Final = 4  # none accepts requests

# --- block keys ---------------------------------------------------------------------------------------------------
UNHASHED: Final = 0  # not in the prefix cache
PRIVATE: Final = 1  # cached, but only its own request could ever look it up: kept out of the hash table

# --- routing policies ---------------------------------------------------------------------------------------------
ROUND_ROBIN: Final = 0
LEAST_LOADED: Final = 1
SESSION_AFFINITY: Final = 2
PREFIX_AWARE: Final = 3

# --- rings of a tier's chunks: their numbers are those of the ring's first record, which stands for the ring ---------
RECENT: Final = 0  # all chunks under lru (from least to most recently used); used once under arc: ARC's T1
FREQUENT: Final = 1  # T2
GHOST_RECENT: Final = 2  # B1: keys without content
GHOST_FREQUENT: Final = 3  # B2
VACANT: Final = 4
RINGS: Final = 5

# --- what a request did with a chunk of its own (bits) ------------------------------------------------------------
SEEN: Final = 1  # its access counts when the request ends
INSERTED: Final = 2  # it brought the chunk into the host tier
REUSED: Final = 4  # it found the chunk there
MISSED: Final = 8  # the eviction policy has learned that it was not there
FROM_DISK: Final = 16  # the disk tier had it
OFFERED: Final = 32  # part of the store being decided
# --- eviction policies (kernels/cache/eviction/); those after LRU are grouped by what keeps their evictable blocks ---
LRU: Final = 0  # vLLM's, in the free list itself
FIFO: Final = 1  # a heap
LFU: Final = 2
COST_AWARE: Final = 3
BELADY: Final = 4
TTL: Final = 5  # lists of evictable blocks
PINNED: Final = 6
SLRU: Final = 7
ARC: Final = 8
SIEVE: Final = 9  # queues in which a block keeps its place while it is in use
S3FIFO: Final = 10
QUEUES: Final = 4  # the most that any policy has

ITL_BINS: Final = 1024
ITL_SMALLEST_SECONDS: Final = 1e-5
ITL_BIN_RATIO: Final = 1.02  # bins 2 % wide: from 10 us to 6,000 s
ARENA_CLASSES: Final = 32
PENDING: Final = 1 << 14
HOMES: Final = 1 << 13


# What engine steps did, in the order of StepTime's coefficients: steps, prefill tokens, decoding sequences, context
# tokens read by decodes, prefill attention, seconds of the linear layers. Seconds are their product with the
# coefficients: calibration fits on it.
WORK: Final = (np.float64, (6,))
MAX_KNOTS: Final = 24  # of StepTime.linear_layers


def _record(*fields: tuple[str, Any]) -> np.dtype[np.void]:
    """A record whose every byte belongs to a field: numpy leaves padding undefined, and runs must agree in bytes.

    Wide fields come first; a spare field fills the record up to whole words.
    """
    ordered = sorted(fields, key=lambda kind: -np.dtype(kind[1]).base.alignment)
    widest = np.dtype(ordered[0][1]).base.alignment
    if sum(np.dtype(kind).itemsize for _, kind in fields) % widest:
        ordered.append(("spare", np.int32))
    return np.dtype(ordered, align=True)


BLOCK = _record(
    ("key", np.uint64),  # content identity, UNHASHED or PRIVATE
    ("prev", np.int32),  # free list, block 0 (vLLM's null block) being its sentinel
    ("next", np.int32),
    ("refs", np.int32),  # live requests that hold it; 0 = in the free list
    ("chain", np.int32),  # next block in its hash bucket, 0 = end; newest first
)

REQUEST = _record(
    ("prompt", np.int32),  # tokens
    ("output", np.int32),  # tokens it will generate; only its own completion ever reads this
    ("tokens", np.int32),  # prompt + tokens delivered so far: vLLM's num_tokens
    ("computed", np.int32),  # tokens whose KV is scheduled: vLLM's num_computed_tokens
    ("placeholders", np.int32),  # asynchronous scheduling: tokens in flight
    ("in_flight", np.int32),  # tokens scheduled in batches not yet completed
    ("stale", np.int32),  # in-flight tokens from before a preemption
    ("blocks", np.int32),  # blocks held
    ("registered", np.int32),  # leading blocks that entered the prefix cache
    ("state", np.int32),
    ("published", np.int32),  # its private blocks are in the hash table (it was preempted once)
    ("held", np.int32),  # its end comes from outside (a mirror's finish record): never finishes by itself
    ("priority", np.int64),
    ("sequence", np.int64),  # place in the fcfs queue: arrivals count up, preempted ones down from 0
    ("index", np.int64),  # the caller's number for it
    ("uid", np.int64),  # unique on this replica, names its private blocks
    ("session", np.int64),
    ("adapter", np.int64),  # identity of its LoRA adapter, 0 = none
    ("cells", np.int64),  # where its hash chain starts in the arena; its block table follows the chain
    ("cell_class", np.int32),  # log2 of the arena cells it owns
    ("chain_length", np.int32),
    ("hash_tokens", np.int32),  # tokens under one hash of the chain
    ("covered", np.int32),  # leading tokens whose content the chain identifies
    ("known", np.int32),  # leading blocks whose content the chain identifies
    ("skips_lookup", np.int32),  # it uses no cached prefix, as with prompt_logprobs
    ("cached", np.int32),  # prefix hits at first admission, tokens
    ("external", np.int32),  # tokens the tiers provided at first admission
    ("counted", np.int32),  # its prefix hits are in the replica's counters
    ("prefilling", np.int32),  # admitted, but not through its prompt (vLLM's _inflight_prefills)
    ("probed", np.int32),  # the disk tier was asked for its chunks
    ("stored", np.int32),  # leading chunks that need not be offered to the host tier any more
    ("stores", np.int32),  # stores of its chunks not known to be complete
    ("load_first", np.int32),  # chunks [load_first, load_last) that are being loaded
    ("load_last", np.int32),
    ("arrived", np.int32),  # the load is known to be complete
    ("last_store", np.int64),  # number of its latest store
    ("tier_rank", np.int64),  # its chunks' rank in the host tier while it lives, 0 = it used none yet
    ("load_done", np.float64),  # when its load is complete, seconds; infinity = not submitted yet
    ("preemptions", np.int32),
    ("flowing", np.int32),  # decodes with the flow (kernels/step/flow.py)
    ("flow_computed", np.int32),  # `computed` when it joined
    ("flow_tokens", np.int32),  # `tokens` when it joined
    ("flow_prev", np.int32),  # neighbours among those that need a block at the same step, -1 = none
    ("flow_next", np.int32),
    ("flow_start", np.int64),  # number of the batch with its last token before it joined
    ("flow_end", np.int64),  # number of the batch with its last token
    ("run_order", np.int64),  # running requests are ordered by it
    ("arrival", np.float64),  # seconds
    ("scheduled", np.float64),
    ("first_token", np.float64),
    ("stalled_since", np.float64),  # time of its last token while it is not getting any; NaN = flowing
    ("predicted_finish", np.float64),  # when a held request had generated everything; NaN = not yet
    ("work_scheduled", WORK),  # the replica's `work` when it was first scheduled
    ("work_first_token", WORK),
)

EVICTION = _record(
    ("clock", np.int64),  # counts what happens to blocks: orders them
    ("counts", (np.int64, (QUEUES,))),  # blocks that belong to each queue, those in use too
    ("age", np.float64),  # COST_AWARE: priority of the last victim
    ("target", np.float64),  # ARC: blocks that its first list should have
    ("evictable", np.int32),  # blocks in the heap
    ("hand", np.int32),  # SIEVE: the next block it looks at, 0 = the oldest
    ("recalled", np.int32),  # ghost list (1 or 2) that knew the content about to enter, 0 = none
    ("started", np.int32),  # S3FIFO: something was evicted since the cache was empty
    ("spare_ghost", np.int32),  # first unused row of the ghosts
    ("ghosts", (np.int32, (2,))),  # length of each ghost list
)

GHOST = _record(
    ("key", np.uint64),  # content that was evicted
    ("prev", np.int32),  # towards the newest of its list; the last two rows are the lists' sentinels
    ("next", np.int32),
    ("chain", np.int32),  # next one in its hash bucket, 0 = end
    ("queue", np.int32),
)

# Everything that policies other than LRU keep by block. One row under LRU, which needs no more than BLOCK.
NODE = _record(
    ("priority", np.float64),  # heap: the lowest goes first; TTL: seconds of its last use
    ("tie", np.int64),  # heap: among equals the lowest goes first
    ("place", np.int32),  # in the heap, -1 = not there
    ("prev", np.int32),  # towards the newest of its queue; the last QUEUES rows are the queues' sentinels
    ("next", np.int32),
    ("queue", np.int32),
    ("linked", np.int32),  # stands in its queue
    ("hits", np.int32),
    ("depth", np.int32),  # its number in the chain
    ("heap", np.int32),  # not of this block: cell of the heap of evictable blocks
    ("ghost_bucket", np.int32),  # not of this block: first ghost of a hash bucket
    ("ghost", GHOST),  # not of this block
)

ORACLE = _record(  # a bucket of an open-addressing hash table
    ("key", np.uint64),  # of a hash of the trace, 0 = empty
    ("first", np.int64),  # its uses to come are `count` rows of uses from here, in order
    ("count", np.int64),
)
USE = _record(("arrival", np.float64), ("index", np.int64), ("rank", np.int64))  # rank among all requests to come
FUTURE = _record(("bucket", ORACLE), ("use", USE))  # rows of two tables in one array

REPLICA = _record(
    ("now", np.float64),  # time of the last scheduling decision or completion, seconds
    ("accounted", np.float64),  # time up to which the integrals below run
    ("last_completion", np.float64),
    ("hold_until", np.float64),  # reality is behind: nothing is scheduled before
    ("joined", np.float64),  # when it joined
    ("left", np.float64),  # when it failed or was asked to leave; infinite while it is to stay
    ("running", np.int32),
    ("waiting", np.int32),
    ("loading", np.int32),  # requests that wait holding blocks which a tier fills or has filled
    ("free_blocks", np.int32),
    ("free_slots", np.int32),
    ("in_flight", np.int32),  # batches in flight: at most 1, 2 under asynchronous scheduling
    ("oldest", np.int32),  # which of the two batch places completes next
    ("parked", np.int32),  # live, but nothing can be scheduled before something happens from outside
    ("accepting", np.int32),  # the router may choose it
    ("alive", np.int32),
    ("leaving", np.int32),  # gone once empty
    ("holding", np.int32),  # held requests that generated all they will and wait for their end from outside
    ("flowing", np.int32),  # running requests that decode with the flow
    ("explicit", np.int32),  # the other running requests
    ("most_running", np.int32),  # at a time, since `Fleet.forget_peaks`
    ("most_batch_tokens", np.int32),  # scheduled in one batch since then, batches of decodes alone left out
    ("scheduled_batches", np.int64),
    ("completed_batches", np.int64),
    ("flow_context", np.int64),  # tokens of context that the flow reads in its next batch
    ("flow_newest", np.int64),  # highest run_order that joined since the flow was empty
    ("next_run_order", np.int64),
    ("arena_top", np.int64),
    ("next_uid", np.int64),
    ("next_sequence", np.int64),
    ("front_sequence", np.int64),
    ("steps", np.int64),  # counters from here on
    ("received", np.int64),
    ("finished", np.int64),
    ("rejected", np.int64),
    ("query_tokens", np.int64),  # vllm:prefix_cache_queries
    ("hit_tokens", np.int64),  # vllm:prefix_cache_hits
    ("external_query_tokens", np.int64),  # vllm:external_prefix_cache_queries
    ("host_hit_tokens", np.int64),  # vllm:external_prefix_cache_hits, the part that the host tier held
    ("disk_hit_tokens", np.int64),  # the part that had to be read from disk
    ("loaded_bytes", np.int64),  # host to GPU
    ("stored_bytes", np.int64),  # GPU to host
    ("read_bytes", np.int64),  # disk to host
    ("written_bytes", np.int64),  # host to disk
    ("dropped_stores", np.int64),  # vLLM's allocation_failure: no room could be made for a store
    ("prompt_tokens", np.int64),  # vllm:prompt_tokens, credited at the first token
    ("computed_tokens", np.int64),  # tokens that went through the model
    ("output_tokens", np.int64),
    ("preemptions", np.int64),
    ("evictions", np.int64),  # blocks that lost their cached content
    ("stranded_tokens", np.int64),  # cached, but not hit because an ancestor was gone (not counted with LRU)
    ("busy_seconds", np.float64),  # with a live request
    ("running_seconds", np.float64),  # integral of running requests
    ("waiting_seconds", np.float64),
    ("used_block_seconds", np.float64),
    ("work", WORK),  # of all batches completed
    ("eviction", EVICTION),
)

ENGINE = _record(
    ("block_size", np.int64),
    ("num_blocks", np.int64),  # with the null block
    ("max_num_seqs", np.int64),
    ("max_num_batched_tokens", np.int64),
    ("max_model_len", np.int64),
    ("long_prefill_token_threshold", np.int64),
    ("watermark_blocks", np.int64),
    ("prefix_caching", np.int32),
    ("async_scheduling", np.int32),
    ("chunked_prefill", np.int32),
    ("reserve_full_isl", np.int32),
    ("priority_policy", np.int32),
    ("stepping", np.int32),  # the reference: never jump
    ("self_preemption_ends_pass", np.int32),  # this and the next three: see versions.Profile
    ("offload_ranks_by_request", np.int32),
    ("offload_offers_again", np.int32),
    ("lora_counts_all_running", np.int32),
    ("max_loras", np.int64),  # adapters in a batch, 0 = no limit
    ("fixed", np.float64),  # step time, see settings.StepTime
    ("per_prefill_token", np.float64),
    ("per_decode_sequence", np.float64),
    ("per_context_token", np.float64),
    ("per_prefill_attention", np.float64),
    ("linear_scale", np.float64),
    ("knot_tokens", (np.float64, (MAX_KNOTS,))),
    ("knot_seconds", (np.float64, (MAX_KNOTS,))),
    ("knots", np.int64),
    ("eviction", np.int64),
    ("eviction_ttl_seconds", np.float64),
    ("eviction_pinned_blocks", np.int64),  # leading blocks of a chain that may be pinned
    ("eviction_pinned_most", np.int64),  # blocks pinned at a time
    ("prefill_token_seconds", np.float64),  # of a full batch: what computing a block again costs
    ("hold_seconds", np.float64),  # how long the engine waits with a held request that is ahead of its end
)

BATCH = _record(
    ("end", np.float64),
    ("polled", np.float64),  # transfers that were complete by then are known when it ends
    ("count", np.int32),  # requests listed one by one in `entries`
    ("flowing", np.int32),  # requests that get a token with the flow
    ("work", WORK),
)
ENTRY = _record(("slot", np.int32), ("tokens", np.int32), ("emits", np.int32))

PHASE = _record(("first", np.int32), ("last", np.int32), ("count", np.int32))

OUTCOME = _record(
    ("index", np.int64),
    ("session", np.int64),
    ("replica", np.int32),
    ("status", np.int32),
    ("prompt", np.int32),
    ("output", np.int32),
    ("cached", np.int32),  # tokens hit in the GPU's cache
    ("external", np.int32),  # tokens that came from the host or disk tier
    ("preemptions", np.int32),
    ("arrival", np.float64),
    ("scheduled", np.float64),
    ("first_token", np.float64),
    ("finish", np.float64),
    ("predicted_finish", np.float64),  # what it would have been had the end not come from outside
    ("prefill_work", WORK),  # done by its replica from its first scheduling to its first token
    ("decode_work", WORK),  # from there to its last token
)

FLEET = _record(
    ("outcomes", np.int64),  # rows of FleetState.outcomes in use
    ("live", np.int64),
    ("router", np.int64),
    ("max_imbalance", np.int64),  # prefix-aware: requests above the least loaded that a match may cost
    ("turn", np.int64),  # round robin
    ("next_rank", np.int64),  # Belady: of the requests that become known next
)

# One chunk of a tier: the blocks of `blocks_per_chunk`. Also a key that a ghost ring or the offer tracker remembers.
CHUNK = _record(
    ("key", np.uint64),  # key of its last block, which identifies all before it
    ("ring", np.int32),
    ("prev", np.int32),  # neighbours in the ring
    ("next", np.int32),
    ("chain", np.int32),  # next chunk in its hash bucket, 0 = end
    ("bucket", np.int32),  # first chunk of the hash bucket with this record's number, 0 = none
    ("refs", np.int32),  # transfers reading it, -1 = being written; the ring's length in a ring's own record
    ("loads", np.int32),  # of these, loads to the GPU
    ("offer", np.int32),  # low bits of the number of the last offer it was part of: safe from eviction meanwhile
    ("link", np.int32),  # next chunk of the same transfer, 0 = last
    ("count", np.int32),  # the fields from here on describe the transfer and stand in its first chunk: chunks in it
    ("after", np.int32),  # first chunk of the next transfer in the same queue, 0 = end
    ("slot", np.int32),  # the request it is for
    ("uid", np.int64),
    ("number", np.int64),  # a store's
    ("rank", np.int64),  # lru: RECENT is sorted by it and among equals by `position`, the highest first
    ("position", np.int64),  # place in its request's chunks, 0 where the rank is its own
    ("done", np.float64),  # when it is complete, seconds
)

TIER = _record(
    ("chunks", np.int64),  # capacity of the host tier, 0 = there is none
    ("disk_chunks", np.int64),
    ("disk_at", np.int64),  # where the tables of the disk tier and of the offered keys begin
    ("offers_at", np.int64),
    ("blocks_per_chunk", np.int64),
    ("store_threshold", np.int64),
    ("tracked", np.int64),  # keys whose offers are counted at most
    ("arc", np.int32),
    ("prompt_only", np.int32),
    ("block_bytes", np.int64),
    ("host_latency", np.float64),  # seconds
    ("host_rate", np.float64),  # bytes per second, each direction
    ("disk_latency", np.float64),
    ("read_rate", np.float64),
    ("write_rate", np.float64),
    ("target", np.float64),  # arc: wanted length of RECENT
    ("idle", np.int64),  # chunks no transfer uses
    ("offers", np.int64),
    ("next_rank", np.int64),  # the rank given last
    ("next_store", np.int64),
    ("oldest_store", np.int64),  # all with lower numbers are known to be complete
    ("admitted_from", np.int64),  # requests with this run_order or a higher one are admitted with the batch at hand
    ("awaited_store", np.int64),  # the batch being scheduled writes to blocks that this one still reads
    ("store_free", np.float64),  # when each direction of each link has done what is in its queue
    ("load_free", np.float64),
    ("read_free", np.float64),
    ("write_free", np.float64),
    ("wake", np.float64),  # a parked replica looks again then
    ("decided_first", np.int32),  # queues (first chunks of the first and last transfer): stores to submit
    ("decided_last", np.int32),
    ("stores_first", np.int32),  # stores under way
    ("stores_last", np.int32),
    ("reads_first", np.int32),  # promotions from disk
    ("reads_last", np.int32),
    ("writes_first", np.int32),  # copies to disk
    ("writes_last", np.int32),
    ("begun", np.int32),  # the batch being scheduled begins loads
    ("asked", np.int32),  # the disk tier was asked in the batch being scheduled
    ("ended", np.int32),  # requests that ended since the last batch was scheduled
    ("resting", np.int32),  # nothing is in flight: the engine does nothing but look for completed transfers
)

Records = npt.NDArray[np.void]
Ints = npt.NDArray[np.int32]
Request = Annotated[Any, REQUEST]


class FleetState(NamedTuple):
    """All arrays of a fleet (see module docstring for the axes)."""

    fleet: Annotated[Records, FLEET]  # of one row
    replicas: Annotated[Records, REPLICA, "R"]
    engines: Annotated[Records, ENGINE, "R"]
    requests: Annotated[Records, REQUEST, "R, S"]
    slots: Annotated[Ints, "R, S"]  # stack of free request slots
    running: Annotated[Ints, "R, S"]  # slots in vLLM's running order
    waiting: Annotated[Ints, "R, S"]  # binary heap of slots in scheduling order
    batches: Annotated[Records, BATCH, "R, 2"]
    entries: Annotated[Records, ENTRY, "R, 2, S"]
    blocks: Annotated[Records, BLOCK, "R, N"]
    buckets: Annotated[Ints, "R, H"]  # first block of a hash bucket
    arena: Annotated[npt.NDArray[np.uint64], "R, A"]  # hash chains and block tables
    arena_free: Annotated[npt.NDArray[np.int64], "R, ARENA_CLASSES"]  # first free piece of each size, -1 = none
    explicit: Annotated[Ints, "R, S"]  # running slots outside the flow, in running order
    flow: Annotated[Ints, "R, S"]  # binary heap of the flow's slots by their last batch
    phases: Annotated[Records, PHASE, "R, block size"]  # the flow's slots by the step at which they need a block
    itl_counts: Annotated[npt.NDArray[np.int64], "R, ITL_BINS"]  # histogram of inter-token latencies
    nodes: Annotated[Records, NODE, "R, N + QUEUES or more"]  # one a replica with LRU
    future: Annotated[Records, FUTURE]  # of the whole fleet, of one row unless Belady's policy knows one
    tiers: Annotated[Records, TIER, "R"]  # the arrays below have one cell a replica where no tier is configured
    chunks: Annotated[Records, CHUNK, "R, all"]  # host tier, disk tier and offered keys (`refs` counts their offers)
    fences: Annotated[npt.NDArray[np.int64], "R, N"]  # the latest store that reads a block (`stores.NO_FENCE`)
    tier_slots: Annotated[
        Ints, "R, 2, S"
    ]  # slots in state LOADING, as they are served; of those ended that the tiers do not know of
    quiet_until: Annotated[npt.NDArray[np.float64], "R"]  # `loads` cannot change by itself before
    loads: Annotated[Ints, "R"]  # live requests of each replica, as routers see them (`router.TOO_BUSY`: takes none)
    holders: npt.NDArray[np.uint8]  # [2^n] copies of blocks in all caches, by hash of key (kernels/cache/holders.py)
    pending: npt.NDArray[np.uint16]  # [PENDING] live requests by a hash of their blocks' keys
    homes: Ints  # [HOMES] where prefix-aware routing last sent a session, by a hash of it: where it looks first
    outcomes: Annotated[Records, OUTCOME]  # requests that ended and were not collected yet


class Workload(NamedTuple):
    """n requests sorted by arrival; `chain[chain_starts[i]:chain_starts[i + 1]]` are the chained keys of request i."""

    index: npt.NDArray[np.int64]  # type: ignore[assignment]  # [n] the caller's number (hides tuple.index)
    arrival: npt.NDArray[np.float64]  # [n] seconds
    delivered: npt.NDArray[np.float64]  # [n] seconds; later than the arrival for one that must start again
    prompt: npt.NDArray[np.int64]  # [n] tokens
    output: npt.NDArray[np.int64]  # [n] tokens
    priority: npt.NDArray[np.int64]  # [n] lower first
    session: npt.NDArray[np.int64]  # [n]
    held: npt.NDArray[np.int8]  # [n] 1: ends only when told to
    replica: npt.NDArray[np.int64]  # [n] -1: the router decides
    adapter: npt.NDArray[np.int64]  # [n] identity of a LoRA adapter, 0 = none
    skips_lookup: npt.NDArray[np.int8]  # [n] 1: uses no cached prefix
    chain_starts: npt.NDArray[np.int64]  # [n + 1]
    chain: npt.NDArray[np.uint64]
    hash_tokens: npt.NDArray[np.int64]  # [n] tokens under one hash, 0 without hashes
    covered: npt.NDArray[np.int64]  # [n] leading tokens that the hashes identify


COMING = np.dtype([("time", np.float64), ("row", np.int64), ("replica", np.int64), ("slot", np.int64)])
"""A row of the workload that is to come: at this time if `slot` is -1, else not before.

It waits then for the request in `slot` of `replica`.
"""


class Loop(NamedTuple):
    """Turns under way: what the kernels read and write."""

    first_index: int  # of the requests that are waited for
    follower: npt.NDArray[np.int64]  # the row that waits for a request, by its index; -1: none
    think_seconds: npt.NDArray[np.float64]  # [n]
    frontend_seconds: float
    opens: npt.NDArray[np.int64]  # rows that wait for nobody, in order
    coming: Annotated[Records, COMING]  # a heap by time
    progress: npt.NDArray[np.int64]  # see kernels
    places: Annotated[Ints, "n, 2"]  # (replica, slot) of each row delivered


def copy_state(state: FleetState) -> FleetState:
    """A deep copy: what a fork is."""
    # As bytes: numpy copies records field by field, which takes thirteen times as long.
    copies = {name: array.view(np.uint8).copy().view(array.dtype) for name, array in state._asdict().items()}
    return FleetState(**copies)


def state_bytes(state: FleetState) -> int:
    """Memory held by the arrays, bytes."""
    return sum(array.nbytes for array in state)
