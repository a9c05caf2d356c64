"""Killed at any moment with its records in Kafka, the daemon ends as one that was never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import effort
from connectors.kafka.settings import KafkaSettings
from connectors.traces import read_trace
from daemon.test_restart import KILLS, RECORDING, last_state, make_daemon
from kafka_broker import OurBroker
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.telemetry import RequestFinished, RequestSeen

kafka = pytest.importorskip("kafka", reason="needs the extra kafka")
pytestmark = [pytest.mark.real, pytest.mark.slow]

PROGRAM = """
import sys, time
from proof.test_killed_with_kafka import daemon_of
directory, broker, topic, requests = sys.argv[1:]
daemon = daemon_of(directory, broker, topic)
daemon.start()
while not daemon.failed and daemon.view.finished_requests < int(requests):
    time.sleep(0.01)
sys.exit(0 if daemon.stop() else 1)
"""


def daemon_of(directory: str, broker: str, topic: str) -> Daemon:
    from connectors.kafka.source import KafkaSource

    settings = KafkaSettings(type="kafka", brokers=(broker,), topics=(topic,), start="earliest", group=None)
    return make_daemon(Path(directory), KafkaSource(settings))


def run_once(directory: Path, broker: str, topic: str, requests: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parents[1], *sys.path]))}
    command = [sys.executable, "-c", PROGRAM, str(directory), broker, topic, str(requests)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def test_killed_at_any_moment(real_kafka: OurBroker, tmp_path: Path) -> None:
    records = list(read_trace(RECORDING).records)
    ends = [finished for record in records if (finished := record.finished()) is not None]
    stream: list[RequestSeen | RequestFinished] = sorted(
        [*(record.seen() for record in records), *ends], key=lambda event: event.time_seconds
    )
    stream.append(stream[0].model_copy(update={"id": "beat", "time_seconds": stream[-1].time_seconds + 60.0}))
    plain, killed, topic = tmp_path / "plain", tmp_path / "killed", real_kafka.new_topic()
    for directory in (plain, killed):
        (directory / "state").mkdir(parents=True)
    producer = kafka.KafkaProducer(bootstrap_servers=real_kafka.address)
    began_ms = int(time.time() * 1000)

    def send(event: RequestSeen | RequestFinished) -> None:
        stamp = began_ms + int(event.time_seconds * 1000)
        producer.send(topic, event.model_dump_json().encode(), event.id.encode(), timestamp_ms=stamp)

    rng = effort.dice()
    written = 0
    for kill in range(KILLS):
        process = run_once(killed, real_kafka.address, topic, len(records))
        end = time.monotonic() + rng.uniform(1.0, 2.5)  # it takes about a second to start
        while time.monotonic() < end:
            upto = min(len(stream) * (kill + 1) // (KILLS + 1), written + 3)
            for event in stream[written:upto]:
                send(event)
            written = max(written, upto)
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    for event in stream[written:]:
        send(event)
    producer.flush()
    producer.close()
    assert run_once(killed, real_kafka.address, topic, len(records)).wait(120) == 0
    assert run_once(plain, real_kafka.address, topic, len(records)).wait(120) == 0
    assert last_state(killed) == last_state(plain)
    assert last_state(plain)[1]["ingested"]["accepted"] == len(stream)
