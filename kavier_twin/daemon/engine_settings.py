"""Engine settings as the engines themselves tell them, adopted where the settings file does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol, runtime_checkable

from connectors.prometheus.engine_config import EngineConfig, EngineConfigs
from connectors.source import Source

ADOPTED: Final = (
    "block_size",
    "num_gpu_blocks",
    "prefix_caching",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_chunked_prefill",
    "async_scheduling",
    "scheduling_policy",
    "long_prefill_token_threshold",
    "scheduler_reserve_full_isl",
    "watermark",
)
"""Settings of an engine that the simulation has and engines tell."""


@runtime_checkable
class _Teller(Protocol):
    """A source whose engines tell how they are configured."""

    configs: EngineConfigs


def tells(source: Source) -> bool:
    """Whether settings of engines may come from here."""
    return isinstance(source, _Teller)


def told(sources: Iterable[Source]) -> dict[str, bool | int | float | str]:
    """What the engines say of the settings in `ADOPTED`; of contradicting words the first."""
    found: dict[str, bool | int | float | str] = {}
    for source in sources:
        if isinstance(source, _Teller):
            said = source.configs.discovered()
            values = {name: getattr(said, name) for name in ADOPTED if getattr(said, name) is not None}
            found = {**values, **found}
    return found


def contradictions(sources: Iterable[Source]) -> list[str]:
    """Where engines contradict each other or what the settings file says."""
    return [line for source in sources if isinstance(source, _Teller) for line in source.configs.contradictions()]


def discovered(sources: Iterable[Source]) -> list[EngineConfig]:
    """What the engines of each source say of themselves."""
    return [source.configs.discovered() for source in sources if isinstance(source, _Teller)]


def capacity_notes(sources: Iterable[Source]) -> list[str]:
    """Where what engines say of their KV caches had to be made out."""
    return [line for source in sources if isinstance(source, _Teller) for line in source.configs.notes()]
