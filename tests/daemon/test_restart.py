"""Killed at any moment and started again, the daemon ends as one that was never killed: nothing lost, nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import effort
from connectors.source import Source
from connectors.traces import read_trace
from connectors.traces.follow import FollowFile
from kavier_twin.daemon.checkpoints import Checkpoints
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.mirror import checkpoint_file, mirror_state
from kavier_twin.mirror.checkpoint_file import Saved
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.state import FleetState
from kavier_twin.telemetry import RequestRecord
from waiting import wait_until

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"
KILLS = effort.times(8)

# The daemon over a file that another process writes, until every request of it has finished.
PROGRAM = """
import sys, time
from pathlib import Path
from daemon.test_restart import make_daemon
directory, requests = Path(sys.argv[1]), int(sys.argv[2])
daemon = make_daemon(directory)
daemon.start()
while not daemon.failed and daemon.view.finished_requests < requests:
    time.sleep(0.01)
sys.exit(0 if daemon.stop() else 1)
"""


FLEET = FleetSettings(
    engine=EngineSettings(block_size=32, num_gpu_blocks=300, max_num_seqs=16, max_num_batched_tokens=1024),
    step_time=StepTime(fixed=0.015),
)
MIRROR = MirrorSettings(calibrate_after_requests=100, recalibrate_every_requests=100)


def make_daemon(directory: Path, source: Source | None = None) -> Daemon:
    pool = PoolTwin(FLEET, MIRROR, ForecastSettings(every_seconds=3600.0))
    return Daemon(
        [pool],
        [Feed(source or FollowFile(directory / "requests.jsonl", "telemetry"))],
        checkpoints=Checkpoints(directory / "state", every_seconds=0.05),
    )


def lines(records: list[RequestRecord]) -> list[bytes]:
    events = [record.seen() for record in records]
    ends = [finished for record in records if (finished := record.finished()) is not None]
    ordered = sorted([*events, *ends], key=lambda event: event.time_seconds)
    # The last ends become due when the stream has gone on for longer than the lateness.
    beat = records[0].seen().model_copy(update={"id": "beat", "time_seconds": ordered[-1].time_seconds + 60.0})
    return [event.model_dump_json(exclude_defaults=False).encode() + b"\n" for event in [*ordered, beat]]


def last_state(directory: Path) -> tuple[str, dict]:
    """A digest of the fleet's arrays, and of the rest what must agree."""
    saved, _, problems = checkpoint_file.newest(directory / "state")
    assert saved is not None
    assert not problems
    prefix = "fleet/default/"
    arrays = {name.removeprefix(prefix): array for name, array in saved.arrays.items() if name.startswith(prefix)}
    arrays = {name: arrays[name] for name in FleetState._fields}
    mirror = mirror_state.restore(Saved(saved.document["pools"]["default"]["mirror"], arrays), MIRROR, FLEET)
    digest = hashlib.sha256()
    for array in mirror.fleet.state:
        digest.update(array.tobytes())
    return digest.hexdigest(), {
        "ingested": dict(mirror.ingested),
        "finished": mirror.finished,
        "windows": mirror.windows.save(),
        "calibration": mirror.calibration,
        "pace": mirror.pace,
    }


def run_once(directory: Path, requests: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", PROGRAM, str(directory), str(requests)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    records = list(read_trace(RECORDING).records)
    stream = lines(records)
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for directory in (plain, killed):
        (directory / "state").mkdir(parents=True)
    (plain / "requests.jsonl").write_bytes(b"".join(stream))
    assert run_once(plain, len(records)).wait(120) == 0

    rng = effort.dice()
    growing = (killed / "requests.jsonl").open("ab", buffering=0)
    written = 0
    for kill in range(KILLS):
        process = run_once(killed, len(records))
        end = time.monotonic() + rng.uniform(0.8, 2.0)  # it takes about a second to start
        while time.monotonic() < end:
            upto = min(len(stream) * (kill + 1) // (KILLS + 1), written + 3)
            growing.write(b"".join(stream[written:upto]))
            written = max(written, upto)
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    growing.write(b"".join(stream[written:]))
    assert run_once(killed, len(records)).wait(120) == 0
    assert last_state(killed) == last_state(plain)
    assert last_state(plain)[1]["ingested"]["accepted"] == len(stream)


def test_a_stopped_daemon_goes_on(tmp_path: Path) -> None:
    records = list(read_trace(RECORDING).records)[:60]
    stream = lines(records)
    (tmp_path / "state").mkdir()
    (tmp_path / "requests.jsonl").write_bytes(b"".join(stream[:70]))
    first = make_daemon(tmp_path)
    first.start()
    wait_until(lambda: first.view.records.get("accepted", 0) == 70, 60.0)
    assert first.stop()
    with (tmp_path / "requests.jsonl").open("ab") as file:
        file.write(b"".join(stream[70:]))
    second = make_daemon(tmp_path)
    assert second.view.records["accepted"] == 70  # before anything was read
    second.start()
    wait_until(lambda: second.view.finished_requests == len(records), 60.0)
    assert second.stop()
    assert second.view.records["accepted"] == len(stream)
    assert second.view.records["duplicate"] == 0


def test_a_replaced_file_is_read_anew_and_counted_once(tmp_path: Path) -> None:
    records = list(read_trace(RECORDING).records)[:40]
    stream = lines(records)
    (tmp_path / "state").mkdir()
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"".join(stream[:50]))
    first = make_daemon(tmp_path)
    first.start()
    wait_until(lambda: first.view.records.get("accepted", 0) == 50, 60.0)
    assert first.stop()
    path.rename(tmp_path / "older.jsonl")
    path.write_bytes(b"".join(stream))
    second = make_daemon(tmp_path)
    second.start()
    wait_until(lambda: second.view.finished_requests == len(records), 60.0)
    assert second.stop()
    assert second.view.records["accepted"] == len(stream)
    assert second.view.records["duplicate"] + second.view.records["late"] == 50


def test_positions_are_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b'{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\nbroken\n{"timest')
    source = FollowFile(path)
    assert len(source.poll(10)) == 1
    positions = json.loads(json.dumps(source.positions()))
    with path.open("ab") as file:
        file.write(b'amp": 1000, "input_length": 6, "output_length": 1, "hash_ids": [2]}\n')
    again = FollowFile(path)
    again.seek(positions)
    (record,) = again.poll(10)
    assert (record.id, record.prompt_tokens) == ("2", 6)  # a malformed line counts
    assert again.rejected() == {"not-json": 1}
