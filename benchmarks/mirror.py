"""(j) What mirroring a fleet costs: CPU seconds for a second of stream at 100 and 1,000 requests/s.

The stream is a simulated fleet's own account of itself, every request seen and finished, with the pod that served it.
"later" is the second half of the stream: a daemon that runs for months must not pay for what has passed.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.common import compile_kernels, report, shared_prefix_workload
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.recordings.scenario import DEFAULT_FLEET
from kavier_twin.simulation.policies import apply_overrides
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.settings import FleetSettings
from kavier_twin.telemetry import RequestFinished, RequestSeen

SECONDS = 60.0
BATCH_RECORDS = 500
LOADS = ((100.0, 8), (1_000.0, 80))  # requests a second, replicas

Stream = list[RequestSeen | RequestFinished]


def stream_of(settings: FleetSettings, rate_per_second: float) -> Stream:
    """Requests of 1,000 + 100 tokens as records, in the order of their times."""
    count = int(rate_per_second * SECONDS)
    workload = shared_prefix_workload(count, rate_per_second, 1000, 100, groups=200, shared_tokens=512)
    outcomes = simulate(settings, workload).collect()
    stream: Stream = []
    for row in outcomes[np.argsort(outcomes["index"])]:
        number, arrival = int(row["index"]), float(row["arrival"])
        chain = workload.chain[workload.chain_starts[number] : workload.chain_starts[number + 1]]
        stream.append(
            RequestSeen(
                id=str(number),
                time_seconds=arrival,
                prompt_tokens=int(row["prompt"]),
                block_hashes=tuple(chain.tolist()),
                block_tokens=int(workload.hash_tokens[number]),
                pod=f"vllm-{row['replica']}",
            )
        )
        stream.append(
            RequestFinished(
                id=str(number),
                time_seconds=float(row["finish"]),
                output_tokens=int(row["output"]),
                ttft_seconds=float(row["first_token"]) - arrival,
                e2e_seconds=float(row["finish"]) - arrival,
                cached_tokens=int(row["cached"]),
            )
        )
    return sorted(stream, key=lambda record: record.time_seconds)


def feed(mirror: Mirror, stream: Stream) -> float:
    """CPU seconds that the mirror took for it."""
    began = time.process_time()
    for start in range(0, len(stream), BATCH_RECORDS):
        for record in stream[start : start + BATCH_RECORDS]:
            mirror.ingest(record)
        mirror.advance()
    return time.process_time() - began


def _measure(rate_per_second: float, replicas: int) -> dict[str, Any]:
    settings = apply_overrides(DEFAULT_FLEET, {"replicas": replicas})
    stream = stream_of(settings, rate_per_second)
    half = len(stream) // 2
    mirror = Mirror(MirrorSettings(), settings, calibrated=True)
    first = feed(mirror, stream[:half])
    later = feed(mirror, stream[half:])
    return {
        "requests / s": rate_per_second,
        "replicas": replicas,
        "CPU s a stream second": (first + later) / SECONDS,
        "first half": first / (SECONDS / 2),
        "later": later / (SECONDS / 2),
        "us a request": (first + later) / (len(stream) / 2) * 1e6,
        "exact prefix hits": mirror.windows.exact_ratio("prefix_cache_hit_ratio", mirror.time_seconds),
    }


def main() -> None:
    """Measure each load."""
    compiling = compile_kernels(apply_overrides(DEFAULT_FLEET, {"replicas": 8}))
    feed(
        Mirror(MirrorSettings(), DEFAULT_FLEET), stream_of(DEFAULT_FLEET, 1.0)
    )  # kernels of ends that come from outside
    report("(j) a mirrored fleet", [_measure(*load) for load in LOADS], f"kernels excluded: {compiling:.1f} s")


if __name__ == "__main__":
    main()
