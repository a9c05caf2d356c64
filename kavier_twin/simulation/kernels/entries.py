"""What Python calls of the kernels, and in which library each is."""

from typing import Annotated

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.compiler.kernel import entry
from kavier_twin.simulation.compiler.reference import by_reference
from kavier_twin.simulation.kernels import ENGINE, FLEET, POLICIES, TIERS
from kavier_twin.simulation.kernels.cache import holders, keys
from kavier_twin.simulation.kernels.cache.eviction import belady, switch
from kavier_twin.simulation.kernels.fleet import arrivals, closed_loop
from kavier_twin.simulation.kernels.step import flow, replica, requests, reshape
from kavier_twin.simulation.state import BLOCK, FUTURE, FleetState, Ints, Loop, Records, Workload

# --- a fleet through time ---------------------------------------------------------------------------------------------


@entry(FLEET)
def arrive(
    state: FleetState, workload: Workload, start: int, stop: int, places: Annotated[Ints, "rows, 2"]
) -> tuple[int, int]:
    """Deliver rows [start, stop) of a workload sorted by delivery.

    `places[row]` gets (replica, slot) of each, slot -1 if it was rejected at once. Returns (rows delivered + start,
    status): a status other than OK names what must grow before going on, or is NO_REPLICA for a row that none takes.
    """
    return arrivals.arrive(by_reference(state), by_reference(workload), start, stop, places)


@entry(FLEET)
def advance_all(state: FleetState, until: float) -> None:
    """Run every replica up to `until` (infinity: until all their requests ended)."""
    arrivals.advance_all(by_reference(state), until)


@entry(ENGINE)
def advance_until_end(state: FleetState, number: int, until: float) -> None:
    """Run a replica up to `until`, or to the moment one of its requests ends if that comes before."""
    replica.advance_until_end(by_reference(state), number, until)


@entry(FLEET)
def run_closed_loop(
    state: FleetState,
    workload: Workload,
    think: npt.NDArray[np.float64],
    frontend_seconds: float,
    pending: npt.NDArray[np.int64],
    progress: npt.NDArray[np.int64],
    places: Annotated[Ints, "rows, 2"],
) -> int:
    """Send all requests of the workload and run until the last has ended.

    `pending` [rows] begins with the rows whose arrival is known, by arrival. The arrival of every other row is
    written when the request before it ended, `think[row]` seconds later; it reaches the router `frontend_seconds` after
    that. `places` is for `arrive`. Returns a status: any but OK names what must grow before calling again.
    """
    return closed_loop.run_closed_loop(
        by_reference(state), by_reference(workload), think, frontend_seconds, pending, progress, places
    )


@entry(FLEET)
def deliver_turns(state: FleetState, workload: Workload, loop: Loop, until: float) -> tuple[int, int]:
    """Deliver all rows that come before `until`, those that wait for an end included; replicas are up to date before.

    Returns (row, status), status being OK, a name of what must grow before calling again, or NO_REPLICA for a row that
    none would take; that row is done with.
    """
    return closed_loop.deliver_turns(by_reference(state), by_reference(workload), by_reference(loop), until)


@entry(FLEET)
def hear_of_ends(state: FleetState, workload: Workload, loop: Loop) -> None:
    """Turns after the requests that ended since the last time have a time now."""
    closed_loop.hear_of_ends(by_reference(state), by_reference(workload), by_reference(loop))


# --- what the outside world tells of requests -------------------------------------------------------------------------


@entry(ENGINE)
def set_output(state: FleetState, number: int, slot: int, output: int, final: bool) -> int:
    """Change how many tokens a live request will generate. Returns OK or GROW_ARENA (then nothing changed).

    Never below what is delivered and in flight, unless it is `final`: the caller ends the request at once.
    """
    return replica.set_output(by_reference(state), number, slot, output, final)


@entry(ENGINE)
def learn_chain(state: FleetState, number: int, slot: int, chain: npt.NDArray[np.uint64], covered: int) -> int:
    """The content of prompt and output became known: identify the blocks that were private until now.

    `chain` is the whole chain of keys (`chain_keys`), of prompt and output. Returns OK or GROW_ARENA (then nothing
    changed).
    """
    return replica.learn_chain(by_reference(state), number, slot, chain, covered)


@entry(ENGINE)
def finish_now(state: FleetState, number: int, slot: int, time: float) -> None:
    """End a live request now, as a finish record says it did.

    The caller advanced the replica to `time` and set the request's true output. If the simulation is behind, it
    catches up, all requests together; what then is still missing is completed for this request alone (a request still
    waiting is admitted on the spot), so that the cache holds what the real one holds.
    """
    replica.finish_now(by_reference(state), number, slot, time)


@entry(ENGINE)
def abandon(state: FleetState, number: int, slot: int, time: float) -> None:
    """Drop a live request without a trace: it will start again elsewhere, or be reported lost by the caller."""
    replica.abandon(by_reference(state), number, slot, time)


# --- changing a replica -----------------------------------------------------------------------------------------------


@entry(ENGINE)
def settle(state: FleetState, number: int) -> None:
    """Complete the batches in flight without scheduling more, every request spelled out."""
    replica.settle(by_reference(state), number)


@entry(ENGINE)
def dissolve_flow(state: FleetState, number: int) -> None:
    """Make every request of the flow an ordinary one."""
    flow.dissolve_flow(by_reference(state), number)


@entry(ENGINE)
def preempt_last(state: FleetState, number: int) -> None:
    """Preempt the last running request (the replica is settled: nothing is in flight)."""
    reshape.preempt_last(by_reference(state), number)


@entry(ENGINE)
def clear_cache(state: FleetState, number: int) -> None:
    """Forget everything cached. Blocks in use keep their content for their own requests only."""
    reshape.clear_cache(by_reference(state), number)


@entry(ENGINE)
def resize_pool(
    state: FleetState,
    number: int,
    blocks: Annotated[Records, BLOCK],
    buckets: Ints,
    new_count: int,
    names: Ints,
    working: npt.NDArray[np.uint64],
) -> None:
    """Move a settled replica's cache into `blocks` and `buckets`, zeroed arrays for `new_count` blocks.

    The least recently used evictable blocks go first when it shrinks, then running requests from the last; new
    blocks come to the head of the free list when it grows. `names` (zeroed) and `working` are working space, one cell
    for each old block.
    """
    reshape.resize_pool(by_reference(state), number, blocks, buckets, new_count, names, working)


@entry(ENGINE)
def reorder_queue(state: FleetState, number: int) -> None:
    """Restore the queue's order after the scheduling policy changed."""
    reshape.reorder_queue(by_reference(state), number)


# --- cached blocks ----------------------------------------------------------------------------------------------------


@entry(ENGINE)
def chain_keys(hashes: npt.NDArray[np.uint64], starts: npt.NDArray[np.int64]) -> None:
    """Turn the content hashes of many requests, `hashes[starts[i]:starts[i + 1]]`, into chained keys in place."""
    keys.chain_keys(hashes, starts)


@entry(ENGINE)
def chain_key(parent: np.uint64, content: np.uint64) -> np.uint64:
    """Key of a hash block with this content behind that parent (0 for the first): vLLM chains hashes the same way."""
    return keys.chain_key(parent, content)


@entry(ENGINE)
def enter_blocks(state: FleetState, number: int, blocks: Ints, content: npt.NDArray[np.uint64]) -> None:
    """These blocks, which hold nothing, hold what these keys name."""
    reshape.enter_blocks(by_reference(state), number, blocks, content)


@entry(ENGINE)
def count_all(state: FleetState) -> None:
    """Count anew who holds what in a fleet that counts: router, replicas or caches have changed."""
    holders.count_all(by_reference(state))


# --- eviction policies other than LRU ---------------------------------------------------------------------------------


@entry(POLICIES)
def unload_policy(state: FleetState, number: int) -> None:
    """Put every evictable block into the free list, in the order in which the policy would evict. LRU from now on."""
    switch.unload(by_reference(state), number)


@entry(POLICIES)
def load_policy(state: FleetState, number: int, time: float) -> None:
    """Fill the policy's structures, which are new: as if the blocks had entered in the order of the free list.

    What happened to them before (hits, their place in their chain) is not known any more.
    """
    switch.load(by_reference(state), number, time)


@entry(POLICIES)
def fill_oracle(future: Annotated[Records, FUTURE], content: npt.NDArray[np.uint64]) -> None:
    """Build Belady's table over `content`, the hash of each row of the uses, in which equal ones stand together."""
    belady.fill_oracle(future, content)


@entry(POLICIES)
def learn_uses(state: FleetState, number: int, time: float) -> None:
    """The uses after `time` became known: what is cached is wanted at the first of them."""
    belady.learn(by_reference(state), number, time)


# --- host and disk tiers ----------------------------------------------------------------------------------------------


@entry(TIERS)
def carry_over(before: FleetState, state: FleetState, number: int) -> None:
    """Fill a replica's cold tiers with what still fits of what they held `before`, with no transfer under way."""
    reshape.carry_over(by_reference(before), by_reference(state), number)


@entry(TIERS)
def clear_marks(state: FleetState, number: int, slot: int) -> None:
    """No chunk of the request is marked yet."""
    requests.clear_marks(by_reference(state), number, slot)


@entry(TIERS)
def settle_tiers(state: FleetState, number: int) -> None:
    """Let a settled replica's transfers be complete, and its requests that load go back to the queue."""
    replica.settle_tiers(by_reference(state), number)
