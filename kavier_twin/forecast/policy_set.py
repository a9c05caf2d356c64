"""The policies a pool is forecast under, as they are set and as they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kavier_twin.simulation.policies import (
    POLICY_NAMES,
    Override,
    Policy,
    PolicyError,
    apply_overrides,
    hypothetical_reasons,
    vllm_flags,
)
from kavier_twin.simulation.settings import FleetSettings

SETTINGS: Final = POLICY_NAMES
"""What a policy may override."""
MOST_POLICIES: Final = 64
MOST_BLOCKS: Final = 20_000_000
"""In all replicas: each takes some 40 bytes in every fork. A live fleet may have more and be doubled."""


class PolicySet(BaseModel):
    """Policies with different names, one of which is today's."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "policies": [
                        {"name": "today"},
                        {"name": "more_kv", "overrides": {"num_gpu_blocks": "1.5x"}},
                        {"name": "fp8_kv_cache", "overrides": {"kv_cache_dtype": "fp8"}},
                    ]
                }
            ]
        },
    )

    policies: tuple[Policy, ...] = Field(
        min_length=1,
        max_length=MOST_POLICIES,
        description="Policies with unique names. The one without overrides is the current policy, against which the "
        "others are compared.",
    )

    @field_validator("policies")
    @classmethod
    def _one_is_today(cls, policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
        return with_today(policies)


@dataclass(frozen=True)
class PolicyInForce:
    """A policy that is forecast, and how it would be deployed on the fleet as it is."""

    name: Annotated[str, Field(examples=["half_max_num_seqs"])]
    overrides: Annotated[Mapping[str, Override], Field(examples=[{"max_num_seqs": "0.5x"}])]
    flags: Annotated[tuple[str, ...], Field(description="Flags of `vllm serve`.", examples=[["--max-num-seqs 128"]])]
    deployable: Annotated[bool, Field(description="Whether the flags deploy the whole policy.", examples=[True])]
    problem: Annotated[str, Field(description="Why the policy cannot be applied. Empty if it can.", examples=[""])] = ""


@dataclass(frozen=True)
class Policies:
    """Those that a pool is forecast under, and where they come from."""

    policies: tuple[PolicyInForce, ...]
    configured: Annotated[
        bool,
        Field(
            description="Whether the policy comes from the settings file. False: it was set through this API.",
            examples=[False],
        ),
    ]
    kept: Annotated[
        bool,
        Field(
            description="Whether the policies survive a restart of the twin, as long as the policies in the settings "
            "file do not change. False: there are no checkpoints, or they could not be written.",
            examples=[True],
        ),
    ]


def with_today(policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
    """The same policies. Raises ValueError where names are given twice or today's policy is missing."""
    refuse_doubles([policy.name for policy in policies])
    if all(policy.overrides for policy in policies):
        raise ValueError(
            "one policy without overrides is needed: the current policy, against which the others are compared"
        )
    return policies


def refuse_doubles(names: Sequence[str]) -> None:
    """Raises ValueError where a name occurs more than once."""
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"names must differ, these occur more than once: {', '.join(doubles)}")


def in_force(fleet: FleetSettings, policy: Policy) -> PolicyInForce:
    """What becomes of a policy on this fleet."""
    try:
        changed = apply_overrides(fleet, policy.overrides)
    except PolicyError as error:
        return PolicyInForce(policy.name, policy.overrides, (), False, str(error))
    flags = tuple(vllm_flags(fleet, changed))
    return PolicyInForce(policy.name, policy.overrides, flags, not hypothetical_reasons(fleet, changed))


def check_cost(fleet: FleetSettings, overrides: Mapping[str, Override]) -> None:
    """Refuse overrides that cannot be applied, or that this machine could not simulate. Raises PolicyError."""
    blocks, most = _blocks(apply_overrides(fleet, overrides)), max(MOST_BLOCKS, 4 * _blocks(fleet))
    if blocks > most:
        raise PolicyError(f"{blocks} cache blocks in all replicas and tiers; at most {most} are simulated")


def _blocks(fleet: FleetSettings) -> int:
    engine = fleet.engine
    tiers = [tier for tier in (engine.host_tier, engine.disk_tier) if tier is not None]
    return fleet.replicas * (engine.num_gpu_blocks + sum(engine.chunks_in(tier.capacity_gib) for tier in tiers))
