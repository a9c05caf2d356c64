"""From the readings of one scrape of one GPU exporter, NVIDIA's or AMD's, to a sample of each GPU."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from connectors.prometheus.readings import Reading, Reject
from kavier_twin.telemetry import GpuSample

_MEBIBYTE: Final = float(2**20)
# Series -> field of GpuSample, factor to its unit, and rank: of two series of the same the lower rank is taken.
FIELDS: Final = {
    # Names and units as in dcgm-exporter's etc/default-counters.csv. GPU_UTIL does not exist on a MIG instance,
    # GR_ENGINE_ACTIVE does.
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": ("utilization_ratio", 1.0, 0),
    "DCGM_FI_DEV_GPU_UTIL": ("utilization_ratio", 1e-2, 1),
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": ("tensor_active_ratio", 1.0, 0),
    "DCGM_FI_PROF_DRAM_ACTIVE": ("dram_active_ratio", 1.0, 0),
    "DCGM_FI_DEV_POWER_USAGE": ("power_watts", 1.0, 0),
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": ("energy_joules", 1e-3, 0),
    "DCGM_FI_DEV_FB_USED": ("memory_used_bytes", _MEBIBYTE, 0),
    "DCGM_FI_DEV_FB_FREE": ("memory_free_bytes", _MEBIBYTE, 0),
    # dcgm-exporter 1.x
    "dcgm_gpu_utilization": ("utilization_ratio", 1e-2, 2),
    "dcgm_power_usage": ("power_watts", 1.0, 1),
    "dcgm_total_energy_consumption": ("energy_joules", 1e-3, 1),
    "dcgm_fb_used": ("memory_used_bytes", _MEBIBYTE, 1),
    "dcgm_fb_free": ("memory_free_bytes", _MEBIBYTE, 1),
    # AMD's device-metrics-exporter, docs/configuration/metricslist.md. Which of the three powers a card reports depends
    # on its generation; those that it does not are 0 or missing.
    "gpu_package_power": ("power_watts", 1.0, 2),
    "gpu_average_package_power": ("power_watts", 1.0, 3),
    "gpu_power_usage": ("power_watts", 1.0, 4),
    "gpu_energy_consumed": ("energy_joules", 1e-6, 2),
    "gpu_gfx_activity": ("utilization_ratio", 1e-2, 3),
    "gpu_prof_tensor_active_percent": ("tensor_active_ratio", 1e-2, 1),
    "gpu_umc_activity": ("dram_active_ratio", 1e-2, 1),
    "gpu_memory_activity": ("dram_active_ratio", 1e-2, 2),
    "gpu_used_vram": ("memory_used_bytes", _MEBIBYTE, 2),
    "gpu_free_vram": ("memory_free_bytes", _MEBIBYTE, 2),
}
_AMD_PREFIX: Final = "amd_"  # which AMD's exporter can be told to put before its names
# DCGM's ways to say "no value" (dcgm_structs.h): sixteen numbers from DCGM_FP64_BLANK, those from DCGM_INT64_BLANK.
_BLANK_FLOAT: Final = 2.0**47
_BLANK_INTEGER: Final = float(0x7FFFFFFFFFFFFFF0)
_AMD_BLANKS: Final = frozenset({0.0, 2.0**16 - 1, 2.0**32 - 1, 2.0**64 - 1})  # of power: a card that is on draws some


def gpu_selector(matchers: str = "") -> str:
    """A PromQL selector of every series in FIELDS."""
    return f'{{__name__=~"({_AMD_PREFIX})?({"|".join(FIELDS)})"{matchers}}}'


def gpu_samples(readings: Iterable[Reading], reject: Reject, *, time_seconds: float, pool: str) -> list[GpuSample]:
    """A sample of each GPU, or MIG instance or AMD partition, among the readings.

    The pod that uses a GPU is named by `pod` and `namespace`, or, where Prometheus has put the exporter's own pod
    there, by `exported_pod` and `exported_namespace`, or, by old exporters, by `pod_name` and `pod_namespace`. Rejects
    "no-gpu" (no UUID or number) and "bad-value".
    """
    readings = [reading for reading in readings if _field(reading.name) in FIELDS]
    pod_label, namespace_label = _workload_labels(readings)
    found: dict[tuple[str, str], tuple[Reading, dict[str, tuple[int, float]]]] = {}
    for reading in readings:
        field, factor, rank = FIELDS[_field(reading.name)]
        value = reading.value * factor
        amd = not _field(reading.name).lower().startswith("dcgm")
        gpu = _first(reading.labels, "UUID", "uuid", "gpu_uuid", "serial_number", "gpu", "gpu_id")
        if not gpu:
            reject("no-gpu")
        elif amd and field == "power_watts" and reading.value in _AMD_BLANKS:
            continue
        elif not _good(field, reading.value, value):
            reject("bad-value")
        else:
            _, values = found.setdefault((gpu, _part_of(reading.labels)), (reading, {}))
            if field not in values or rank < values[field][0]:
                values[field] = (rank, value)
    return [
        GpuSample.model_validate(
            {
                "time_seconds": time_seconds,
                "pool": pool,
                "namespace": reading.labels.get(namespace_label, ""),
                "pod": reading.labels.get(pod_label, ""),
                "gpu": gpu,
                "mig_instance": instance,
                "mig_profile": reading.labels.get("GPU_I_PROFILE", ""),
                "model": _first(reading.labels, "modelName", "card_model", "card_series") or None,
                "host": _first(reading.labels, "Hostname", "hostname"),
                **{field: value for field, (_, value) in values.items()},
            }
        )
        for (gpu, instance), (reading, values) in sorted(found.items())
    ]


def _field(name: str) -> str:
    return name.removeprefix(_AMD_PREFIX)


def _workload_labels(readings: Iterable[Reading]) -> tuple[str, str]:
    """The labels of pod and namespace. Which exporter and which Prometheus wrote shows by any GPU that is in use.

    Under the Prometheus operator `pod` is the exporter's own, and so it is beside `pod_name`.
    """
    names = {name for reading in readings for name, value in reading.labels.items() if value}
    for style in ("exported_{}_name", "exported_{}", "{}_name", "{}"):
        if style.format("pod") in names:
            before = style.partition("{")[0]
            namespaces = (f"{before}pod_namespace", f"{before}namespace_name", f"{before}namespace")
            return style.format("pod"), next((name for name in namespaces if name in names), namespaces[-1])
    return "pod", "namespace"


def _part_of(labels: Mapping[str, str]) -> str:
    """The MIG instance, or the partition of an AMD card that is in several; empty for a whole GPU."""
    whole = labels.get("gpu_compute_partition_type", "").lower() in ("", "none", "spx")
    return labels.get("GPU_I_ID", "") or ("" if whole else labels.get("gpu_partition_id", ""))


def _first(labels: Mapping[str, str], *names: str) -> str:
    return next((found for name in names if (found := labels.get(name))), "")


def of_pods(samples: Iterable[GpuSample], pods: Collection[tuple[str, str]]) -> list[GpuSample]:
    """Those used by these pods, (namespace, pod). Where the namespace of either is not known, the name decides.

    Pods without a name are engines outside Kubernetes: they take the samples that name no pod either.
    """
    names = {pod for namespace, pod in pods if not namespace}
    return [
        sample
        for sample in samples
        if (sample.namespace, sample.pod) in pods
        or sample.pod in names
        or (not sample.namespace and any(sample.pod == pod for _, pod in pods))
    ]


def _good(field: str, raw: float, value: float) -> bool:
    if not math.isfinite(value) or value < 0.0 or raw >= _BLANK_INTEGER or 0.0 <= raw - _BLANK_FLOAT < 16.0:
        return False
    return not field.endswith("_ratio") or value <= 1.0
