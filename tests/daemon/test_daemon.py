from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import kavier_twin
import waiting
from connectors.source import Source
from connectors.traces import read_trace
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.http_settings import HttpConfig
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.errors import UserError
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.recordings.replay_source import ReplaySource
from kavier_twin.simulation.settings import CRUDE_STEP_TIME, EngineSettings, FleetSettings
from kavier_twin.telemetry import EngineSample, RequestFinished, RequestRecord, RequestSeen, TelemetryRecord
from memory_source import MemorySource

RECORDING = Path(kavier_twin.__file__).parent / "demo_data" / "ramp-300"
PATIENCE_SECONDS = 300.0  # before a test fails: a kernel may have to be compiled first
ENGINE = EngineSettings(
    block_size=32, num_gpu_blocks=300, max_num_seqs=6, max_num_batched_tokens=1024, async_scheduling=False
)
FLEET = FleetSettings(engine=ENGINE, step_time=CRUDE_STEP_TIME)
MIRROR = MirrorSettings(pool="chat", ordering_seconds=0.5, calibrate_after_requests=40)
FORECAST = ForecastSettings(
    every_seconds=0.2, budget_seconds=30.0, horizons_seconds=(5.0, 10.0), scenarios=2, workers=2
)


until = partial(waiting.until, patience_seconds=PATIENCE_SECONDS)


def recorded(count: int) -> list[RequestRecord]:
    return read_trace(RECORDING).records[:count]


def events(records: list[RequestRecord]) -> list[TelemetryRecord]:
    """Arrivals and ends, in order of their times."""
    source = ReplaySource(records, speed=1e12)
    found: list[TelemetryRecord] = []
    while not source.exhausted:
        found += source.poll(1000)
    return found


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metric(text: str, name: str, **labels: str) -> float | None:
    for line in text.splitlines():
        found = re.fullmatch(r"(\w+)(\{.*\})? (\S+)", line)
        if found and found[1] == name and all(f'{key}="{value}"' in (found[2] or "") for key, value in labels.items()):
            return float(found[3])
    return None


@contextmanager
def running(source: Source, **options: Any) -> Iterator[Daemon]:
    daemon = Daemon([PoolTwin(FLEET, MIRROR, FORECAST)], [Feed(source)], **{"http": HttpConfig(port=0), **options})
    daemon.start()
    try:
        yield daemon
    finally:
        assert daemon.stop()


def test_from_records_to_metrics() -> None:
    source = MemorySource()
    with running(source) as daemon:
        assert daemon.http is not None
        url = daemon.http.url
        assert get(f"{url}/healthz")[0] == 200
        status, why = get(f"{url}/readyz")
        assert (status, "no telemetry record" in why) == (200, True)
        for event in events(recorded(100)):
            source.push(event)
        source.push(EngineSample(time_seconds=1.0, requests_running=2, requests_waiting=1, kv_cache_usage_ratio=0.5))
        until(lambda: get(f"{url}/readyz")[1] == "ready\n", "figures of the pool")
        source.end()
        until(lambda: daemon.view.finished_requests == 100 and daemon.view.calibrated, "all requests followed")
        until(lambda: daemon.view.outlook and daemon.view.outlook.calibrated, "a forecast from calibrated figures")
        text = until(lambda: get(f"{url}/metrics")[1], "metrics")
    assert metric(text, "kavier_twin_records_total", result="accepted") == 201.0
    assert metric(text, "kavier_twin_records_total", result="late") == 0.0
    assert metric(text, "kavier_twin_buffered_records") == 0.0
    assert metric(text, "kavier_twin_observed_requests_running") == 2.0
    mirrored = metric(text, "kavier_twin_mirrored_prefix_cache_hit_ratio")
    observed = metric(text, "kavier_twin_observed_prefix_cache_hit_ratio")
    assert mirrored is not None
    assert observed == pytest.approx(mirrored, abs=0.02)
    for policy in FORECAST.policies:
        for horizon in ("5", "10"):
            at = {"policy": policy.name, "horizon": horizon}
            assert metric(text, "kavier_twin_predicted_ttft_seconds", statistic="p99", quantile="0.5", **at) is not None
            probability = metric(text, "kavier_twin_slo_breach_probability_ratio", slo="ttft_p99", **at)
            assert probability is not None
            assert 0.0 <= probability <= 1.0


def test_whole_records_in_order_of_arrival_are_never_late() -> None:
    """Their ends lie far behind the arrivals that follow, which a record taken in at once would overtake."""
    source = MemorySource()
    with running(source, http=None) as daemon:
        for record in recorded(200):
            source.push(record)
        source.end()
        until(lambda: daemon.view.finished_requests == 200, "all requests followed")
        assert daemon.view.records == {
            "accepted": 400,
            "completed": 0,
            "duplicate": 0,
            "late": 0,
            "future_time": 0,
            "rejected": 0,
        }


def test_time_of_a_live_stream_goes_on_without_records() -> None:
    source = MemorySource()
    with running(source, http=None) as daemon:
        now = time.time()
        source.push(RequestSeen(id="a", time_seconds=now, prompt_tokens=100))
        until(lambda: daemon.view.event_seconds > now, "the mirror passes the only record")
        assert daemon.view.lag_seconds == 0.0
        source.push(RequestFinished(id="a", time_seconds=time.time(), output_tokens=10))
        until(lambda: daemon.view.finished_requests == 1, "the end is followed")


def test_a_trace_waits_for_its_records() -> None:
    source = MemorySource()
    with running(source, http=None) as daemon:
        source.push(RequestSeen(id="a", time_seconds=5.0, prompt_tokens=100))
        source.push(RequestSeen(id="b", time_seconds=9.0, prompt_tokens=100))
        until(lambda: daemon.view.event_seconds == 5.0 and daemon.view.buffered_records == 1, "the watermark at 8.5")
        assert daemon.view.lag_seconds == 4.0
        source.end()
        until(lambda: daemon.view.buffered_records == 0, "nothing is buffered once the source has ended")
        assert daemon.view.event_seconds == 9.0


def test_replay_tells_nothing_before_its_time() -> None:
    now = 0.0
    records = recorded(30)
    source = ReplaySource(records, [EngineSample(time_seconds=0.5)], speed=2.0, clock=lambda: now)
    assert isinstance(source, Source)
    found = source.poll(10_000)
    assert [record.kind for record in found] == ["engine_sample"]
    while not source.exhausted:
        now += 0.25
        polled = source.poll(10_000)
        assert all(record.time_seconds <= 0.5 + 2.0 * now for record in polled)
        found += polled
    assert len(found) == 61
    assert all(
        not record.block_hashes or len(record.block_hashes) <= math.ceil(record.prompt_tokens / 32)
        for record in found
        if isinstance(record, RequestSeen)
    )
    now += 100.0
    assert source.event_seconds == source.end_seconds == source.last_record_seconds
    with pytest.raises(ValueError, match="above 0"):
        ReplaySource(records, speed=0.0)


def test_a_port_in_use_is_told_with_the_way_out() -> None:
    with running(MemorySource()) as daemon:
        assert daemon.http is not None
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{daemon.http.port}.*choose another"):
            Daemon([PoolTwin(FLEET)], [Feed(MemorySource())], http=HttpConfig(port=daemon.http.port))


# --- as a process -------------------------------------------------------------------------------------------------


class Process:
    """`kavier-twin` in a process of its own, its outputs in files."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.out, self.err = directory / "stdout", directory / "stderr"
        root = Path(kavier_twin.__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1", "COLUMNS": "150"}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kavier_twin.commands.main", *arguments], stdout=out, stderr=err, env=environment
            )

    def url(self) -> str:
        def found() -> str | None:
            assert self.process.poll() is None, self.err.read_text()
            match = re.search(r"http://[\d.]+:\d+", self.err.read_text() + self.out.read_text())
            return match[0] if match else None

        return str(until(found, "the address"))

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE_SECONDS)
        finally:
            self.process.kill()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        started.append(Process(tmp_path, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.wait()


def config(tmp_path: Path) -> Path:
    path = tmp_path / "twin.yaml"
    path.write_text(
        """
        pool: chat
        fleet: {engine: {block_size: 32, num_gpu_blocks: 300, max_num_seqs: 6, async_scheduling: false}}
        mirror: {late_seconds: 60}
        sources: [{type: trace_file, path: requests.jsonl}]
        forecast: {every_seconds: 0.5, budget_seconds: 30, horizons_seconds: [5], scenarios: 1}
        http: {port: 0}
        dead_letters: letters.jsonl
        """
    )
    return path


@pytest.mark.slow
def test_run_follows_a_file_counts_what_is_broken_and_ends_on_sigterm(
    tmp_path: Path, launch: Callable[..., Process]
) -> None:
    process = launch("run", "--config", str(config(tmp_path)))
    url = process.url()
    assert get(f"{url}/healthz") == (200, "ok\n")
    until(lambda: get(f"{url}/readyz")[0] == 200, "ready, though the file is not there yet")
    assert get(f"{url}/readyz")[1] != "ready\n"
    stream = events(recorded(40))
    lines = [event.model_dump_json(exclude_none=True) for event in stream]
    watermark = stream[-1].time_seconds - MirrorSettings().ordering_seconds
    ends = sum(event.kind == "request_finished" and event.time_seconds <= watermark for event in stream)
    broken = ['{"kind": "request_seen", "prompt": "my secret', '{"kind": "riddle", "time_seconds": 1}']
    path = tmp_path / "requests.jsonl"
    with path.open("a") as file:
        file.writelines(line + "\n" for line in [*lines[:40], *broken])
    until(lambda: metric(get(f"{url}/metrics")[1], "kavier_twin_requests_finished_total"), "the first ends")
    with path.open("a") as file:
        file.writelines(line + "\n" for line in lines[40:])
    until(lambda: metric(get(f"{url}/metrics")[1], "kavier_twin_requests_finished_total") == ends, "the last ends")
    until(lambda: get(f"{url}/readyz")[1] == "ready\n", "figures of the pool")
    text = get(f"{url}/metrics")[1]
    assert metric(text, "kavier_twin_records_total", result="rejected") == 2.0
    assert metric(text, "kavier_twin_source_rejected_total", reason="not-json") == 1.0
    letters = (tmp_path / "letters.jsonl").read_text()
    assert [json.loads(line)["line"] for line in letters.splitlines()] == [41, 42]
    process.process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    log = process.err.read_text()
    assert "Traceback" not in log
    assert "secret" not in log + letters
    assert log.rstrip().endswith("stopped")


@pytest.mark.slow
def test_ctrl_c_ends_the_daemon_with_130(tmp_path: Path, launch: Callable[..., Process]) -> None:
    process = launch("run", "--config", str(config(tmp_path)))
    process.url()
    process.process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert "Traceback" not in process.err.read_text()


@pytest.mark.slow
def test_run_refuses_bad_settings_without_a_traceback(tmp_path: Path, launch: Callable[..., Process]) -> None:
    path = config(tmp_path)
    good = launch("run", "--config", str(path), "--check")
    assert (good.wait(), good.out.read_text()) == (0, f"{path}: fine\n")
    path.write_text(path.read_text().replace("forecast:", "forecats:"))
    bad = launch("run", "--config", str(path), "--check")
    assert bad.wait() == 1
    assert "did you mean forecast?" in bad.err.read_text()
    assert "Traceback" not in bad.err.read_text()


@pytest.mark.slow
def test_demo_runs_once_and_shows_its_tables(launch: Callable[..., Process]) -> None:
    process = launch("demo", "--once", "--speed", "60", "--port", "0")
    assert process.wait() == 0, process.err.read_text()
    out = process.out.read_text()
    assert "Mirror and reality" in out
    assert "policy, best first" in out
    for policy in ("today", "no_prefix_caching", "half_kv_capacity", "double_kv_capacity", "half_max_num_seqs"):
        assert policy in out
    series = re.search(r"(\d+) kavier_twin_ series", out)
    assert series is not None
    assert int(series[1]) > 100
    # The recorded machine changed its speed at times, as the mirror finds.
    assert [line for line in process.err.read_text().splitlines() if "an engine step lasts" not in line] == []


@pytest.mark.slow
def test_demo_without_once_serves_until_ctrl_c(launch: Callable[..., Process]) -> None:
    process = launch("demo", "--speed", "500", "--port", "0")
    url = process.url()
    until(
        lambda: "keeps" in process.out.read_text() or "Ctrl-C." in process.out.read_text(), "the end of the recording"
    )
    assert "kavier_twin_predicted_ttft_seconds" in get(f"{url}/metrics")[1]
    process.process.send_signal(signal.SIGINT)
    assert process.wait() == 130
