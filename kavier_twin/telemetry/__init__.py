"""Records that cross the boundary. Imports nothing of ours."""

from kavier_twin.telemetry.records import (
    SCHEMA_VERSION,
    CarbonSample,
    EngineSample,
    GpuSample,
    Histogram,
    KvBlocksRemoved,
    KvBlocksStored,
    KvCacheCleared,
    KvEvent,
    KvEventBatch,
    RequestFinished,
    RequestRecord,
    RequestSeen,
    TelemetryRecord,
)

__all__ = [
    "SCHEMA_VERSION",
    "CarbonSample",
    "EngineSample",
    "GpuSample",
    "Histogram",
    "KvBlocksRemoved",
    "KvBlocksStored",
    "KvCacheCleared",
    "KvEvent",
    "KvEventBatch",
    "RequestFinished",
    "RequestRecord",
    "RequestSeen",
    "TelemetryRecord",
]
