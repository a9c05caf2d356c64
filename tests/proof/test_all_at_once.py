"""A recorded fleet at twenty times its speed: requests through Kafka, metrics through Prometheus, KV events by ZeroMQ.

All keep the recording's own times. Prometheus holds the scrapes already, the other two are sent as time goes by.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest

from connectors.traces import read_trace
from connectors.traces.recording import read_kv_events, read_metrics
from kafka_broker import OurBroker
from kavier_twin.daemon.config import read_settings
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.telemetry import RequestFinished, RequestSeen
from kv_publisher import Publisher
from prometheus_server import RealPrometheus, openmetrics
from waiting import wait_until

kafka = pytest.importorskip("kafka", reason="needs the extra kafka")
pytestmark = [pytest.mark.real, pytest.mark.slow]

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"
META = json.loads((RECORDING / "meta.json").read_text())
STARTED: float = META["started_unix"]
SPEED = 20.0
PATIENCE_SECONDS = 300.0  # a kernel may have to be compiled first
LABELS = {"job": "vllm", "instance": "10.0.0.1:8000", "namespace": "chat", "pod": "vllm-0"}


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[RealPrometheus]:
    server = RealPrometheus(tmp_path)
    server.backfill(openmetrics(read_metrics(RECORDING), LABELS))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    found = Publisher(topic=b"kv@vllm-0@tiny")
    yield found
    found.close()


def records() -> list[RequestSeen | RequestFinished]:
    """The recording as a stream, in the order of its times, and a last arrival after which all ends are due."""
    whole = [r.model_copy(update={"time_seconds": STARTED + r.time_seconds}) for r in read_trace(RECORDING).records]
    ends = [end for record in whole if (end := record.finished()) is not None]
    pods = [record.seen().model_copy(update={"pod": "vllm-0"}) for record in whole]
    stream = sorted([*pods, *ends], key=lambda event: event.time_seconds)
    return [*stream, RequestSeen(id="beat", time_seconds=stream[-1].time_seconds + 60.0, prompt_tokens=1, pod="vllm-0")]


def test_the_mirror_keeps_up_with_all_of_them(
    real_kafka: OurBroker, prometheus: RealPrometheus, publisher: Publisher, tmp_path: Path
) -> None:
    topic = real_kafka.new_topic()
    settings = tmp_path / "twin.yaml"
    engine = {name: value for name, value in META["engine"].items() if name not in ("engine", "model")}
    settings.write_text(f"""
fleet: {{engine: {json.dumps(engine)}}}
sources:
  - {{type: kafka, brokers: ["{real_kafka.address}"], topics: [{topic}], start: earliest, group: null}}
  - {{type: prometheus, url: "{prometheus.url}", engines: {{namespace: chat}},
     warm_up_seconds: {time.time() - STARTED + 60.0}, max_backfill_seconds: 1000000000}}
  - {{type: kv_events, endpoint: "{publisher.endpoint}", replay_endpoint: "{publisher.replay}"}}
forecast: {{scenarios: 2, horizons_seconds: [60], policies: [{{name: today}}], every_seconds: 1}}
http: {{port: 0}}
""")
    stream = records()
    batches = [row["batch"] for row in read_kv_events(RECORDING)]
    producer = kafka.KafkaProducer(bootstrap_servers=real_kafka.address, linger_ms=5)
    daemon = Daemon.of(read_settings(settings))
    daemon.start()
    # By minute of the recording and ten seconds of it. What is held up here for 0.1 s comes 2 s late by the
    # recording's time, so that one comparison may miss it; the next ones do not.
    agreements: dict[int, dict[int, float]] = {}
    try:
        publisher.wait_for_subscriber()
        wait_until(lambda: not any(source.trouble for source in daemon.view.sources), PATIENCE_SECONDS)
        began = time.monotonic()
        at_record = at_batch = 0
        while daemon.view.finished_requests < META["requests"]:
            assert time.monotonic() - began < PATIENCE_SECONDS
            now = STARTED + (time.monotonic() - began) * SPEED
            while at_batch < len(batches) and batches[at_batch][0] <= now:
                publisher.send(msgpack.packb(batches[at_batch]))
                at_batch += 1
            while at_record < len(stream) and stream[at_record].time_seconds <= now:
                record = stream[at_record]
                stamp, key = int(record.time_seconds * 1000), record.id.encode()
                producer.send(topic, record.model_dump_json().encode(), key, timestamp_ms=stamp)
                at_record += 1
            view = daemon.view
            for cache in view.caches:
                if np.isfinite(cache.agreement_ratio):
                    at = view.event_seconds - STARTED
                    agreements.setdefault(int(at // 60), {})[int(at // 10)] = cache.agreement_ratio
            time.sleep(0.01)
        wait_until(lambda: daemon.view.outlook is not None, PATIENCE_SECONDS)
        view = daemon.view
        taken = dict(view.records)
        assert taken.pop("accepted") > len(stream)
        assert set(taken.values()) == {0}, taken
        assert {state.name.partition(":")[0]: dict(state.rejected) for state in view.sources} == {
            "kafka": {},
            "prometheus": {},
            "kv_events": {},
        }
        assert sorted(agreements) == [0, 1, 2, 3]  # minutes of the recording
        assert min(max(minute.values()) for minute in agreements.values()) >= 0.99
        errors = {kpi: error_of_mean(daemon, kpi) for kpi in ("ttft_seconds", "e2e_seconds")}
        assert abs(error_of_mean(daemon, "prefix_cache_hit_ratio", "")) < 0.01
        assert abs(errors["e2e_seconds"]) < 0.10
        assert abs(errors["ttft_seconds"]) < 0.25
    finally:
        producer.close()
        assert daemon.stop()


def error_of_mean(daemon: Daemon, kpi: str, statistic: str = "mean") -> float:
    """Over the last two thirds of the time, minute by minute, each request predicted before its end was known."""
    mirror = daemon.pools["default"].mirror
    course = mirror.windows.course(mirror.time_seconds)
    found = [stretch.values[kpi, statistic] for stretch in course if (kpi, statistic) in stretch.values]
    predicted, observed = np.array(found)[len(found) // 3 :].mean(axis=0)
    return float(predicted / observed - 1.0)
