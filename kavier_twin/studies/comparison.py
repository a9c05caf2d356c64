"""Policies side by side on one trace: each at its own KV cache, and at multiples of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from pydantic import ValidationError

from kavier_twin.errors import UserError, problems_of
from kavier_twin.forecast.executors import ThreadExecutor
from kavier_twin.simulation.impact import impact_of_run
from kavier_twin.simulation.kpis import Counters, Kpis, kpis
from kavier_twin.simulation.policies import (
    POLICY_NAMES,
    Policy,
    PolicyError,
    apply_overrides,
    hypothetical_reasons,
    vllm_flags,
)
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.simulation.workload import Workload

_SAMPLES = 200  # of a run, so that carbon follows a changing intensity


class Point(NamedTuple):
    """A policy at one KV capacity."""

    factor: float  # of the policy's own blocks
    num_gpu_blocks: int
    capacity_tokens: int  # of one replica
    hit_ratio: float  # of prompt tokens, tiers behind the GPU included
    rejected: int  # requests larger than this cache; the hit ratio is of the others


@dataclass(frozen=True)
class Compared:
    """What a policy made of the trace, and how to deploy it."""

    policy: Policy
    settings: FleetSettings
    flags: tuple[str, ...]
    hypothetical: tuple[str, ...]  # why no flag of `vllm serve` deploys it; empty: deployable
    kpis: Kpis
    points: tuple[Point, ...]  # by capacity, ascending


def compare(
    base: FleetSettings,
    workload: Workload,
    policies: Sequence[Policy],
    factors: Sequence[float],
    *,
    workers: int,
    done: Callable[[int, int], None] = lambda done, of: None,
) -> list[Compared]:
    """Run the whole workload under every policy, and under every policy with its KV blocks times each factor.

    Settings that several ask for run once. Runs go on in `workers` threads; results do not depend on how many.
    `done` is told after each run how many are done, of how many. Raises PolicyError.
    """
    settings = [apply_overrides(base, policy.overrides) for policy in policies]
    scaled = [{factor: _with_blocks(own, factor) for factor in sorted(factors)} for own in settings]
    runs = {repr(one): one for own, sizes in zip(settings, scaled, strict=True) for one in (own, *sizes.values())}
    finished: list[str] = []

    def measure(key: str) -> Kpis:
        result = _measure(runs[key], workload)
        finished.append(key)  # atomic, unlike a counter
        done(len(finished), len(runs))
        return result

    measured = dict(zip(runs, ThreadExecutor(workers).run(lambda run, _: measure(run), list(runs)), strict=True))
    return [
        Compared(
            policy=policy,
            settings=own,
            flags=tuple(vllm_flags(base, own)),
            hypothetical=tuple(hypothetical_reasons(base, own)),
            kpis=measured[repr(own)],
            points=tuple(_point(factor, one, measured[repr(one)]) for factor, one in sizes.items()),
        )
        for policy, own, sizes in zip(policies, settings, scaled, strict=True)
    ]


def _with_blocks(settings: FleetSettings, factor: float) -> FleetSettings:
    blocks = max(2, round((settings.engine.num_gpu_blocks - 1) * factor) + 1)  # one is vLLM's null block
    return settings.model_copy(update={"engine": settings.engine.model_copy(update={"num_gpu_blocks": blocks})})


def _measure(settings: FleetSettings, workload: Workload) -> Kpis:
    start = float(workload.arrival[0])
    fleet = simulate(settings, workload, sample_seconds=(float(workload.arrival[-1]) - start) / _SAMPLES)
    return kpis(
        fleet.collect(),
        None,
        Counters.of(fleet.state, fleet.now_seconds),
        start_seconds=start,
        frontend_seconds=float(np.min(workload.delivered - workload.arrival)),
        impact=impact_of_run(fleet, start),
    )


def _point(factor: float, settings: FleetSettings, result: Kpis) -> Point:
    engine = settings.engine
    tokens = (engine.num_gpu_blocks - 1) * engine.block_size
    return Point(factor, engine.num_gpu_blocks, tokens, result.cache_hit_ratio, result.requests_rejected)


# --- the file of policies -----------------------------------------------------------------------------------------


def read_policies(path: Path, base: FleetSettings) -> tuple[Policy, ...]:
    """A YAML list of {name, overrides}, each applicable to `base`. Raises UserError that lists every problem."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the policies with --policies") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: expected a list of policies, each with a name and overrides")
    policies: list[Policy] = []
    problems: list[str] = []
    for number, entry in enumerate(content, 1):
        where = f"entry {number}"
        try:
            policy = Policy.model_validate(entry)
        except ValidationError as error:
            problems += [f"{where}: {problem}" for problem in problems_of(error, _field)]
            continue
        where += f" ({policy.name})"
        if any(policy.name == other.name for other in policies):
            problems.append(f"{where}: name: an entry before has the same; give it another")
        problems += [f"{where}: {problem}" for problem in _override_problems(base, policy)]
        policies.append(policy)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n".join([f"{path}: {count}", *(f"  {problem}" for problem in problems)]))
    return tuple(policies)


def _field(location: Sequence[int | str]) -> str:
    """Where in an entry; of a value that fits no type, pydantic names each type after the field."""
    return ".".join(str(part) for part in location[:2]) or "(entry)"


def _override_problems(base: FleetSettings, policy: Policy) -> list[str]:
    """Every override that cannot be on its own; if all can, what they cannot be together."""
    problems = []
    for name, value in policy.overrides.items():
        try:
            apply_overrides(base, {name: value})
        except PolicyError as error:
            if name not in POLICY_NAMES:
                close = difflib.get_close_matches(name, POLICY_NAMES, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(POLICY_NAMES)}"
                problems.append(f"overrides.{name}: unknown setting; {hint}")
            else:
                problems.append(f"overrides.{name}: {error}")
    if not problems:
        try:
            apply_overrides(base, policy.overrides)
        except PolicyError as error:
            problems.append(f"overrides: {error}")
    return problems


def as_document(compared: Compared) -> Mapping[str, Any]:
    """Plain JSON types."""
    return {
        "policy": compared.policy.name,
        "overrides": compared.policy.overrides,
        "deployable": not compared.hypothetical,
        "hypothetical": list(compared.hypothetical),
        "vllm_flags": list(compared.flags),
        "kpis": compared.kpis.to_dict(),
        "capacities": [point._asdict() for point in compared.points],
    }
