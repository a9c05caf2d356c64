"""(h) A forecast: 100 replicas, 50 requests/s, 30 minutes, 16 policies, 8 scenarios, from a fork of a warm fleet.

Chat sessions on the default engine: one of a few system prompts, turns that hold all that was said before. The fleet
has served them for ten minutes. Then the sweep itself, its parts, and a what-if of one policy on the same state.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np

from benchmarks.common import BLOCK_TOKENS, compile_kernels, report
from kavier_twin.forecast import sweep as sweep_module
from kavier_twin.forecast.executors import ThreadExecutor
from kavier_twin.forecast.kpis import measure
from kavier_twin.forecast.scenarios import Scenarios
from kavier_twin.forecast.settings import ForecastSettings
from kavier_twin.forecast.slo import DEFAULT_SLOS
from kavier_twin.forecast.sweep import draw, sweep
from kavier_twin.forecast.whatif import Question, answer
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.kpis import Counters
from kavier_twin.simulation.policies import DEFAULT_POLICIES, Policy
from kavier_twin.simulation.workload import Workload, make_workload, take_rows

REPLICAS, RATE_PER_SECOND, FUTURES = 100, 50.0, 8
SYSTEMS, SYSTEM_TOKENS = 50, 256
WARM_SECONDS, RECENT_SECONDS = 600.0, 100.0  # 5,000 requests, as many as the mirror keeps
HORIZON_SHARES = (1 / 30, 1 / 6, 1 / 2, 1.0)
TARGET_SECONDS, WHAT_IF_TARGET_SECONDS = 30.0, 2.0
POLICIES = (
    *DEFAULT_POLICIES,
    Policy(name="quarter_kv_capacity", overrides={"num_gpu_blocks": "0.25x"}),
    Policy(name="more_kv_capacity", overrides={"num_gpu_blocks": "1.5x"}),
    Policy(name="double_max_num_seqs", overrides={"max_num_seqs": "2x"}),
    Policy(name="half_batched_tokens", overrides={"max_num_batched_tokens": "0.5x"}),
    Policy(name="double_batched_tokens", overrides={"max_num_batched_tokens": "2x"}),
    Policy(name="fewer_replicas", overrides={"replicas": "0.8x"}),
    Policy(name="more_replicas", overrides={"replicas": "1.2x"}),
    Policy(name="session_affinity", overrides={"router": "session_affinity"}),
    Policy(name="least_loaded", overrides={"router": "least_loaded"}),
    Policy(name="round_robin", overrides={"router": "round_robin"}),
)
Result = TypeVar("Result")


def chat(seconds: float, seed: int = 1) -> Workload:
    """Sessions of four turns on average, some 30 s apart, each beginning with one of 50 system prompts of 512 tokens.

    A turn holds all that was said before, a message of 150 tokens on average, and is answered by 200.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple[float, int, int, int, int]] = []  # arrival, prompt, output, session, system prompt
    for session in range(int(RATE_PER_SECOND / 4 * (seconds + 120.0))):
        at, tokens, system = rng.uniform(-120.0, seconds), SYSTEM_TOKENS, int(rng.integers(SYSTEMS))
        for _ in range(rng.geometric(0.25)):
            prompt, output = tokens + 16 + int(rng.geometric(1 / 134)), int(rng.geometric(1 / 200))
            rows.append((at, prompt, output, session, system))
            tokens = prompt + output
            at += 10.0 + rng.exponential(20.0)
    rows = sorted(row for row in rows if 0.0 <= row[0] < seconds)
    arrival, prompt, output, session, system = (np.array(column) for column in zip(*rows, strict=True))
    keys = (prompt + output) // BLOCK_TOKENS
    starts = np.concatenate([[0], np.cumsum(keys)])
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], keys)
    own = ((1 + np.repeat(session, keys)) << 20) + place
    shared = np.repeat(system, keys) * 64 + place + 1
    return make_workload(
        arrival,
        prompt,
        output,
        chain=np.where(place < SYSTEM_TOKENS // BLOCK_TOKENS, shared, own),
        chain_starts=starts,
        hash_tokens=BLOCK_TOKENS,
        covered=keys * BLOCK_TOKENS,
        session=session,
    )


def warm_snapshot(replicas: int) -> Snapshot:
    """The fleet after ten minutes, with what is in flight."""
    workload = chat(WARM_SECONDS)
    fleet = Fleet(DEFAULT_FLEET.model_copy(update={"replicas": replicas}))
    fleet.feed(workload)
    fleet.run(WARM_SECONDS)
    outcomes = fleet.collect()
    recent = take_rows(workload, np.flatnonzero(workload.arrival >= WARM_SECONDS - RECENT_SECONDS))
    recent = recent._replace(output=np.where(np.isin(recent.index, outcomes["index"]), recent.output, 0))
    ended = np.full(workload.index.size, np.nan)
    ended[outcomes["index"]] = outcomes["finish"]
    return Snapshot(
        "benchmark",
        WARM_SECONDS,
        fleet,
        recent,
        RECENT_SECONDS,
        0.0,
        calibrated=True,
        ended_seconds=ended[recent.index],
    )


def seconds_of(work: Callable[[], Result]) -> tuple[Result, float, float]:
    """What it returns, CPU seconds of all threads and wall-clock seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, time.process_time() - cpu, time.perf_counter() - wall


@contextmanager
def split() -> Iterator[dict[str, float]]:
    """CPU seconds that the parts of a sweep take meanwhile, over all threads."""
    seconds: dict[str, float] = defaultdict(float)
    lock = Lock()

    def watched(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return work(*args, **named)
            finally:
                with lock:
                    seconds[part] += time.thread_time() - began

        return run

    parts = [
        ("scenarios", Scenarios, "draw"),
        ("forks, policies", Fleet, "fork"),
        ("forks, policies", Fleet, "apply"),
        ("simulation", Fleet, "run"),
        ("simulation", Fleet, "collect"),
        ("KPIs", sweep_module, "measure"),
        ("KPIs", sweep_module, "trimmed"),
    ]
    with ExitStack() as patches:
        for part, owner, name in parts:
            patches.enter_context(patch.object(owner, name, watched(part, getattr(owner, name))))
        yield seconds


def main() -> None:
    """Run it; `--replicas` and the like make it smaller."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=REPLICAS)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--policies", type=int, default=len(POLICIES))
    parser.add_argument("--scenarios", type=int, default=FUTURES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parts", action="store_true", help="one policy's parts alone")
    args = parser.parse_args()
    compile_kernels()
    snapshot = warm_snapshot(args.replicas)
    horizons = tuple(60.0 * args.minutes * share for share in HORIZON_SHARES)
    executor = ThreadExecutor(args.workers)
    settings = ForecastSettings(
        horizons_seconds=horizons,
        scenarios=args.scenarios,
        least_scenarios=args.scenarios,
        policies=POLICIES[: args.policies],
    )
    short = settings.model_copy(update={"horizons_seconds": (1.0,), "scenarios": 1})
    sweep(snapshot, short, executor)  # the rest of the kernels

    rows: list[dict[str, Any]] = []

    def tell(part: str, cpu: float, wall: float, target: float | str = "") -> None:
        rows.append({"part": part, "CPU s": cpu, "wall s": wall, "target wall s": target})

    scenario, cpu, wall = seconds_of(lambda: next(draw(snapshot, horizons[-1], [0], 0)))
    tell(f"one scenario ({scenario.workload.index.size} requests)", cpu, wall)
    fleet, cpu, wall = seconds_of(scenario.present.fork)
    tell("one fork", cpu, wall)
    before = Counters.of(fleet.state, fleet.now_seconds)
    fleet.feed_sessions(scenario.workload, scenario.turns)
    _, cpu, wall = seconds_of(lambda: fleet.run(WARM_SECONDS + horizons[-1]))
    tell("one simulation", cpu, wall)
    outcomes = fleet.collect()
    _, cpu, wall = seconds_of(lambda: measure(fleet, before, outcomes, 0.0))
    tell("KPIs at the last horizon", cpu, wall)
    question = Question(overrides={"kv_cache_dtype": "fp8"}, horizon_seconds=horizons[-1])
    _, cpu, wall = seconds_of(lambda: answer(snapshot, question, DEFAULT_SLOS, executor))
    tell("what-if of one policy", cpu, wall, WHAT_IF_TARGET_SECONDS)
    if not args.parts:
        with split() as of_parts:
            _, cpu, wall = seconds_of(lambda: sweep(snapshot, settings, executor))
        tell(f"sweep, {args.policies} policies, {args.scenarios} scenarios", cpu, wall, TARGET_SECONDS)
        for part, seconds in of_parts.items():
            rows.append({"part": f"  of it {part}", "CPU s": seconds, "wall s": "", "target wall s": ""})
    size = f"{args.replicas} replicas, {args.workers} threads, {args.minutes:g} minutes"
    report("(h) a forecast's sweep", rows, size)


if __name__ == "__main__":
    main()
