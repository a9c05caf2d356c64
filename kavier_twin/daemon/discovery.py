"""What `kavier-twin init` finds: the engines, models and GPUs that a Prometheus knows, the topics that Kafka has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from connectors.kafka.settings import KafkaSettings
from connectors.prometheus.api import PrometheusApi, Series
from connectors.prometheus.engine_config import from_cache_config
from connectors.prometheus.gpus import gpu_selector
from connectors.prometheus.http import FetchError
from connectors.prometheus.lookaround import what_is_there
from connectors.prometheus.names import (
    address_of,
    cache_config_selector,
    kubernetes_pod_of,
    model_of,
    namespace_of,
    place_of,
    rank_of,
    ray_replica_of,
    running_selector,
)
from connectors.prometheus.servers import readable
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.gpu import find_gpu
from kavier_twin.catalog.models import find_model

_CHOOSING = ("namespace", "job", "model_name")  # labels that select a pool, in the order in which they are tried
_GPU_MODEL = ("modelName", "card_series", "card_model")  # dcgm-exporter, AMD's device-metrics-exporter


@dataclass(frozen=True)
class FoundPool:
    """Engines of one model in one namespace and job. `blocks` is None where no engine tells."""

    name: str
    model: str
    engines: tuple[str, ...]  # pods or addresses, with the rank where there are several
    selector: dict[str, str]
    gpu: str = ""  # as the exporter calls it
    gpus: int = 0
    blocks: int | None = None


@dataclass(frozen=True)
class Found:
    """All that was found, and in `missing` a line for each thing that was not, with the reason."""

    pools: tuple[FoundPool, ...] = ()
    topics: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def ask_prometheus(api: PrometheusApi) -> Found:
    """The pools that the server knows now. Failures are lines of `missing`."""
    try:
        series = [Series(readable(one.labels), one.samples) for one in api.instant(running_selector())]
        running = [one for one in series if _field(one) == "requests_running"]
        if not running:
            return Found(missing=(f"engines: {what_is_there(api, {}, '')}",))
        gpus = [readable(one.labels) for one in api.instant(gpu_selector())]
        configs = [readable(one.labels) for one in api.instant(cache_config_selector())]
    except FetchError as error:
        return Found(missing=(f"Prometheus: {error}",))
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for one in running:
        groups[model_of(one.labels), namespace_of(one.labels), one.labels.get("job", "")].append(one.labels)
    missing: list[str] = []
    pools: list[FoundPool] = []
    for key, labels in groups.items():
        pools.append(_pool(key, labels, groups, gpus, configs, {pool.name for pool in pools}))
        missing += _missing(pools[-1])
    return Found(tuple(pools), missing=tuple(missing))


def ask_kafka(brokers: Sequence[str]) -> Found:
    """The topics of a cluster, without Kafka's own. A failure is a line of `missing`."""
    try:
        from kafka.errors import KafkaError

        from connectors.kafka.client import connection, make_consumer
    except ImportError:
        return Found(missing=("Kafka: kafka-python is not installed; pip install 'kavier-twin[kafka]'",))
    try:
        settings = KafkaSettings(brokers=tuple(brokers), topics=("any",), group=None)
        consumer = make_consumer(connection(settings, None), 300.0)
        try:
            topics = sorted(topic for topic in consumer.topics() if not topic.startswith("_"))
        finally:
            consumer.close()
    except (KafkaError, OSError, ValueError) as error:
        return Found(missing=(f"Kafka: {', '.join(brokers)} cannot be asked ({error}); check address, TLS and user",))
    return Found(topics=tuple(topics), missing=() if topics else ("Kafka: it has no topic",))


def _field(series: Series) -> str:
    place = place_of(series.labels.get("__name__", ""))
    return place.field if place else ""


def _pool(
    key: tuple[str, str, str],
    labels: list[dict[str, str]],
    groups: dict[tuple[str, str, str], list[dict[str, str]]],
    gpus: list[dict[str, str]],
    configs: list[dict[str, str]],
    taken: set[str],
) -> FoundPool:
    model = key[0]
    others = [one for other, group in groups.items() if other != key for one in group]
    selector: dict[str, str] = {}
    for name in _CHOOSING:
        value = labels[0].get(name, "")
        chosen = [one for one in others if all(one.get(n) == v for n, v in selector.items())]
        if value and all(one.get(name) == value for one in labels) and (not selector or chosen):
            selector[name] = value
    pods = {kubernetes_pod_of(one) for one in labels} - {""}
    engines = sorted({"/".join(filter(None, (_server_of(one), rank_of(one)))) for one in labels})
    mine = [one for one in gpus if kubernetes_pod_of(one) in pods]
    likely = mine or [one for one in gpus if not kubernetes_pod_of(one)]  # an exporter that names no pods
    kinds = {next((one[name] for name in _GPU_MODEL if one.get(name)), "") for one in likely} - {""}
    cards = {(one.get("Hostname", ""), one.get("UUID") or one.get("gpu") or one.get("gpu_id", "")) for one in mine}
    mine_configs = [
        one for one in configs if all(one.get(name) == value for name, value in selector.items() if name in one)
    ]
    blocks = {told.num_gpu_blocks for told in from_cache_config(mine_configs).values() if told.num_gpu_blocks}
    name = model.rsplit("/", 1)[-1].lower() or "default"
    return FoundPool(
        name if name not in taken else f"{name}-{len(taken) + 1}",
        model,
        tuple(engines),
        selector,
        kinds.pop() if len(kinds) == 1 else "",
        len(cards),
        blocks.pop() if len(blocks) == 1 else None,
    )


def _server_of(labels: dict[str, str]) -> str:
    return ray_replica_of(labels) or kubernetes_pod_of(labels) or address_of(labels)


def _missing(pool: FoundPool) -> list[str]:
    found = []
    if not pool.gpu:
        found.append(
            f"{pool.name}: the GPU, because no series of dcgm-exporter or AMD's device-metrics-exporter is one of its "
            "pods' or names one kind of card; set hardware.gpu"
        )
    elif not _known_gpu(pool.gpu):
        found.append(f"{pool.name}: the data sheet of {pool.gpu!r}; set hardware.gpu to a name or a file of yours")
    if not _known_model(pool.model):
        found.append(f"{pool.name}: the shape of {pool.model!r}; set hardware.model to the path of its config.json")
    return found


def _known_gpu(name: str) -> bool:
    try:
        find_gpu(name)
    except CatalogError:
        return False
    return True


def _known_model(name: str) -> bool:
    try:
        find_model(name)
    except CatalogError:
        return False
    return True


def settings_text(found: Found, prometheus: str, brokers: Sequence[str], topic: str) -> str:
    """A commented settings file."""
    lines = ["# Written by kavier-twin init. Check it with: kavier-twin doctor --config FILE"]
    lines += [f"# Not found: {line}" for line in found.missing]
    lines += ["pools:"]
    for pool in found.pools:
        lines += [f"  {_value(pool.name)}:", f"    # {len(pool.engines)} engines: {', '.join(pool.engines[:8])}"]
        lines += ["    fleet:", f"      replicas: {len(pool.engines)}"]
        if _known_gpu(pool.gpu) and _known_model(pool.model):
            parallel = max(1, pool.gpus // len(pool.engines))
            lines += [
                "      # From the data sheets. Other settings of the engines come from their metrics.",
                "      hardware:",
                f"        gpu: {_value(pool.gpu)}",
                f"        model: {_value(pool.model)}",
                f"        tensor_parallel_size: {parallel}",
            ]
        else:
            blocks, why = (pool.blocks, "as an engine tells") if pool.blocks else (10_000, "CHANGE: it is not known")
            lines += [
                "      # Step times are fitted to what is observed. With hardware they start from data sheets:",
                "      # hardware: {gpu: H100 SXM 80GB, model: meta-llama/Llama-3.1-8B}",
                f"      engine: {{num_gpu_blocks: {blocks}}} # {why}",
            ]
        lines += [
            "    forecast:",
            "      workers: 2",
            "      slos: # CHANGE: what users expect",
            "        - {name: ttft_p99, metric: ttft_p99_seconds, threshold: 2.0}",
        ]
    lines += ["sources:"]
    for pool in found.pools:
        gpus = "{}" if pool.gpus else "null # no GPU series of its pods"
        lines += [
            "  - type: prometheus",
            f"    pool: {_value(pool.name)}",
            f"    url: {_value(prometheus)}",
            f"    engines: {_value(pool.selector)}",
            f"    gpus: {gpus}",
        ]
    if found.topics:
        lines += [f"  # Topics: {', '.join(found.topics[:20])}. See docs/telemetry.md for request records."]
        mark = "" if topic else "# "
        lines += [
            f"  {mark}- {{type: kafka, brokers: {_value(list(brokers))}, topics: [{_value(topic or found.topics[0])}]}}"
        ]
    lines += [
        "http: {host: 127.0.0.1, port: 9469}",
        "# checkpoints: {directory: state} # the state after a restart",
    ]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    """On one line, quoted where YAML needs it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
