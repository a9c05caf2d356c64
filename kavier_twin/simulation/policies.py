"""Policies: sparse overrides of a fleet's live settings.

A policy names only what it changes, e.g. {"num_gpu_blocks": "0.5x", "max_num_seqs": 8}. Names are those of
`EngineSettings` and `FleetSettings` (`replicas`, `router`, ...), `step_time.<coefficient>`, and
`host_tier.<field>` and `disk_tier.<field>`, where a capacity of 0 takes the tier away. A number with the suffix `x`
multiplies the live value. A policy is deployable if `vllm_flags` deploy all of it, else hypothetical
(`hypothetical_reasons`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kavier_twin.errors import problems_of
from kavier_twin.simulation.settings import (
    COEFFICIENTS,
    DiskTier,
    EngineSettings,
    FleetSettings,
    HostTier,
    StepTime,
)

Override = bool | int | float | str

_TIERS: dict[str, type[BaseModel]] = {"host_tier": HostTier, "disk_tier": DiskTier}
_ENGINE = frozenset(EngineSettings.model_fields) - _TIERS.keys()
_FLEET = frozenset(FleetSettings.model_fields) - {"engine", "step_time", "footprint"}
_STEP_TIME = frozenset(f"step_time.{name}" for name in COEFFICIENTS)
_TIER_FIELDS = frozenset(f"{tier}.{name}" for tier, kind in _TIERS.items() for name in kind.model_fields)
POLICY_NAMES = tuple(sorted(_ENGINE | _FLEET | _STEP_TIME | _TIER_FIELDS))

# vLLM 0.32 flags that deploy an engine setting (facts: `vllm serve --help`; booleans have a --no- form).
_FLAGS = {
    "block_size": "--block-size",
    "num_gpu_blocks": "--num-gpu-blocks-override",
    "max_num_seqs": "--max-num-seqs",
    "max_num_active_seqs": "--max-num-active-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_num_scheduled_tokens": "--max-num-scheduled-tokens",
    "max_loras": "--max-loras",
    "max_model_len": "--max-model-len",
    "prefix_caching": "--enable-prefix-caching",
    "async_scheduling": "--async-scheduling",
    "enable_chunked_prefill": "--enable-chunked-prefill",
    "scheduling_policy": "--scheduling-policy",
    "long_prefill_token_threshold": "--long-prefill-token-threshold",
    "watermark": "--watermark",
    "scheduler_reserve_full_isl": "--scheduler-reserve-full-isl",
    "kv_cache_dtype": "--kv-cache-dtype",
}


class Policy(BaseModel):
    """A named set of overrides; an empty one is today's configuration."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"name": "half_kv_capacity", "overrides": {"num_gpu_blocks": "0.5x"}}]},
    )

    name: str = Field(examples=["half_kv_capacity"])
    """How metrics call it."""

    overrides: dict[str, Override] = Field(default={}, examples=[{"num_gpu_blocks": "0.5x"}])
    """What it changes; a number with x multiplies the fleet's own."""


DEFAULT_POLICIES = (
    Policy(name="today"),
    Policy(name="no_prefix_caching", overrides={"prefix_caching": False}),
    Policy(name="half_kv_capacity", overrides={"num_gpu_blocks": "0.5x"}),
    Policy(name="double_kv_capacity", overrides={"num_gpu_blocks": "2x"}),
    Policy(name="fp8_kv_cache", overrides={"kv_cache_dtype": "fp8"}),
    Policy(name="half_max_num_seqs", overrides={"max_num_seqs": "0.5x"}),
)


class PolicyError(ValueError):
    """An override that names nothing or has a value that cannot be."""


def apply_overrides(settings: FleetSettings, overrides: Mapping[str, Override]) -> FleetSettings:
    """The settings with a policy's overrides.

    `kv_cache_dtype=fp8` halves the bytes of a cached token: twice the blocks fit the same memory (unless
    `num_gpu_blocks` is given too) and attention reads half the bytes. Raises PolicyError.
    """
    engine = settings.engine.model_dump()
    fleet = {name: getattr(settings, name) for name in _FLEET}
    step_time = settings.step_time.model_dump()
    for name, value in overrides.items():
        if name in _ENGINE:
            engine[name] = _resolve(name, engine[name], value)
        elif name in _FLEET:
            fleet[name] = _resolve(name, fleet[name], value)
        elif name in _TIER_FIELDS:
            tier, key = name.split(".")
            fields = engine[tier] = engine[tier] or {}
            live = fields.get(key, _TIERS[tier].model_fields[key].get_default())
            fields[key] = _resolve(name, live, value)
        elif name in _STEP_TIME:
            key = name.removeprefix("step_time.")
            step_time[key] = _resolve(name, step_time[key], value)
        else:
            raise PolicyError(f"unknown policy setting {name!r}; known: {', '.join(POLICY_NAMES)}")
    halved = (settings.engine.kv_cache_dtype, engine["kv_cache_dtype"])
    if halved in (("auto", "fp8"), ("fp8", "auto")):
        factor = 2.0 if halved[1] == "fp8" else 0.5
        if "num_gpu_blocks" not in overrides:
            engine["num_gpu_blocks"] = max(2, int((engine["num_gpu_blocks"] - 1) * factor) + 1)
        if "kv_bytes_per_token" not in overrides:
            engine["kv_bytes_per_token"] = max(1, int(engine["kv_bytes_per_token"] / factor))
        if "step_time.per_context_token" not in overrides:
            step_time["per_context_token"] /= factor
    for tier in _TIERS:
        if engine[tier] and engine[tier].get("capacity_gib") == 0:
            engine[tier] = None
    try:
        return FleetSettings(
            engine=EngineSettings(**engine), step_time=StepTime(**step_time), footprint=settings.footprint, **fleet
        )
    except ValidationError as error:
        raise PolicyError(f"policy value out of range: {'; '.join(problems_of(error))}") from None


def _resolve(name: str, live: Any, value: Override) -> Any:
    """An override's value: a factor such as "0.5x" of the live value, or the value itself."""
    if not isinstance(value, str):
        return value
    if value.endswith("x") and isinstance(live, int | float) and not isinstance(live, bool):
        try:
            scaled = live * float(value[:-1])
        except ValueError:
            scaled = math.nan
        if not math.isfinite(scaled):
            raise PolicyError(f"{name}={value!r}: expected a number or a factor such as 0.5x")
        return max(1, round(scaled)) if isinstance(live, int) else scaled
    return value


def parse_override(text: str) -> tuple[str, Override]:
    """NAME=VALUE as given on a command line. Raises PolicyError."""
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise PolicyError(f"{text!r}: expected NAME=VALUE, for example prefix_caching=false or num_gpu_blocks=0.5x")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def vllm_flags(base: FleetSettings, changed: FleetSettings) -> list[str]:
    """The `vllm serve` flags that turn `base` into `changed` (engine settings only)."""
    flags = []
    # A KV dtype brings its own number of blocks, which vLLM derives from memory.
    derived = apply_overrides(base, {"kv_cache_dtype": changed.engine.kv_cache_dtype}).engine
    for name, flag in _FLAGS.items():
        value = getattr(changed.engine, name)
        if value == getattr(derived if name == "num_gpu_blocks" else base.engine, name):
            continue
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags.append(f"{flag} {value}")
    return flags + _tier_flags(base.engine, changed.engine)


def _tier_flags(base: EngineSettings, changed: EngineSettings) -> list[str]:
    """The flags of vLLM's native offloading (`vllm/config/cache.py`, `vllm/v1/kv_offload/`)."""
    host, disk = changed.host_tier, changed.disk_tier
    if (host, disk) == (base.host_tier, base.disk_tier):
        return []
    if host is None:
        return ["(leave out --kv-offloading-size)"]
    extra: dict[str, Any] = {
        name: getattr(host, name)
        for name in (
            "blocks_per_chunk",
            "eviction_policy",
            "store_threshold",
            "max_tracker_size",
            "offload_prompt_only",
        )
        if getattr(host, name) != HostTier.model_fields[name].default
    }
    if disk is not None:
        extra |= {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs", "root_dir": "/PATH"}]}
    flags = [f"--kv-offloading-size {host.capacity_gib:g}", "--kv-offloading-backend native"]
    if extra:
        flags.append(f"--kv-transfer-config '{json.dumps({'kv_connector_extra_config': extra})}'")
    return flags


def hypothetical_reasons(base: FleetSettings, changed: FleetSettings) -> list[str]:
    """Why no flags of `vllm serve` turn `base` into `changed`, one line a reason. None: it is deployable."""
    reasons = []
    if changed.engine.vllm != base.engine.vllm:
        reasons.append(f"vllm={changed.engine.vllm}: that is another version of vLLM, no flag sets it")
    if changed.engine.eviction != "lru":
        reasons.append(f"eviction={changed.engine.eviction}: vLLM's GPU tier has LRU only")
    for name in ("router", "router_max_imbalance"):
        if getattr(changed, name) != getattr(base, name):
            reasons.append(
                f"{name}={getattr(changed, name)}: the router stands before the engines, no engine flag sets it"
            )
    if changed.replicas != base.replicas:
        reasons.append(f"replicas={changed.replicas}: the deployment is scaled, not an engine")
    same_machine = apply_overrides(base, {"kv_cache_dtype": changed.engine.kv_cache_dtype}).step_time
    for name in COEFFICIENTS:
        if getattr(changed.step_time, name) != getattr(same_machine, name):
            reasons.append(
                f"step_time.{name}={getattr(changed.step_time, name):g}: that takes another machine or model"
            )
    return reasons
