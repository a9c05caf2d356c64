"""What a reader of the twin's figures must know of the engines: what their metrics lack, what is not modelled."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from connectors.prometheus.names import series_of
from kavier_twin.mirror.replicas import Replica
from kavier_twin.serve.models import CacheAgreement, Engine
from kavier_twin.simulation.kpi_table import GAUGES
from kavier_twin.telemetry import EngineSample

log = logging.getLogger(__name__)

FORGET_SECONDS: Final = 600.0  # of event time, after which an engine without a sample is gone
_SHOWN: Final = 3
_MUCH_TRANSFERRED: Final = 0.05  # of the prompt tokens, from which transfers change what is predicted
# Without these no request can be made up from metrics. One of a line is enough.
_NEEDED: Final = (
    *((gauge,) for gauge in GAUGES[:2]),
    ("requests_finished_by_reason", "e2e_seconds"),
    ("prompt_tokens", "request_prompt_tokens"),
    ("generation_tokens", "request_generation_tokens"),
)
# Without these step times and latencies are not fitted.
_WANTED: Final = (
    ("request_prompt_tokens",),
    ("request_generation_tokens",),
    ("ttft_seconds",),
    ("inter_token_latency_seconds",),
    ("step_tokens",),
    ("kv_cache_usage_ratio",),
    ("prompt_tokens_by_source", "prefix_cache_queries_tokens"),
)

_CANNOT_FOLLOW: Final = (
    "Without them requests cannot be followed by metrics alone: upgrade vLLM, or add a source of request records, such "
    "as the tap or spans through Kafka."
)
_GUESSED: Final = (
    "Without them lengths, latencies or step times are guessed: upgrade vLLM, or add a source of request records."
)


class EngineNotes:
    """Follows the newest sample of each engine of a pool.

    `alone`: no stream tells of the pool's requests. `host_tier`: the fleet has one, so that loads from it are modelled.
    """

    def __init__(self, pool: str, *, alone: bool, host_tier: bool = False) -> None:
        self._pool = pool
        self._alone = alone
        self._host_tier = host_tier
        self._newest: dict[tuple[str, str, str], EngineSample] = {}

    def take(self, sample: EngineSample) -> None:
        """Take in a sample."""
        engine = (sample.namespace, sample.pod, sample.engine)
        before = self._newest.get(engine)
        if before and before.vllm_version and sample.vllm_version not in (None, before.vllm_version):
            log.warning(
                "pool %s: %s now runs vLLM %s (was %s)",
                self._pool,
                _name(sample),
                sample.vllm_version,
                before.vllm_version,
            )
        self._newest[engine] = sample

    def engines(self) -> tuple[Engine, ...]:
        """The engines that there are now."""
        newest = max((sample.time_seconds for sample in self._newest.values()), default=0.0)
        self._newest = {
            engine: sample for engine, sample in self._newest.items() if sample.time_seconds > newest - FORGET_SECONDS
        }
        return tuple(
            Engine(s.pod, s.engine, s.model or "", s.vllm_version or "", _block_ages(s)) for s in self._newest.values()
        )

    def samples(self) -> tuple[EngineSample, ...]:
        """The newest of each engine."""
        return tuple(self._newest.values())

    def notes(self) -> list[str]:
        """One sentence for each thing to know."""
        samples = list(self._newest.values())
        found = [*_of_models(samples), *_of_sleep(samples), *_of_drafts(samples)]
        found += [] if self._host_tier else _of_transfers(samples)
        return found + (_of_missing(samples) if self._alone else [])


def unmatched_caches(caches: Sequence[CacheAgreement], replicas: Sequence[Replica]) -> list[str]:
    """KV events of engines that no mirrored replica stands for."""
    if len(replicas) < 2:
        return []  # the only one is taken for the engine's
    pods = {replica.pod for replica in replicas} - {""}
    strangers = sorted({cache.pod for cache in caches} - pods)
    if not strangers:
        return []
    come = f"KV events come from {_some(pod or 'an engine without a name' for pod in strangers)}, but"
    if not pods:
        return [
            f"{come} no record or metric says which replica is which pod, so they are not compared: let request "
            "records name pod, or add a source of the engines' metrics."
        ]
    return [
        f"{come} the replicas are called {_some(sorted(pods))}, so they are not compared: set pod on the kv_events "
        "source to the name that request records and metrics use."
    ]


def _of_missing(samples: Sequence[EngineSample]) -> list[str]:
    found = []
    for fields, says in ((_NEEDED, _CANNOT_FOLLOW), (_WANTED, _GUESSED)):
        missing = {_name(sample): tuple(_missing(sample, fields)) for sample in samples if _has_worked(sample)}
        for names in dict.fromkeys(filter(None, missing.values())):
            engines = _some(engine for engine, its in missing.items() if its == names)
            found.append(f"{engines}: no series {', '.join(names)}. {says}")
    return found


def _of_models(samples: Sequence[EngineSample]) -> list[str]:
    models = sorted({sample.model for sample in samples if sample.model})
    if len(models) < 2:
        return []
    return [
        f"The pool's engines serve {len(models)} models, {_some(models)}, and are mirrored as if they served one: "
        "choose it with engines: {model_name: ...} on a prometheus source, or model on an engine of a vllm_metrics "
        "source."
    ]


def _of_sleep(samples: Sequence[EngineSample]) -> list[str]:
    asleep = [_name(s) for s in samples if any(v > 0.0 for state, v in s.sleep_state.items() if state != "awake")]
    if not asleep:
        return []
    return [f"{_some(asleep)} sleeps (vllm:engine_sleep_state), which is not modelled: it is mirrored as a replica."]


def _of_transfers(samples: Sequence[EngineSample]) -> list[str]:
    loading = [sample for sample in samples if sample.kv_offload_load_bytes]
    found = []
    if loading:
        bandwidth = _total(loading, "kv_offload_load_bytes") / max(1e-9, _total(loading, "kv_offload_load_seconds"))
        found.append(
            f"{_some(map(_name, loading))} loads KV blocks from host memory ({bandwidth / 1e9:.1f} GB/s), which the "
            "settings of the fleet leave out: set fleet.engine.host_tier."
        )
    remote = [s for s in samples if _transferred(s) > _MUCH_TRANSFERRED and not s.kv_offload_load_bytes]
    if remote:
        share = max(map(_transferred, remote))
        found.append(
            f"{_some(map(_name, remote))} gets up to {share:.0%} of its prompt tokens by KV transfer. Prefill/decode "
            "disaggregation and remote KV stores are not modelled: the mirror computes these tokens, so do not trust "
            "TTFT and throughput."
        )
    return found


def _transferred(sample: EngineSample) -> float:
    """The share of the prompt tokens that came by KV transfer, since the engine's process began."""
    by_source = sample.prompt_tokens_by_source
    total = sum(by_source.values())
    if total > 0.0:
        return by_source.get("external_kv_transfer", 0.0) / total
    if sample.prefix_cache_queries_tokens:
        return (sample.external_prefix_cache_hits_tokens or 0.0) / sample.prefix_cache_queries_tokens
    return 0.0


def _of_drafts(samples: Sequence[EngineSample]) -> list[str]:
    drafting = [sample for sample in samples if sample.spec_decode_drafts]
    if not drafting:
        return []
    accepted = sum(sample.spec_decode_accepted_tokens or 0.0 for sample in drafting)
    length = 1.0 + accepted / sum(sample.spec_decode_drafts or 0.0 for sample in drafting)
    return [
        f"{_some(map(_name, drafting))} decodes speculatively, {length:.2f} tokens a step on average, which is not "
        "modelled: a mirrored step gives one token, so do not trust inter-token latency and throughput."
    ]


def _block_ages(sample: EngineSample) -> dict[str, float]:
    ages = {
        "lifetime": sample.kv_block_lifetime_seconds,
        "idle_before_evict": sample.kv_block_idle_before_evict_seconds,
        "reuse_gap": sample.kv_block_reuse_gap_seconds,
    }
    return {what: age.sum / age.count for what, age in ages.items() if age is not None and age.count}


def _total(samples: Iterable[EngineSample], field: str) -> float:
    return sum(getattr(sample, field) or 0.0 for sample in samples)


def _has_worked(sample: EngineSample) -> bool:
    """Some exporters show a series only once it has a value."""
    return bool(sample.generation_tokens) or bool(sample.ttft_seconds and sample.ttft_seconds.count)


def _missing(sample: EngineSample, fields: Iterable[Collection[str]]) -> list[str]:
    return [
        " or ".join(series_of(field) for field in either)
        for either in fields
        if all(getattr(sample, field) in (None, {}) for field in either)
    ]


def _name(sample: EngineSample) -> str:
    return f"{sample.pod or 'an engine'}{f' (engine {sample.engine})' if sample.engine not in ('', '0') else ''}"


def _some(names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
