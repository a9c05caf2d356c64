"""State is a function of the log: a mirror put away at any moment and taken up again ends as one that never stopped."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from connectors.traces import read_trace
from kavier_twin.mirror import checkpoint_file, mirror_state
from kavier_twin.mirror.checkpoint_file import CheckpointError
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.scores.store import FILE_NAME, ScoreStore
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import RequestFinished, RequestSeen

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "ramp-300"
FLEET = FleetSettings(
    replicas=2,
    engine=EngineSettings(block_size=32, num_gpu_blocks=150, max_num_seqs=4, max_num_batched_tokens=1024),
    step_time=StepTime(fixed=0.015),
)
SETTINGS = MirrorSettings(calibrate_after_requests=60, recalibrate_every_requests=80, recent_requests=150)


@pytest.fixture(scope="module")
def events() -> list[RequestSeen | RequestFinished]:
    records = read_trace(RECORDING).records
    found: list[RequestSeen | RequestFinished] = [record.seen() for record in records]
    found += [finished for record in records if (finished := record.finished()) is not None]
    rng = random.Random(7)
    found.sort(key=lambda event: event.time_seconds + rng.uniform(0.0, 1.5))  # out of order, within the lateness
    return found


def digest(mirror: Mirror) -> tuple[bytes, ...]:
    return tuple(array.tobytes() for array in mirror.fleet.state)


def follow(mirror: Mirror, events: list[RequestSeen | RequestFinished], batch: int = 1) -> Mirror:
    for start in range(0, len(events), batch):
        for event in events[start : start + batch]:
            mirror.ingest(event)
        mirror.advance()
    return mirror


def test_stops_and_restarts_leave_no_trace(events: list[RequestSeen | RequestFinished], tmp_path: Path) -> None:
    whole = follow(Mirror(SETTINGS, FLEET), events)
    assert whole.calibration is not None
    rng = random.Random(1)
    cuts = sorted(rng.sample(range(1, len(events)), 12))
    mirror = Mirror(SETTINGS, FLEET)
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(events)], strict=True), 1):
        follow(mirror, events[start:stop], batch=rng.randrange(1, 40))
        checkpoint_file.write(tmp_path, number, mirror_state.save(mirror), keep=3)
        saved, found, problems = checkpoint_file.newest(tmp_path)
        assert (found, problems) == (number, [])
        assert saved is not None
        mirror = mirror_state.restore(saved, SETTINGS, FLEET)
    assert digest(mirror) == digest(whole)
    assert mirror.ingested == whole.ingested
    assert mirror.windows.save() == whole.windows.save()
    assert mirror.calibration == whole.calibration
    assert mirror.pace == whole.pace
    assert len(list(tmp_path.iterdir())) == 3


def test_looking_at_the_present_leaves_no_trace(events: list[RequestSeen | RequestFinished]) -> None:
    plain, watched = Mirror(SETTINGS, FLEET), Mirror(SETTINGS, FLEET)
    for at in range(0, len(events), 25):
        follow(plain, events[at : at + 25])
        follow(watched, events[at : at + 25])
        present = watched.present(watched.newest_seconds + 20.0)
        assert present.time_seconds > watched.time_seconds
        assert present.snapshot() is not None
    assert digest(plain) == digest(watched)
    assert plain.windows.save() == watched.windows.save()
    assert plain.ingested == watched.ingested


def test_a_damaged_one_is_passed_over(events: list[RequestSeen | RequestFinished], tmp_path: Path) -> None:
    mirror = follow(Mirror(SETTINGS, FLEET), events[:100])
    for number in (1, 2, 3, 4):
        checkpoint_file.write(tmp_path, number, mirror_state.save(mirror), keep=4)
    files = sorted(tmp_path.iterdir())
    files[3].write_bytes(files[3].read_bytes()[:-100])  # cut short
    content = bytearray(files[2].read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    files[2].write_bytes(content)
    files[1].write_bytes(b"something else")
    saved, number, problems = checkpoint_file.newest(tmp_path)
    assert saved is not None
    assert number == 1
    assert [text.split(": ", 1)[0] for text in problems] == [str(path) for path in reversed(files[1:])]
    assert "checksum" in problems[0]
    assert "not a checkpoint file" in problems[2]


def test_another_layout_is_refused(
    events: list[RequestSeen | RequestFinished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = follow(Mirror(SETTINGS, FLEET), events[:10])
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_file, "layout_digest", lambda: "older")
        path = checkpoint_file.write(tmp_path, 1, mirror_state.save(mirror), keep=2)
    with pytest.raises(CheckpointError, match="another version"):
        checkpoint_file.read(path)


def test_another_fleet_is_refused(events: list[RequestSeen | RequestFinished]) -> None:
    saved = mirror_state.save(follow(Mirror(SETTINGS, FLEET), events[:10]))
    with pytest.raises(CheckpointError, match="settings of the fleet have changed"):
        mirror_state.restore(saved, SETTINGS, FLEET.model_copy(update={"replicas": 3}))
    slower = FLEET.model_copy(update={"step_time": StepTime(fixed=0.5)})
    assert mirror_state.restore(saved, SETTINGS, slower).fleet.settings.step_time == FLEET.step_time


def test_a_full_disk_leaves_the_last_good_one(
    events: list[RequestSeen | RequestFinished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = mirror_state.save(follow(Mirror(SETTINGS, FLEET), events[:10]))
    checkpoint_file.write(tmp_path, 1, saved, keep=2)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint_file.write(tmp_path, 2, saved, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["000000000001.checkpoint"]
    assert checkpoint_file.newest(tmp_path)[1] == 1


def test_only_the_owner_can_read_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "000000000001.checkpoint"
    path.with_suffix(".part").write_bytes(b"left by a kill")
    path.with_suffix(".part").chmod(0o644)
    checkpoint_file.write(tmp_path, 1, checkpoint_file.Saved({}, {}), keep=1)
    assert path.stat().st_mode & 0o777 == 0o600
    store = ScoreStore(tmp_path / FILE_NAME)
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600
    store.close()
