"""What goes wrong around a twin: it says so, goes on by itself, and loses nothing that it was told in time."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kavier_twin.daemon.checkpoints import Checkpoints
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import RequestFinished, RequestSeen
from memory_source import MemorySource
from real_parts import mount, require
from waiting import wait_until

FLEET = FleetSettings(
    engine=EngineSettings(num_gpu_blocks=2_000, max_num_seqs=32),
    step_time=StepTime(fixed=0.01, per_prefill_token=1e-5),
)


def request(number: int, arrival: float, pod: str, seconds: float = 0.5) -> list[RequestSeen | RequestFinished]:
    return [
        RequestSeen(id=f"{pod}{number}", time_seconds=arrival, prompt_tokens=200, pod=pod),
        RequestFinished(id=f"{pod}{number}", time_seconds=arrival + seconds, output_tokens=20, e2e_seconds=seconds),
    ]


def test_a_burst_of_a_hundred_times_the_rate() -> None:
    """Two requests a second, two hundred for ten seconds, and again two: all are followed, and the queue ends."""
    arrivals = [number / 2 for number in range(120)]
    arrivals += [60.0 + number / 200 for number in range(2_000)]
    arrivals += [70.0 + number / 2 for number in range(240)]
    # As long as the fleet takes for them: 32 at a time, 20 tokens of 10 ms.
    free = 0.0
    stream = []
    for number, arrival in enumerate(arrivals):
        free = max(free, arrival) + 0.2 / 32
        stream += request(number, arrival, "p", free - arrival + 0.3)
    stream.sort(key=lambda record: record.time_seconds)
    twin = PoolTwin(FLEET)
    for start in range(0, len(stream), 500):
        twin.ingest(stream[start : start + 500], more=False, ended=start + 500 >= len(stream))
    assert twin.mirror.finished == len(arrivals)
    assert twin.mirror.ingested["accepted"] == len(stream)
    assert twin.mirror.load() == (0, 0, 0.0)


def test_clocks_thirty_seconds_apart_lose_nothing() -> None:
    """The records of the pod whose clock is behind come late, and are put in their place."""
    twin = PoolTwin(FLEET.model_copy(update={"replicas": 2}))
    stream = []
    for number in range(100):
        stream += request(number, 1_000.0 + number, "right")
        stream += request(number, 970.0 + number, "behind")
    for start in range(0, len(stream), 4):
        twin.ingest(stream[start : start + 4], more=False, ended=start + 4 >= len(stream))
    assert twin.mirror.ingested["late"] == 0
    assert twin.mirror.ingested["accepted"] == len(stream)
    assert twin.mirror.finished == 200


def test_clocks_that_are_too_far_apart_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """What is later than is kept is counted and logged, and the other pod's records go on."""
    twin = PoolTwin(FLEET.model_copy(update={"replicas": 2}), MirrorSettings(late_seconds=20.0))
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            records = [*request(number, 1_000.0 + number, "right"), *request(number, 700.0 + number, "behind")]
            twin.ingest(records, more=False, ended=number == 99)
    ingested = twin.mirror.ingested
    assert ingested["late"] > 0
    assert ingested["accepted"] + ingested["late"] == 400
    assert twin.mirror.finished >= 100
    assert "synchronise the clocks that stamp them, or raise mirror.late_seconds" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    place = tmp_path / "disk"
    place.mkdir()
    command = [mount(), "-t", "tmpfs", "-o", "size=4m", "tmpfs", place]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    require("the right to mount a file system", done.returncode == 0, done.stderr.strip())
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_costs_checkpoints_until_there_is_room(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = MemorySource("bus")
    pool = PoolTwin(FLEET, MirrorSettings(), ForecastSettings(every_seconds=3_600.0))
    daemon = Daemon([pool], [Feed(source)], checkpoints=Checkpoints(small_disk, every_seconds=0.05))
    ballast = small_disk / "ballast"
    for record in request(0, 1_000.0, "p"):
        source.push(record)
    daemon.start()
    try:
        wait_until(lambda: (daemon.view.checkpoint_unix_seconds or 0.0) > 0.0, 120.0)
        with pytest.raises(OSError, match="No space"):
            ballast.write_bytes(bytes(5_000_000))
        wait_until(lambda: daemon.view.checkpoint_failures > 0, 60.0)
        for record in request(1, 1_010.0, "p"):
            source.push(record)
        wait_until(lambda: daemon.view.records.get("accepted") == 4, 60.0)  # it goes on
        ballast.unlink()
        failures = daemon.view.checkpoint_failures
        before = daemon.view.checkpoint_unix_seconds or 0.0
        wait_until(lambda: (daemon.view.checkpoint_unix_seconds or 0.0) > before, 60.0)
        assert failures > 0
    finally:
        daemon.stop()
    assert "cannot write a checkpoint" in caplog.text
    restored = PoolTwin(FLEET, MirrorSettings(), ForecastSettings(every_seconds=3_600.0))
    assert Checkpoints(small_disk).restore({restored.name: restored}, [])
    assert restored.mirror.ingested["accepted"] == 4
