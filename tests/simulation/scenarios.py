"""Random fleets, workloads and operators for the property tests, and a driver that plays them.

A scenario is plain data, so that hypothesis can shrink it and print it. Times are random floats: nothing arrives at
the very moment a step ends, where the jump and the reference may fall on different sides by a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from kavier_twin.simulation import state as layout
from kavier_twin.simulation.fleet import Fleet, Live
from kavier_twin.simulation.policies import Override
from kavier_twin.simulation.settings import DiskTier, EngineSettings, FleetSettings, HostTier, StepTime
from kavier_twin.simulation.workload import Workload, make_workload


class Row(NamedTuple):
    """One request: its hash chain covers `covered` tokens; `full_hashes` is what it turns out to be at its end."""

    arrival: float
    prompt: int
    output: int
    hashes: tuple[int, ...]
    covered: int
    full_hashes: tuple[int, ...]
    priority: int
    session: int
    held: bool
    adapter: int = 0
    skips_lookup: bool = False


class Switch(NamedTuple):
    """A control event, given to the fleet before it runs."""

    time: float
    kind: str
    replica: int = -1
    overrides: tuple[tuple[str, Override], ...] = ()


class Stop(NamedTuple):
    """The fleet is stopped and looked at; then something may be done to live requests (numbered by index)."""

    time: float
    # "finish": end a held one; "finish_any": or another; "output": change a length; "let_go": hold it no more;
    # "fork": go on with a copy
    kind: str = "look"
    pick: int = 0
    output: int = 1
    learn: bool = False


@dataclass(frozen=True)
class Scenario:
    fleet: FleetSettings
    hash_tokens: int
    rows: tuple[Row, ...]
    switches: tuple[Switch, ...]
    stops: tuple[Stop, ...]

    def workload(self, rows: tuple[Row, ...] | None = None, first: int = 0) -> Workload:
        rows = self.rows if rows is None else rows
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row.hashes) for row in rows], out=starts[1:])
        return make_workload(
            [row.arrival for row in rows],
            [row.prompt for row in rows],
            [row.output for row in rows],
            chain=[key for row in rows for key in row.hashes],
            chain_starts=starts,
            hash_tokens=self.hash_tokens,
            covered=[row.covered for row in rows],
            priority=[row.priority for row in rows],
            session=[row.session for row in rows],
            held=[int(row.held) for row in rows],
            adapter=[row.adapter for row in rows],
            skips_lookup=[int(row.skips_lookup) for row in rows],
            index=np.arange(first, first + len(rows)),
        )

    def touches(self, *names: str) -> bool:
        """Whether a policy switch changes one of these settings."""
        return any(name in names for switch in self.switches for name, _ in switch.overrides)

    def has(self, kind: str) -> bool:
        return any(switch.kind == kind for switch in self.switches)


# --- strategies ---------------------------------------------------------------------------------------------------

STEP_TIMES = (
    StepTime(
        fixed=0.0101,
        per_prefill_token=1.1e-4,
        per_decode_sequence=1.3e-4,
        per_context_token=1.7e-6,
        per_prefill_attention=1.9e-8,
    ),
    StepTime(fixed=0.0103),  # every step the same
    StepTime(fixed=0.0011, per_context_token=1.01e-4),  # contexts dominate: the step time climbs quickly
    StepTime(fixed=0.0, per_prefill_token=1.2e-4, per_decode_sequence=1.01e-3),
    # memory-bound, then compute-bound: weights are read once, tokens cost from the sixth on
    StepTime(
        fixed=0.0007,
        per_context_token=1.3e-6,
        linear_scale=0.9,
        linear_layers=((1, 0.0052), (2, 0.0061), (6, 0.0093), (40, 0.0231)),
    ),
    StepTime(fixed=0.0, linear_layers=((4, 0.0103),)),
)
EVICTIONS = ["lru", "fifo", "lfu", "cost_aware", "belady", "ttl", "pinned", "slru", "arc", "sieve", "s3fifo"]
GAPS_SECONDS = (0.0, 0.003, 0.05, 2.0)  # together, within a step, within some steps, when the queue is empty


@st.composite
def engines(draw: st.DrawFn, block_size: int, rows: tuple[Row, ...]) -> EngineSettings:
    """An engine for these requests, more often than not with just enough memory for the largest."""
    largest = max(-(-(row.prompt + row.output) // block_size) for row in rows)
    spare = draw(st.sampled_from([3, 0, 1, 8, 20, 400, -2]))
    chunked = draw(st.sampled_from([True, True, True, False]))
    budgets = [2048, 64, 17, 5] if chunked else [2048, 2048, 64]
    return EngineSettings(
        vllm=draw(st.sampled_from(["0.32", "0.33"])),
        max_num_active_seqs=draw(st.sampled_from([None, None, 3])),
        block_size=block_size,
        num_gpu_blocks=max(4, largest + 1 + spare),
        max_num_seqs=draw(st.sampled_from([64, 16, 4, 2, 1])),
        max_num_batched_tokens=draw(st.sampled_from(budgets)),
        max_model_len=draw(st.sampled_from([100_000, 100_000, 100_000, 150])),
        prefix_caching=draw(st.sampled_from([True, True, True, False])),
        async_scheduling=draw(st.booleans()),
        enable_chunked_prefill=chunked,
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 2, 16])),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.1, 0.3])),
        scheduler_reserve_full_isl=draw(st.sampled_from([True, True, False])),
        eviction=draw(evictions()),
        eviction_ttl_seconds=draw(st.sampled_from([0.3137, 0.0519, 3.0743])),
        eviction_pinned_tokens=draw(st.sampled_from([64, 0, 10_000])),
        eviction_pinned_share=draw(st.sampled_from([0.25, 1.0, 0.05])),
        **draw(tiers()),
    )


PAGE_GIB = 4096 / 2**30  # with KV_BYTES_PER_TOKEN, a chunk takes few pages whatever the block size
KV_BYTES_PER_TOKEN = 256


@st.composite
def tiers(draw: st.DrawFn) -> dict[str, Any]:
    """Tiers of a few chunks behind links from far slower to far faster than a step; often none."""
    if draw(st.sampled_from([True, False, False])):
        return {"kv_bytes_per_token": KV_BYTES_PER_TOKEN}
    disk = draw(st.sampled_from([False, False, True]))
    host = HostTier(
        capacity_gib=PAGE_GIB * draw(st.sampled_from([40, 12, 4, 150])),
        blocks_per_chunk=draw(st.sampled_from([1, 1, 2, 3])),
        eviction_policy=draw(st.sampled_from(["lru", "arc"])),
        store_threshold=draw(st.sampled_from([0, 0, 2, 3])) if not disk else 0,
        max_tracker_size=draw(st.sampled_from([100, 7])),
        offload_prompt_only=draw(st.sampled_from([True, True, False])),
        bytes_per_second=draw(st.sampled_from([1.1e6, 1.3e5, 1e12])),
        latency_seconds=draw(st.sampled_from([0.0007, 0.0, 0.031])),
    )
    behind = DiskTier(
        capacity_gib=PAGE_GIB * draw(st.sampled_from([100, 9])),
        read_bytes_per_second=draw(st.sampled_from([1.7e6, 2.1e5])),
        write_bytes_per_second=draw(st.sampled_from([0.9e6, 1.9e5])),
        latency_seconds=draw(st.sampled_from([0.0013, 0.0])),
    )
    return {
        "kv_bytes_per_token": KV_BYTES_PER_TOKEN,
        "host_tier": host,
        "disk_tier": behind if disk else None,
    }


def evictions() -> st.SearchStrategy[str]:
    """An eviction policy, vLLM's as often as any other."""
    return st.one_of(st.just("lru"), st.sampled_from(EVICTIONS), st.sampled_from(EVICTIONS))


@st.composite
def requests(draw: st.DrawFn, block_size: int, hash_tokens: int, *, held: bool, most: int) -> tuple[Row, ...]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cover = draw(st.sampled_from(["prompt+output", "prompt", "prompt+output", "prompt", "shared", "nothing"]))
    spread = draw(st.sampled_from([1.0, 0.2, 3.0]))
    unit = st.integers(0, 10)
    sketch = st.tuples(
        st.sampled_from([1, 0, 1, 2, 2, 2, 3]),  # gap
        st.integers(0, 3),  # family of shared prefixes, or how far back its parent is
        unit,  # shared hash blocks
        st.integers(0, 7),  # blocks of its own
        st.sampled_from([0, 1, -1, 2, 3]),  # tokens beyond
        st.one_of(st.integers(1, 60), st.integers(1, 60), st.just(1)),  # output
        st.integers(0, 2),  # priority
        st.sampled_from(["family", "family", "parent", "alone"]),
        st.booleans() if held else st.just(False),
        st.integers(0, 3),  # adapter
        st.sampled_from([False, False, False, True]),  # reads no cached prefix
    )
    time = float(rng.uniform(0.0, 0.5))
    rows: list[Row] = []
    count = draw(st.integers(1, most))
    for gap, family, shared, own, beyond, output, priority, origin, is_held, adapter, skips in draw(
        st.lists(sketch, min_size=count, max_size=count)
    ):
        time += GAPS_SECONDS[gap] * spread * float(rng.uniform(0.5, 1.5))
        number = len(rows)
        known: tuple[int, ...] = ()
        session = number + 100
        if origin == "parent" and family < number:
            parent = rows[-1 - family]
            session = parent.session
            past = parent.prompt + parent.output
            if past < 200:
                known = parent.full_hashes[: past // hash_tokens]
                own_tokens = past + own * block_size + beyond
            else:
                own_tokens = own * block_size + beyond
        else:
            shared = min(shared, 64 // hash_tokens + 1)
            if origin == "family":
                known = tuple(1 + 1000 * family + link for link in range(shared))
                session = family
            own_tokens = len(known) * hash_tokens + own * block_size + beyond
        prompt = max(1, own_tokens)
        total = prompt + output
        known = known[: prompt // hash_tokens]
        fresh = tuple(1_000_000 * (number + 1) + link for link in range(total // hash_tokens + 1))
        full = known + fresh[len(known) : total // hash_tokens]
        if cover == "nothing":
            hashes, covered, full = (), 0, ()
        elif cover == "shared":
            hashes, covered, full = known, len(known) * hash_tokens, known
        elif cover == "prompt" or is_held:
            whole = prompt // hash_tokens if is_held else -(-prompt // hash_tokens)
            hashes = (known + fresh[len(known) :])[:whole]
            covered = min(prompt, whole * hash_tokens)
        else:
            hashes, covered = full, len(full) * hash_tokens
        rows.append(Row(time, prompt, output, hashes, covered, full, priority, session, is_held, adapter, skips))
    return tuple(rows)


def policies() -> st.SearchStrategy[dict[str, Override]]:
    """One change of policy; every value is valid whatever the others are."""
    return st.one_of(
        st.builds(lambda value: {"num_gpu_blocks": value}, st.integers(5, 80)),
        st.builds(lambda value: {"num_gpu_blocks": value}, st.just("2x")),
        st.builds(lambda value: {"block_size": value}, st.sampled_from([2, 4, 8, 16])),
        st.builds(lambda value: {"async_scheduling": value}, st.booleans()),
        st.builds(lambda value: {"prefix_caching": value}, st.booleans()),
        st.builds(lambda value: {"max_num_seqs": value}, st.sampled_from([1, 3, 64])),
        st.builds(lambda value: {"max_num_batched_tokens": value}, st.sampled_from([4, 64, 2048])),
        st.builds(lambda value: {"scheduling_policy": value}, st.sampled_from(["fcfs", "priority"])),
        st.builds(lambda value: {"vllm": value}, st.sampled_from(["0.32", "0.33"])),
        st.builds(lambda value: {"watermark": value}, st.sampled_from([0.0, 0.2])),
        st.builds(lambda value: {"replicas": value}, st.integers(1, 4)),
        st.builds(lambda value: {"router": value}, st.sampled_from(ROUTERS)),
        st.builds(lambda value: {"eviction": value}, st.sampled_from(EVICTIONS)),
        st.builds(lambda value: {"eviction": value, "num_gpu_blocks": "0.8x"}, st.sampled_from(EVICTIONS)),
        st.just({"kv_cache_dtype": "fp8"}),
        st.just({"step_time.fixed": "2x", "step_time.per_context_token": "0.5x"}),
        st.just({"scheduler_reserve_full_isl": False, "long_prefill_token_threshold": 5}),
        st.just({"max_model_len": 80}),
        st.builds(
            lambda pages, policy: {"host_tier.capacity_gib": PAGE_GIB * pages, "host_tier.eviction_policy": policy},
            st.sampled_from([500, 8, 60]),
            st.sampled_from(["lru", "arc"]),
        ),
        st.just({"host_tier.capacity_gib": 0, "disk_tier.capacity_gib": 0}),
    )


ROUTERS = ["prefix_aware", "round_robin", "least_loaded", "session_affinity"]


@st.composite
def scenarios(
    draw: st.DrawFn,
    *,
    control: bool = False,
    held: bool = False,
    replicas: int = 4,
    most: int = 36,
    kinds: tuple[str, ...] = ("look",),
) -> Scenario:
    """`control`: control events. `held`: requests that end from outside. `kinds`: what is done at the stops."""
    size = draw(st.sampled_from([4, 16, 1, 7]))
    hash_tokens = draw(st.sampled_from([size, 2 * size, 4 * size, max(1, size // 2), size + 3]))
    rows = draw(requests(size, hash_tokens, held=held, most=most))
    engine = draw(engines(size, rows))
    if not control and engine.host_tier is None:  # a policy may bring a tier, which excludes `max_loras`
        engine = engine.model_copy(update={"max_loras": draw(st.sampled_from([0, 1, 2]))})
    if control or (engine.scheduling_policy == "priority" and not engine.scheduler_reserve_full_isl):
        # vLLM's `max` picks the first of equals as the victim: without the gate, two prompts of equal priority and
        # arrival that do not fit together preempt each other for ever, here as there.
        rows = tuple(row._replace(arrival=row.arrival + 1.1e-7 * number) for number, row in enumerate(rows))
    fleet = FleetSettings(
        replicas=draw(st.sampled_from([1, 1, *range(2, replicas + 1)])),
        engine=engine,
        step_time=draw(st.sampled_from(STEP_TIMES)),
        router=draw(st.sampled_from(ROUTERS)),
        router_max_imbalance=draw(st.sampled_from([8, 0, 1])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    horizon = rows[-1].arrival + 0.5

    def when() -> float:
        return float(rng.uniform(0.0, horizon))

    switches = []
    if control:
        untouched = list(range(fleet.replicas))
        for kind in draw(st.lists(st.sampled_from(["policy", "policy", "join", "drain", "leave", "fail"]), max_size=4)):
            if kind == "policy":
                switches.append(Switch(when(), kind, overrides=tuple(draw(policies()).items())))
            elif kind == "join":
                switches.append(Switch(when(), kind))
            elif untouched:
                replica = untouched.pop(draw(st.integers(0, len(untouched) - 1)))
                switches.append(Switch(when(), kind, replica))
        if any(name == "replicas" for switch in switches for name, _ in switch.overrides):
            # A changed number of replicas retires some on its own: naming one by number is an error then.
            switches = [switch for switch in switches if switch.kind in ("policy", "join")]
    stop = st.builds(
        lambda kind, pick, output, learn: (kind, pick, output, learn),
        st.sampled_from(kinds),
        st.integers(0, 5),
        st.integers(1, 60),
        st.booleans(),
    )
    chosen = draw(st.lists(stop, min_size=1, max_size=8 if held else 4))
    times = sorted(when() for _ in chosen)
    stops = tuple(Stop(time, *what) for time, what in zip(times, chosen, strict=True))
    return Scenario(fleet, hash_tokens, rows, tuple(switches), stops)


# --- playing ------------------------------------------------------------------------------------------------------


@dataclass
class Player:
    """Plays a scenario on one fleet, stop by stop."""

    scenario: Scenario
    stepping: bool = False
    fleet: Fleet = field(init=False)
    given: dict[int, int] = field(init=False)  # how many tokens a request ended by `finish` has, by index
    resumed_from: float = math.inf  # when a replica stood still that `set_output` let go on

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.scenario.fleet, stepping=self.stepping)
        self.given = {}
        for switch in self.scenario.switches:
            match switch.kind:
                case "join":
                    self.fleet.at(switch.time, Fleet.add)
                case "policy":
                    self.fleet.at(switch.time, Fleet.apply, dict(switch.overrides))
                case "drain":
                    self.fleet.at(switch.time, Fleet.accept, switch.replica, False)
                case "leave":
                    self.fleet.at(switch.time, Fleet.let_go, switch.replica)
                case _:
                    self.fleet.at(switch.time, Fleet.crash, switch.replica)
        first = self.scenario.stops[0].time
        rows = self.scenario.rows
        self._later = next((at for at, row in enumerate(rows) if row.arrival >= first), len(rows))
        self.fleet.feed(self.scenario.workload(rows[: self._later]))

    def play(self, look: Callable[[Player], None]) -> None:
        """Run to every stop, `look`, do what the stop says, `look` again; at last run to the end."""
        for stop in self.scenario.stops:
            self.fleet.run(stop.time)
            look(self)
            if self._later is not None:
                self.fleet.feed(self.scenario.workload(self.scenario.rows[self._later :], self._later))
                self._later = None
            if self._do(stop):
                look(self)
        # Not without limit while one is held: requests behind it may be admitted and preempted for ever.
        self.fleet.run(max(self.fleet.now_seconds, self.scenario.rows[-1].arrival) + 1.0)
        while held := self._held():
            self._finish(held[0], self.scenario.rows[held[0].index].output, learn=False)
            look(self)
            self.fleet.run(self.fleet.now_seconds + 0.1)
        self.fleet.run()
        look(self)

    def _held(self) -> list[Live]:
        requests = self.fleet.state.requests
        return sorted(live for live in self.fleet.live() if requests[live.replica, live.slot]["held"])

    def _do(self, stop: Stop) -> bool:
        if stop.kind == "fork":
            self.fleet = self.fleet.fork()
            return False
        chosen = sorted(self.fleet.live()) if stop.kind == "finish_any" else self._held()
        if stop.kind == "look" or not chosen:
            return False
        live = chosen[stop.pick % len(chosen)]
        if stop.kind in ("finish", "finish_any"):
            self._finish(live, stop.output, stop.learn)
        else:
            row = self.fleet.state.requests[live.replica, live.slot]
            generated = int(row["tokens"] - row["prompt"])
            replica = self.fleet.state.replicas[live.replica]
            if replica["parked"]:
                self.resumed_from = min(self.resumed_from, float(replica["now"]))
            self.fleet.set_output(live, generated + stop.output)
            done = row["tokens"] >= row["prompt"] + row["output"]  # at max_model_len: no step would end it
            row["held"] = row["held"] and (stop.kind != "let_go" or done)
        return True

    def _finish(self, live: Live, output: int, learn: bool) -> None:
        row, size = self.scenario.rows[live.index], self.scenario.hash_tokens
        links = (row.prompt + output) // size
        known = (row.full_hashes + tuple(2_000_000_000 + live.index * 1000 + link for link in range(links)))[:links]
        chain = None
        if learn and row.hashes and known[: len(row.hashes)] == row.hashes:
            chain = make_workload([0.0], 1, 1, chain=known, chain_starts=[0, links]).chain
        self.given[live.index] = output
        self.fleet.finish(live, output, chain, min(links * size, row.prompt + output))


def outcomes_by_index(fleet: Fleet) -> Any:
    """Collect, sorted by index."""
    rows = fleet.collect()
    return rows[np.argsort(rows["index"], kind="stable")]


def is_stuck(fleet: Fleet) -> bool:
    """Whether a prompt that exceeds the budget without chunked prefill blocks a queue for ever, as it would vLLM's."""
    return not fleet.settings.engine.enable_chunked_prefill and bool((fleet.state.replicas["parked"] == 1).any())


__all__ = [
    "Player",
    "Row",
    "Scenario",
    "Stop",
    "Switch",
    "is_stuck",
    "layout",
    "outcomes_by_index",
    "scenarios",
]
