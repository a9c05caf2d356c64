"""A running daemon raises no false alert over ends that never came, and twenty restarts do not show in its scores."""

from __future__ import annotations

import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from connectors.traces import read_trace
from connectors.traces.follow import FollowFile
from daemon.one_book import FLEET, KNOWN_ENGINE, Event, forecast_settings, stream_of, synthetic, without_ends
from kavier_twin.daemon.checkpoints import Checkpoints
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.forecast.slo import Slo
from kavier_twin.mirror import checkpoint_file
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.scores.observed import Reality
from kavier_twin.scores.store import FILE_NAME, ScoreStore, read_judged
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import RequestSeen
from waiting import wait_until

pytestmark = pytest.mark.slow

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"
RESTARTS = 20
SLOW = Slo(name="slow", metric="e2e_p95_seconds", threshold=4.0)

# The daemon over a file that another process writes, until every request of it has finished and was forecast for.
PROGRAM = """
import signal, sys, time
from pathlib import Path
from proof.test_scores_of_a_daemon import recorded_daemon
daemon = recorded_daemon(Path(sys.argv[1]))
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
daemon.start()
while not daemon.failed and daemon.view.outlook is None:
    time.sleep(0.01)
print("forecasting", flush=True)
while not daemon.failed and not stopped and daemon.view.finished_requests < int(sys.argv[2]):
    time.sleep(0.01)
sys.exit(0 if daemon.stop() else 1)
"""


def recorded_pool(store: ScoreStore | None = None) -> PoolTwin:
    """One that forecasts much more often than any should, so that many forecasts fall between checkpoints."""
    engine = EngineSettings(block_size=32, num_gpu_blocks=300, max_num_seqs=16, max_num_batched_tokens=1024)
    return PoolTwin(
        FleetSettings(engine=engine, step_time=StepTime(fixed=0.015)),
        MirrorSettings(calibrate_after_requests=100, recalibrate_every_requests=100),
        forecast_settings((10.0, 20.0), 1, SLOW).model_copy(update={"every_seconds": 0.1}),
        score_store=store,
    )


def recorded_daemon(directory: Path) -> Daemon:
    pool = recorded_pool(ScoreStore(directory / "state" / FILE_NAME))
    source = FollowFile(directory / "requests.jsonl", "telemetry")
    return Daemon([pool], [Feed(source)], checkpoints=Checkpoints(directory / "state", every_seconds=0.3))


def lines(stream: list[Event]) -> list[bytes]:
    # The last ends become due when the stream has gone on for longer than the lateness.
    beat = RequestSeen(id="beat", time_seconds=stream[-1].time_seconds + 60.0, prompt_tokens=1)
    return [event.model_dump_json().encode() + b"\n" for event in [*stream, beat]]


def observed(directory: Path) -> Reality:
    """What the last checkpoint knows of what happened."""
    saved, _, problems = checkpoint_file.newest(directory / "state")
    assert saved is not None
    assert not problems
    found = Reality()
    arrays = {name.removeprefix("scores/default/"): array for name, array in saved.arrays.items()}
    found.restore(saved.document["pools"]["default"]["scores"]["reality"], arrays)
    return found


def begin(directory: Path, requests: int) -> subprocess.Popen[bytes]:
    """A daemon that has made its first forecast."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", PROGRAM, str(directory), str(requests)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"forecasting\n"
    return process


def test_twenty_restarts_leave_the_scores_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """When a daemon forecasts is a matter of the wall clock, so two runs never make the same forecasts. What both must
    agree on is everything that a forecast is scored by: the KPIs observed over any stretch of time, each forecast
    judged by them, and once."""
    records = read_trace(RECORDING).records
    stream = lines(stream_of(records))
    (tmp_path / "state").mkdir()
    growing = (tmp_path / "requests.jsonl").open("ab", buffering=0)
    rng = random.Random(5)
    written = 0

    def write(upto: int) -> None:
        nonlocal written
        growing.write(b"".join(stream[written:upto]))
        written = max(written, upto)

    for restart in range(RESTARTS):
        share = len(stream) // (RESTARTS + 1)
        write(restart * share + share // 2)
        process = begin(tmp_path, len(records))
        end = time.monotonic() + rng.uniform(0.0, 1.0)
        while time.monotonic() < end:
            write(min((restart + 1) * share, written + 2))
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL if restart % 2 else signal.SIGTERM)
        assert process.wait(30) == (-signal.SIGKILL if restart % 2 else 0)
    write(len(stream))
    assert begin(tmp_path, len(records)).wait(120) == 0

    uninterrupted = recorded_pool()
    uninterrupted.ingest(stream_of(records), more=False, ended=True)
    assert not uninterrupted.mirror.ingested["never_finished"]
    saved, reality = uninterrupted.scores.save(1), Reality()
    reality.restore(saved.document["reality"], saved.arrays)
    (judged,) = read_judged(tmp_path / "state" / FILE_NAME).values()
    assert len({kpi.time_seconds for kpi in judged.kpis}) > RESTARTS
    assert max(kpi.time_seconds for kpi in judged.kpis) > 0.8 * records[-1].time_seconds
    for kpi in judged.kpis:
        start, stop = kpi.time_seconds, kpi.time_seconds + kpi.horizon_seconds
        assert kpi.observed == reality.measure(start, stop)[kpi.kpi], kpi
        if not math.isnan(kpi.persisted):
            assert kpi.persisted == reality.measure(start - kpi.horizon_seconds, start)[kpi.kpi], kpi
    for breach in judged.breaches:
        stop = breach.time_seconds + breach.horizon_seconds
        assert breach.breached == SLOW.breached(reality.measure(breach.time_seconds, stop)[SLOW.metric]), breach

    last = observed(tmp_path)
    assert not last.live
    assert last.since_seconds < last.until_seconds - 20.0
    for start in np.arange(last.since_seconds, last.until_seconds - 10.0, 5.0):
        found, expected = last.measure(start, start + 10.0), reality.measure(start, start + 10.0)
        assert {name: value for name, value in found.items() if name in expected} == pytest.approx(
            expected, rel=1e-12, nan_ok=True
        )

    again = recorded_daemon(tmp_path)  # as if it were started once more
    scores = again.view.scores
    assert sum(score.forecasts for score in scores.kpis) == len(judged.kpis)
    assert sum(score.forecasts for score in scores.breaches) == len(judged.breaches)
    assert dict(scores.unscored) == {}
    with sqlite3.connect(tmp_path / "state" / FILE_NAME) as db:
        (newest,) = db.execute("SELECT MAX(checkpoint) FROM kpis").fetchone()
    assert newest <= checkpoint_file.last_number(tmp_path / "state")


@pytest.fixture(scope="module")
def half_a_second() -> list[Event]:
    """Requests of half a second, ten of them a second."""
    return stream_of(synthetic(400.0, 10.0, 25.0))


def outlook(directory: Path, stream: list[Event]) -> tuple[float, float, float, float]:
    """The p95 of the e2e latency and the probability of a breach over 60 and 300 s, served after this stream."""
    directory.mkdir()
    (directory / "requests.jsonl").write_bytes(b"".join(lines(stream)))
    settings = forecast_settings((60.0, 300.0), 4, SLOW).model_copy(update={"every_seconds": 1.0})
    pool = PoolTwin(FLEET, KNOWN_ENGINE, settings, calibrated=True)
    daemon = Daemon([pool], [Feed(FollowFile(directory / "requests.jsonl", "telemetry"))])
    daemon.start()
    try:
        newest = stream[-1].time_seconds
        wait_until(lambda: daemon.view.outlook and daemon.view.outlook.event_seconds >= newest - 1.0, 120.0)
        view = daemon.view
    finally:
        daemon.stop()
    assert view.outlook is not None
    minute, long = view.outlook.policies[0].horizons
    median = minute.median("e2e_seconds", "p95"), long.median("e2e_seconds", "p95")
    return *median, minute.breach["slow"], long.breach["slow"]


def test_lost_ends_raise_no_alert(half_a_second: list[Event], tmp_path: Path) -> None:
    expected = outlook(tmp_path / "none", half_a_second)
    assert 0.3 < expected[0] < 3.0
    for number, share in enumerate((1 / 400, 1 / 100)):
        stream = without_ends(half_a_second, share, number)
        found = outlook(tmp_path / str(number), stream)
        assert found[:2] == pytest.approx(expected[:2], rel=0.05)
        assert max(found[2:]) < 0.05
