"""What a live pool's prefix cache is worth and why it missed."""

from __future__ import annotations

import math

import numpy as np

from kavier_twin.daemon.pool_reuse import PoolReuse
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.reuse.misses import Reason
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import EngineSample, RequestRecord, TelemetryRecord

FLEET = FleetSettings(engine=EngineSettings(num_gpu_blocks=60), step_time=StepTime(fixed=0.01))


def request(number: int, group: int, *, blocks: int = 6, pod: str | None = None) -> RequestRecord:
    return RequestRecord(
        id=str(number),
        time_seconds=2.0 * number,
        prompt_tokens=16 * blocks + 4,
        output_tokens=10,
        block_hashes=tuple(100 * group + block for block in range(blocks)),
        block_tokens=16,
        e2e_seconds=0.11,
        ttft_seconds=0.02,
        pod=pod,
    )


def followed(records: list[TelemetryRecord]) -> tuple[PoolReuse, Mirror]:
    mirror, reuse = Mirror(MirrorSettings(), FLEET, calibrated=True), PoolReuse()
    for record in records:
        mirror.ingest(record)
        reuse.follow(mirror.advance(), mirror.fleet)
    reuse.follow(mirror.end(), mirror.fleet)
    return reuse, mirror


def test_hits_and_misses_are_those_of_the_mirror() -> None:
    groups = np.random.default_rng(3).integers(1, 12, 150)
    reuse, mirror = followed([request(number, int(group)) for number, group in enumerate(groups)])
    assert reuse.watch is not None
    total = reuse.watch.misses.total
    counters = mirror.fleet.state.replicas[0]
    assert (total.requests, total.prompt, total.hit) == (150, 15_000, int(counters["hit_tokens"]))
    assert sum(total.missed.values()) == total.prompt - total.hit
    assert min(total.missed[reason] for reason in (Reason.FIRST_SEEN, Reason.EVICTED, Reason.PARTIAL_BLOCK)) > 0
    assert total.missed[Reason.COMPUTING] == total.missed[Reason.OTHER_REPLICA] == 0
    assert len(reuse.watch.misses.applications) == len(set(groups.tolist()))
    today = next(point for point in reuse.watch.points() if point.factor == 1.0)
    # The mirror generates a little past an end that it does not know yet, and the cache holds eight requests.
    assert math.isclose(today.hit_ratio, total.hit / total.prompt, abs_tol=0.02)


def test_a_pod_that_restarted_lost_its_cache() -> None:
    def sample(time: float, started: float) -> EngineSample:
        return EngineSample(time_seconds=time, pod="vllm-0", engine="0", started_seconds=started, requests_running=0.0)

    reuse, _ = followed(
        [sample(0.0, -50.0), request(1, 1, pod="vllm-0"), sample(10.0, 8.0), request(10, 1, pod="vllm-0")]
    )
    assert reuse.watch is not None
    assert reuse.watch.misses.total.missed[Reason.LOST] == 96


def test_without_block_hashes_nothing_is_known() -> None:
    bare = request(1, 1).model_copy(update={"block_hashes": (), "block_tokens": None})
    reuse, _ = followed([bare])
    assert reuse.watch is None
