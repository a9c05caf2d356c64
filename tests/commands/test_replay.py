"""A recording played as if it were a fleet."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from connectors.prometheus.names import place_of
from connectors.traces.telemetry import parse_record
from kafka_broker import Broker
from kavier_twin.commands.main import main
from kavier_twin.commands.replay import EnginePage, RecordedFleet
from kavier_twin.recordings.recording import read_recording, recorded_engine
from kavier_twin.telemetry import EngineSample, RequestFinished, RequestSeen, TelemetryRecord


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Three requests within half a second."""
    directory = tmp_path / "recording"
    directory.mkdir()
    (directory / "meta.json").write_text(
        json.dumps({"engine": {"num_gpu_blocks": 300, "block_size": 32}, "block_tokens": 32})
    )
    lines = [
        {
            "id": f"s-{n}",
            "session": "s",
            "arrival": 1.0 + n / 10,
            "prompt_tokens": 64,
            "output_tokens": 2,
            "cached_tokens": 32,
            "hash_ids": [2**63 + 1, n + 1],
            "token_times": [1.1 + n / 10, 1.2 + n / 10],
        }
        for n in range(3)
    ]
    (directory / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_each_round_is_of_now_and_knows_nothing_of_the_last(recording: Path) -> None:
    trace, _ = read_recording(recording)
    fleet = RecordedFleet(trace, [], "chat", "vllm-3")
    rounds: list[list[TelemetryRecord]] = []
    for _ in range(2):
        began = time.time()
        sent: list[TelemetryRecord] = []
        fleet.play(sent.append, lambda: False)
        rounds.append(sent)
        seen = [record for record in sent if isinstance(record, RequestSeen)]
        ends = [record for record in sent if isinstance(record, RequestFinished)]
        assert len(seen) == len(ends) == 3
        assert all(began - 0.1 <= record.time_seconds <= time.time() + 0.1 for record in sent)
        assert {record.pool for record in sent} == {"chat"}
        assert {record.pod for record in seen} == {"vllm-3"}
        assert seen[0].block_hashes[0] == seen[1].block_hashes[0] != seen[0].block_hashes[1]
        assert ends[0].time_seconds - seen[0].time_seconds == pytest.approx(0.2)
    first, second = ({record.id for record in sent} for sent in rounds)
    assert not first & second
    first, second = (
        {value for record in sent if isinstance(record, RequestSeen) for value in record.block_hashes}
        for sent in rounds
    )
    assert not first & second


def test_the_page_is_one_of_vllm_and_its_counters_never_fall(recording: Path) -> None:
    trace, _ = read_recording(recording)
    samples = [
        EngineSample(time_seconds=1.0, requests_running=0.0, prompt_tokens=0.0),
        EngineSample(time_seconds=1.15, requests_running=2.0, prompt_tokens=64.0),
    ]
    fleet = RecordedFleet(trace, samples, "chat", "vllm-0")
    registry = CollectorRegistry()
    registry.register(EnginePage(fleet, recorded_engine(trace)))
    labels = {"engine": "0", "model_name": "recorded"}
    counted = []
    for _ in range(2):
        fleet.play(lambda _: None, lambda: False)
        counted.append(registry.get_sample_value("vllm:prompt_tokens_total", labels))
    assert counted == [64.0, 128.0]
    assert registry.get_sample_value("vllm:num_requests_running", labels) == 2.0
    assert registry.get_sample_value(
        "vllm:cache_config_info", {"engine": "0", "num_gpu_blocks": "300", "block_size": "32"}
    )
    served = {sample.name for family in registry.collect() for sample in family.samples}
    assert "vllm:prompt_tokens_total" in served
    assert all(place_of(name) for name in served - {"vllm:cache_config_info"})


def test_into_kafka(recording: Path, apache_kafka: Broker) -> None:
    library = pytest.importorskip("kafka")
    topic = f"replayed-{uuid.uuid4().hex[:12]}"
    admin = pytest.importorskip("kafka.admin").KafkaAdminClient(bootstrap_servers=apache_kafka.address)
    admin.create_topics({topic: {"num_partitions": 2, "replication_factor": 1}})
    admin.close()
    address = ["--kafka", apache_kafka.address, "--topic", topic]
    assert main(["replay", *address, "--once", "--recording", str(recording)]) == 0
    options = {"bootstrap_servers": apache_kafka.address, "auto_offset_reset": "earliest", "consumer_timeout_ms": 5_000}
    consumer = library.KafkaConsumer(topic, **options)
    records = []
    for message in consumer:
        records.append(parse_record(message.value))
        assert message.timestamp == int(records[-1].time_seconds * 1000)
        if len(records) == 6:
            break
    consumer.close()
    assert sorted(record.kind for record in records) == ["request_finished"] * 3 + ["request_seen"] * 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--kafka", "127.0.0.1:1", "--metrics-port", "0"], "--metrics-port 0"),
        (["--kafka", "127.0.0.1:9", "--recording", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", *arguments]) == 1
    assert told in capsys.readouterr().err
