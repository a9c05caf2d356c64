"""From the readings of one scrape of one DCGM exporter to a sample of each GPU."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Final

from connectors.prometheus.readings import Reading, Reject
from kavier_twin.telemetry import GpuSample

# DCGM field -> field of GpuSample, factor to its unit, and rank: of two fields that tell the same the lower rank is
# taken. Names and units as in dcgm-exporter's etc/default-counters.csv. GPU_UTIL does not exist on a MIG instance,
# GR_ENGINE_ACTIVE does.
FIELDS: Final = {
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": ("utilization_ratio", 1.0, 0),
    "DCGM_FI_DEV_GPU_UTIL": ("utilization_ratio", 1e-2, 1),
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": ("tensor_active_ratio", 1.0, 0),
    "DCGM_FI_PROF_DRAM_ACTIVE": ("dram_active_ratio", 1.0, 0),
    "DCGM_FI_DEV_POWER_USAGE": ("power_watts", 1.0, 0),
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": ("energy_joules", 1e-3, 0),
    "DCGM_FI_DEV_FB_USED": ("memory_used_bytes", float(2**20), 0),
    "DCGM_FI_DEV_FB_FREE": ("memory_free_bytes", float(2**20), 0),
}
# DCGM's ways to say "no value" (dcgm_structs.h): sixteen numbers from DCGM_FP64_BLANK, those from DCGM_INT64_BLANK.
_BLANK_FLOAT: Final = 2.0**47
_BLANK_INTEGER: Final = float(0x7FFFFFFFFFFFFFF0)


def gpu_selector(matchers: str = "") -> str:
    """A PromQL selector of every series in FIELDS."""
    return f'{{__name__=~"{"|".join(FIELDS)}"{matchers}}}'


def gpu_samples(readings: Iterable[Reading], reject: Reject, *, time_seconds: float, pool: str) -> list[GpuSample]:
    """A sample of each GPU, or MIG instance, among the readings.

    The pod that uses a GPU is named by `pod` and `namespace`, or, where Prometheus has put the exporter's own pod
    there, by `exported_pod` and `exported_namespace`. Rejects "no-gpu" (no UUID or number) and "bad-value".
    """
    readings = [reading for reading in readings if reading.name in FIELDS]
    # Under the Prometheus operator `pod` is the exporter's. It shows by any GPU of the page that has a workload.
    style = "exported_" if any("exported_pod" in reading.labels for reading in readings) else ""
    found: dict[tuple[str, str], tuple[Reading, dict[str, tuple[int, float]]]] = {}
    for reading in readings:
        field, factor, rank = FIELDS[reading.name]
        value = reading.value * factor
        gpu = reading.labels.get("UUID") or reading.labels.get("gpu")
        if not gpu:
            reject("no-gpu")
        elif not _good(field, reading.value, value):
            reject("bad-value")
        else:
            _, values = found.setdefault((gpu, reading.labels.get("GPU_I_ID", "")), (reading, {}))
            if field not in values or rank < values[field][0]:
                values[field] = (rank, value)
    return [
        GpuSample.model_validate(
            {
                "time_seconds": time_seconds,
                "pool": pool,
                "namespace": reading.labels.get(f"{style}namespace", ""),
                "pod": reading.labels.get(f"{style}pod", ""),
                "gpu": gpu,
                "mig_instance": instance,
                "mig_profile": reading.labels.get("GPU_I_PROFILE", ""),
                "model": reading.labels.get("modelName"),
                "host": reading.labels.get("Hostname", ""),
                **{field: value for field, (_, value) in values.items()},
            }
        )
        for (gpu, instance), (reading, values) in sorted(found.items())
    ]


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
