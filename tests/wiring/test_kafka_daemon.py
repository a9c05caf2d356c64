"""From a Kafka topic to the daemon's metrics, by way of a settings file."""

from __future__ import annotations

import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest

import waiting
from kafka_broker import OurBroker
from kavier_twin.daemon.config import read_settings
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.telemetry import RequestFinished, RequestSeen

kafka = pytest.importorskip("kafka", reason="needs the extra kafka")

PATIENCE_SECONDS = 300.0  # a kernel may have to be compiled first


until = partial(waiting.until, patience_seconds=PATIENCE_SECONDS)


def test_requests_through_kafka_are_mirrored_and_the_source_told_of(real_kafka: OurBroker, tmp_path: Path) -> None:
    topic = real_kafka.new_topic()
    producer = kafka.KafkaProducer(bootstrap_servers=real_kafka.address)
    began = time.time() - 60.0
    for number in range(50):
        arrival = began + number
        for record in (
            RequestSeen(id=str(number), time_seconds=arrival, prompt_tokens=100),
            RequestFinished(id=str(number), time_seconds=arrival + 0.9, output_tokens=5, e2e_seconds=0.9),
        ):
            at = int(record.time_seconds * 1000)
            producer.send(topic, record.model_dump_json().encode(), str(number).encode(), timestamp_ms=at)
    producer.send(topic, b"{")
    producer.flush()
    producer.close()
    settings = tmp_path / "twin.yaml"
    settings.write_text(f"""
fleet: {{engine: {{num_gpu_blocks: 300}}}}
sources: [{{type: kafka, brokers: ["{real_kafka.address}"], topics: [{topic}], start: earliest, group: null}}]
forecast: {{scenarios: 2, horizons_seconds: [5], policies: [{{name: today}}], every_seconds: 1000}}
http: {{port: 0}}
dead_letters: dead.jsonl
""")
    daemon = Daemon.of(read_settings(settings))
    daemon.start()
    try:
        until(lambda: daemon.view.finished_requests == 50, "all requests are followed")
        assert daemon.view.records == {"accepted": 100, "duplicate": 0, "late": 0, "future_time": 0, "rejected": 1}
        name = f'pool="default",source="kafka:{topic}"'
        wanted = (
            f"kavier_twin_source_up{{{name}}} 1.0",
            f"kavier_twin_source_lag_records{{{name}}} 0.0",
            f'kavier_twin_source_rejected_total{{pool="default",reason="not-json",source="kafka:{topic}"}} 1.0',
        )
        assert daemon.http is not None
        url = f"{daemon.http.url}/metrics"

        def told() -> bool:
            text = urllib.request.urlopen(url, timeout=20).read().decode()
            return all(line in text for line in wanted)

        until(told, "the metrics")
    finally:
        assert daemon.stop()
    assert '"reason": "not-json"' in (tmp_path / "dead.jsonl").read_text()


def test_a_first_start_mirrors_the_topic_s_last_minutes(real_kafka: OurBroker, tmp_path: Path) -> None:
    """Though the settings begin with what is newest; pods that the records name are mirrored, each as it served."""
    topic = real_kafka.new_topic()
    producer = kafka.KafkaProducer(bootstrap_servers=real_kafka.address)
    now = time.time()
    # Two hours old, then the last ten minutes.
    arrivals = [now - 7_200.0 + number for number in range(30)] + [now - 600.0 + 10.0 * number for number in range(60)]
    for number, arrival in enumerate(arrivals):
        pod = f"vllm-{number % 3}"
        for record in (
            RequestSeen(id=str(number), time_seconds=arrival, prompt_tokens=100, pod=pod),
            RequestFinished(id=str(number), time_seconds=arrival + 0.9, output_tokens=5, e2e_seconds=0.9),
        ):
            at = int(record.time_seconds * 1000)
            producer.send(topic, record.model_dump_json().encode(), str(number).encode(), timestamp_ms=at)
    producer.flush()
    producer.close()
    settings = tmp_path / "twin.yaml"
    settings.write_text(f"""
fleet: {{engine: {{num_gpu_blocks: 300}}, replicas: 2}}
sources: [{{type: kafka, brokers: ["{real_kafka.address}"], topics: [{topic}], group: null}}]
forecast: {{scenarios: 2, horizons_seconds: [5], policies: [{{name: today}}], every_seconds: 1}}
http: {{port: 0}}
""")
    daemon = Daemon.of(read_settings(settings), warm_up_seconds=1_800.0)
    assert daemon.view.warming_up
    daemon.start()
    try:
        until(lambda: not daemon.view.not_ready, "ready")
        assert daemon.view.finished_requests >= 59
        assert daemon.view.records["accepted"] == 120
        assert daemon.pools["default"].mirror.pods.names() == {0: "vllm-0", 1: "vllm-1", 2: "vllm-2"}
    finally:
        assert daemon.stop()
