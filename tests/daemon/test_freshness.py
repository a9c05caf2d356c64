"""Sources that die, fall behind or lie about the time; a start in the past of a log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from connectors.source import LogSource
from daemon.test_daemon import FLEET, FORECAST, get, metric, until
from kavier_twin.daemon.checkpoints import Checkpoints
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.freshness import Freshness
from kavier_twin.daemon.http_settings import HttpConfig
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.serve.models import SourceState
from kavier_twin.telemetry import EngineSample, RequestFinished, RequestRecord, RequestSeen
from memory_source import MemorySource


class Log(MemorySource):
    """A log that tells how much of it is unread, as Kafka does."""

    lag_records = math.nan

    def lost(self) -> Mapping[str, int]:
        return {}

    def positions(self) -> dict[str, Any]:
        return {}

    def seek(self, positions: dict[str, Any]) -> None:
        pass


def reasons(feed: Feed, *moments: tuple[float, SourceState]) -> list[str]:
    now = 0.0
    freshness = Freshness(60.0, lambda: now)
    found = []
    for moment, state in moments:
        now = moment
        found += freshness.look([feed], [state])
    return found


def test_trouble_that_lasts_makes_stale() -> None:
    broken, well = SourceState("k", False, {}, trouble="no broker"), SourceState("k", False, {})
    told = reasons(Feed(MemorySource()), (0, broken), (59, broken), (61, broken), (62, well), (63, broken))
    assert told == ["", "", "k: no broker", "", ""]


def test_metrics_that_stop_make_stale_and_a_quiet_night_does_not() -> None:
    quiet = SourceState("p", False, {}, last_record_seconds=100.0, lag_records=0.0)
    assert reasons(Feed(MemorySource()), (100, quiet), (9_999, quiet)) == ["", ""]
    told = reasons(Feed(MemorySource(), every_seconds=15.0), (159, quiet), (161, quiet))
    assert told == ["", "p: no data for more than 60 s"]
    assert reasons(Feed(MemorySource(), every_seconds=60.0), (161, quiet), (279, quiet), (281, quiet))[1:] == [
        "",
        "p: no data for more than 180 s",
    ]
    never = SourceState("p", False, {})
    assert reasons(Feed(MemorySource(), every_seconds=15.0), (59, never), (61, never))[0] == ""
    ended = SourceState("p", True, {}, trouble="gone", last_record_seconds=0.0)
    assert reasons(Feed(MemorySource(), every_seconds=15.0), (0, ended), (999, ended)) == ["", ""]


def test_a_check_that_is_away_changes_nothing_and_a_source_takes_trust_at_once() -> None:
    broken = SourceState("kv", False, {}, trouble="no publisher")
    assert reasons(Feed(MemorySource(), checks_only=True), (0, broken), (9_999, broken)) == ["", ""]
    pool = PoolTwin(FLEET, calibrated=True)
    check, stream = replace(broken, checks_only=True), replace(broken, name="bus", trouble="no broker")
    assert not any("cannot be read" in reason for reason in pool.view((check,)).untrusted_reasons)
    view = pool.view((check, stream))
    assert view.untrusted_reasons[0] == "bus cannot be read: no broker"
    assert {trust.reason for trust in view.trust.values()} == {"bus cannot be read: no broker"}


def test_a_log_read_behind_makes_stale() -> None:
    behind = SourceState("k", False, {}, last_record_seconds=100.0, lag_records=5.0)
    assert reasons(Feed(MemorySource()), (159, behind), (161, behind))[1] == "k: its newest data is more than 60 s old"


def test_the_daemon_says_stale_once_and_again_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = MemorySource("bus")
    daemon = Daemon(
        [PoolTwin(FLEET, forecast=FORECAST)], [Feed(source)], http=HttpConfig(port=0), stale_after_seconds=0.1
    )
    daemon.start()
    try:
        assert daemon.http is not None
        url = daemon.http.url
        assert metric(get(f"{url}/metrics")[1], "kavier_twin_stale", pool="default") == 0.0
        source.trouble = "no broker can be reached"
        until(lambda: daemon.view.stale == ("bus: no broker can be reached",), "stale")
        assert metric(get(f"{url}/metrics")[1], "kavier_twin_stale", pool="default") == 1.0
        time.sleep(1.2)
        source.trouble = ""
        until(lambda: not daemon.view.stale, "fresh")
    finally:
        assert daemon.stop()
    messages = [record.message for record in caplog.records if record.name == "kavier_twin.daemon.freshness"]
    assert messages == [
        "pool default: figures are stale: bus: no broker can be reached",
        "pool default: figures are fresh again",
    ]


def test_a_vanished_pod_s_figures_age_out() -> None:
    pool = PoolTwin(FLEET)
    for number in range(40):
        now = 10.0 * number
        records = [RequestSeen(id=str(number), time_seconds=now, prompt_tokens=10)]
        pods = ["a", "b"] if number < 10 else ["a"]
        records += [EngineSample(time_seconds=now, pod=pod, requests_running=3.0) for pod in pods]
        pool.ingest(records, more=False, ended=False)
        view = pool.view(())
        (running,) = [entry.observed for entry in view.gauges if entry.kpi == "requests_running"] or [math.nan]
        if number in (5, 30):
            assert running == (6.0 if number == 5 else 3.0)
    assert len(pool._reported._pods) == 1


# --- a time far ahead ---------------------------------------------------------------------------------------------


def test_one_absurd_time_makes_nothing_else_late() -> None:
    mirror = Mirror(MirrorSettings(), FLEET)
    for number in range(20):
        mirror.ingest(RequestSeen(id=f"r{number}", time_seconds=float(number), prompt_tokens=10))
        if number == 10:
            mirror.ingest(RequestSeen(id="odd", time_seconds=1e6, prompt_tokens=10))
            mirror.ingest(RequestSeen(id="odd", time_seconds=1e6, prompt_tokens=10))
        if number == 12:  # its end, too
            mirror.ingest(RequestFinished(id="r1", time_seconds=3e9, output_tokens=1))
        mirror.advance()
    assert mirror.ingested == {"accepted": 20, "duplicate": 1, "future_time": 2}
    assert mirror.time_seconds == 17.0


def test_a_stream_that_goes_on_after_a_long_silence_is_believed() -> None:
    mirror = Mirror(MirrorSettings(), FLEET)
    for time_seconds in (0.0, 1.0, 90_000.0, 90_001.0, 90_002.0, 90_010.0):
        mirror.ingest(RequestSeen(id=str(time_seconds), time_seconds=time_seconds, prompt_tokens=10))
        mirror.advance()
        if time_seconds == 90_001.0:
            assert mirror.time_seconds <= 1.0
            present = mirror.present(90_001.5)  # a clock says so too
            assert (present.time_seconds, present.buffered) == (90_001.5, 0)
    assert (mirror.ingested["accepted"], mirror.ingested["future_time"]) == (6, 0)
    assert mirror.time_seconds == 90_002.0
    last = Mirror(MirrorSettings(), FLEET)
    for time_seconds in (0.0, 90_000.0):
        last.ingest(RequestSeen(id=str(time_seconds), time_seconds=time_seconds, prompt_tokens=10))
    last.end()
    assert (last.time_seconds, last.ingested["accepted"]) == (90_000.0, 2)


def test_a_whole_record_far_ahead_is_refused_whole() -> None:
    def record(number: int, time_seconds: float, e2e: float = 1.0) -> RequestRecord:
        return RequestRecord(
            id=f"r{number}", time_seconds=time_seconds, prompt_tokens=10, output_tokens=2, e2e_seconds=e2e
        )

    mirror = Mirror(MirrorSettings(), FLEET)
    records = [record(0, 0.0), record(1, 5e5), record(2, 2.0), record(3, 3.0, e2e=1e7), record(4, 60.0)]
    for entry in records:
        mirror.ingest(entry)
        mirror.advance()
    assert mirror.ingested == {"accepted": 7, "future_time": 3}
    assert mirror.finished == 2
    mirror.end()
    assert (mirror.finished, mirror.buffered) == (3, 0)


# --- starting in the past -----------------------------------------------------------------------------------------


def test_nothing_is_ready_before_the_past_is_mirrored(tmp_path: Path) -> None:
    log = Log("kafka")
    assert isinstance(log, LogSource)
    pool = PoolTwin(FLEET, MirrorSettings(calibrate_after_requests=40), FORECAST)
    daemon = Daemon([pool], [Feed(log)], http=HttpConfig(port=0), checkpoints=Checkpoints(tmp_path), warm_up=True)
    daemon.start()
    try:
        assert daemon.http is not None
        url = daemon.http.url
        past = time.time() - 1_000.0
        for number in range(50):
            log.push(RequestSeen(id=str(number), time_seconds=past + number, prompt_tokens=10))
        log.lag_records = 900.0
        until(lambda: daemon.view.outlook, "a forecast of the past")
        status, why = get(f"{url}/readyz")
        assert (status, "warming up" in why) == (503, True)
        log.push(RequestSeen(id="now", time_seconds=time.time(), prompt_tokens=10))
        until(lambda: get(f"{url}/readyz")[0] == 200, "ready")
    finally:
        assert daemon.stop()
    again = Daemon([PoolTwin(FLEET)], [Feed(log)], checkpoints=Checkpoints(tmp_path), warm_up=True)
    assert not again.view.warming_up  # it goes on from the checkpoint
    again.stop()
