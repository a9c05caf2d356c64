"""The Kafka source against Apache Kafka itself (or, on a machine without it, librdkafka's mock cluster)."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kafka", reason="needs the extra kafka")

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewPartitions
from kafka.errors import KafkaError

from connectors.dead_letters import DeadLetters
from connectors.kafka import client
from connectors.kafka import source as kafka_source
from connectors.kafka.settings import KafkaSettings
from connectors.kafka.source import KafkaSource
from connectors.source import Source
from kafka_broker import PLAIN_PASSWORD, SCRAM_PASSWORD, USER, Broker, OurBroker
from kavier_twin.telemetry import RequestFinished, RequestRecord, RequestSeen, TelemetryRecord
from waiting import until

NOW = float(int(time.time()) - 10_000)
NOW_MS = int(NOW) * 1000


def seen(number: int) -> RequestSeen:
    return RequestSeen(id=str(number), time_seconds=NOW + number, prompt_tokens=10)


def ids(records: Iterable[TelemetryRecord]) -> list[str]:
    return [record.id for record in records if isinstance(record, RequestSeen | RequestFinished)]


class Topic:
    """A topic of its own for a test."""

    def __init__(self, broker: Broker, partitions: int, name: str = "") -> None:
        self.broker = broker
        self.name = name or f"requests-{uuid.uuid4().hex[:12]}"
        self._producer: KafkaProducer | None = None
        if broker.real:
            self.admin = KafkaAdminClient(bootstrap_servers=broker.address)
            self.create(partitions)

    def create(self, partitions: int) -> None:
        self.admin.create_topics({self.name: {"num_partitions": partitions, "replication_factor": 1}})

    def send(
        self,
        values: Iterable[TelemetryRecord | bytes | None],
        partition: int = 0,
        timestamp_ms: int | None = None,
        step_ms: int = 0,
    ) -> None:
        """Write, and wait until the broker has it."""
        if self._producer is None:
            options = {"linger_ms": 5, "acks": "all", "enable_idempotence": self.broker.real}
            self._producer = KafkaProducer(
                bootstrap_servers=self.broker.address, **options, **self.broker.client_options
            )
        sent = []
        for value in values:
            data = value if value is None or isinstance(value, bytes) else value.model_dump_json().encode()
            key = b"key" if value is None else None
            sent.append(self._producer.send(self.name, data, key, partition=partition, timestamp_ms=timestamp_ms))
            timestamp_ms = timestamp_ms and timestamp_ms + step_ms
        for future in sent:
            future.get(timeout=60)

    def settings(self, **more: Any) -> KafkaSettings:
        given = {"brokers": [self.broker.address], "topics": [self.name], "start": "earliest", "group": None}
        return KafkaSettings.model_validate(given | more)

    @contextmanager
    def source(self, *, positions: dict[str, int] | None = None, **more: Any) -> Iterator[KafkaSource]:
        options = {key: more.pop(key) for key in ("letters", "start_seconds", "discover_seconds") if key in more}
        if "start_seconds" in options:
            options["start"] = options.pop("start_seconds")
        found = KafkaSource(self.settings(**more), **options, **self.broker.client_options)
        if positions is not None:
            found.seek(positions)
        try:
            yield found
        finally:
            found.close()

    def close(self) -> None:
        if self._producer:
            self._producer.close(timeout=5)
        if self.broker.real:
            self.admin.close()


@pytest.fixture
def topic(kafka: Broker) -> Iterator[Topic]:
    if kafka.real:
        found = Topic(kafka, partitions=2)
    else:
        found = Topic(kafka, partitions=4)  # the mock makes a topic of four when it is first named
    yield found
    found.close()


@pytest.fixture
def real_topic(real_kafka: OurBroker) -> Iterator[Topic]:
    found = Topic(real_kafka, partitions=2)
    yield found
    found.close()


def take(source: KafkaSource, count: int, batch: int = 100) -> list[TelemetryRecord]:
    """The next `count` records, and certainly no more."""
    records: list[TelemetryRecord] = []
    until(
        lambda: records.extend(source.poll(min(batch, count - len(records)))) or len(records) >= count,
        f"{count} records",
    )
    return records


def test_records_come_as_they_were_written(topic: Topic) -> None:
    records = [
        RequestSeen(
            id="ü\u2028\N{GRINNING FACE}",
            time_seconds=NOW,
            prompt_tokens=40,
            block_hashes=(1, 2**64 - 1),
            block_tokens=32,
        ),
        RequestFinished(id="a", time_seconds=NOW + 1, output_tokens=3, ttft_seconds=0.1, finish_reason="stop"),
        RequestRecord(id="b", time_seconds=NOW, prompt_tokens=10, output_tokens=3, e2e_seconds=2.0),
    ]
    topic.send(records)
    with topic.source() as source:
        assert isinstance(source, Source)
        assert take(source, 3) == records
        assert source.last_record_seconds == NOW + 1
        assert source.poll(10) == []
        assert source.positions()[f"{topic.name}:0"] == 3
        assert not source.exhausted
    assert source.poll(10) == []


def test_where_reading_starts(topic: Topic) -> None:
    topic.send([seen(0), seen(1)])
    with topic.source(start="earliest") as source:
        assert ids(take(source, 2)) == ["0", "1"]
    with topic.source(start="latest") as source:
        until(lambda: not source.poll(10) and source.positions().get(f"{topic.name}:0") == 2, "the position")
        topic.send([seen(2)])
        assert ids(take(source, 1)) == ["2"]
    with topic.source(start="latest", positions={f"{topic.name}:0": 1}) as source:
        assert ids(take(source, 2)) == ["1", "2"]


def test_reading_starts_at_a_time(real_topic: Topic) -> None:
    real_topic.send([seen(0), seen(1)], timestamp_ms=NOW_MS, step_ms=1000)
    with real_topic.source(start=datetime.fromtimestamp(NOW + 0.5, UTC).isoformat()) as source:
        assert ids(take(source, 1)) == ["1"]
    with real_topic.source(start="earliest", start_seconds=NOW + 0.5) as source:
        assert ids(take(source, 1)) == ["1"]
    with real_topic.source(start="2100-01-01T00:00:00Z") as source:
        until(lambda: not source.poll(10) and source.positions().get(f"{real_topic.name}:0") == 2, "the position")
        real_topic.send([seen(2)])
        assert ids(take(source, 1)) == ["2"]  # the time says where to begin, not what to leave out


def test_a_checkpoint_at_any_moment_loses_nothing_and_repeats_nothing(topic: Topic) -> None:
    for parity in (0, 1):
        topic.send(map(seen, range(parity, 300, 2)), parity, timestamp_ms=NOW_MS + parity, step_ms=2)
    records: list[TelemetryRecord] = []
    positions: dict[str, int] = {}
    for batch in (1, 7, 50, 3, 100):
        with topic.source(positions=positions) as source:
            assert source.positions() == positions
            records += take(source, batch, batch=13)
            until(lambda source=source: len(source.positions()) >= 2, "all partitions are known")
            positions = json.loads(json.dumps(source.positions()))
    with topic.source(positions=positions) as source:
        records += take(source, 300 - len(records))
    assert ids(records) == [str(number) for number in range(300)]  # and in the order of their times


def test_what_is_no_position(topic: Topic) -> None:
    with topic.source() as source:
        for positions in ({"t": 1}, {"t:x": 1}, {"t:1": -1}, {":1": 1}, {"t:1": True}):
            with pytest.raises(ValueError, match="topic:partition"):
                source.seek(positions)
        source.poll(1)
        with pytest.raises(RuntimeError, match="before the first poll"):
            source.seek({})


def test_one_message_of_many_records_is_never_parted(topic: Topic) -> None:
    spans = [otlp_span(f"r{number}") for number in range(20)]
    topic.send([seen(0), otlp_json(spans), seen(1)])
    with topic.source() as source:
        assert ids(until(lambda: source.poll(5), "the first")) == ["0"]
        assert source.positions()[f"{topic.name}:0"] == 1
        assert ids(until(lambda: source.poll(5), "the spans")) == [f"r{number}" for number in range(20)]
        assert source.positions()[f"{topic.name}:0"] == 2
        assert ids(source.poll(5)) == ["1"]


POISON: dict[bytes | None, str] = {
    None: "empty",
    b'{"kind": "request_seen", "secret prompt': "not-json",
    b"\xff\xfesecret": "not-utf8",
    b'{"kind": "secret", "time_seconds": 1}': "unknown-kind",
    b'{"kind": "request_seen", "id": "secret", "time_seconds": 1}': "missing-field",
    b'{"kind": "request_seen", "id": "secret", "time_seconds": NaN, "prompt_tokens": 1}': "bad-value",
    b"\nsecret": "not-otlp",
    b'{"kind": "request_seen", "id": "secret", "time_seconds": 90000000000, "prompt_tokens": 1}': "future-time",
}


def check_letters(letters: list[dict[str, Any]], topic: Topic) -> None:
    assert "secret" not in json.dumps(letters)
    assert [(letter["offset"], letter["reason"], letter["length"]) for letter in letters] == [
        (number + 1, reason, len(value or b"")) for number, (value, reason) in enumerate(POISON.items())
    ]
    assert {(letter["topic"], letter["partition"]) for letter in letters} == {(topic.name, 0)}


def test_poison_goes_to_a_file_with_its_reason(topic: Topic, tmp_path: Path) -> None:
    topic.send([seen(0), *POISON, seen(1)])
    with topic.source(letters=DeadLetters(tmp_path / "dead")) as source:
        assert ids(take(source, 2)) == ["0", "1"]
        assert source.rejected() == dict.fromkeys(POISON.values(), 1)  # each of a reason of its own
        assert source.positions()[f"{topic.name}:0"] == len(POISON) + 2
    check_letters([json.loads(line) for line in (tmp_path / "dead").read_text().splitlines()], topic)


def test_poison_goes_to_a_topic_with_its_reason(real_topic: Topic, real_kafka: OurBroker) -> None:
    dead = Topic(real_kafka, partitions=1)
    real_topic.send([seen(0), *POISON, seen(1)])
    with real_topic.source(dead_letter_topic=dead.name) as source:
        assert ids(take(source, 2)) == ["0", "1"]
    consumer = KafkaConsumer(dead.name, bootstrap_servers=real_kafka.address, auto_offset_reset="earliest")
    letters: list[dict[str, Any]] = []

    def collected() -> bool:
        for messages in consumer.poll(200).values():
            letters.extend(json.loads(message.value) for message in messages)
        return len(letters) >= len(POISON)

    until(collected, "all letters")
    consumer.close()
    dead.close()
    check_letters(letters, real_topic)


def test_letters_without_their_topic_do_not_keep_records_back(
    real_topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    real_topic.send([b"{"] * 100 + [seen(0)])
    with real_topic.source(dead_letter_topic="gone") as source:
        assert ids(take(source, 1)) == ["0"]
        assert source.rejected() == {"not-json": 100}
    assert caplog.text.count("cannot write dead letters to topic gone") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_a_broker_that_restarts_costs_nothing(real_topic: Topic, real_kafka: OurBroker, kill: bool) -> None:
    real_topic.send(map(seen, range(100)))
    with real_topic.source() as source:
        records = take(source, 60, batch=7)
        real_kafka.stop(kill=kill)
        records += take(source, 40)  # read ahead
        try:
            until(
                lambda: source.poll(10) == [] and "no answer from the brokers" in source.trouble,
                "the outage is noticed",
            )
        finally:
            real_kafka.start()
        real_topic.send(map(seen, range(100, 200)))
        records += take(source, 100)
        until(lambda: source.trouble == "", "all is well")
        assert ids(records) == [str(number) for number in range(200)]
        assert source.lost() == {}


@pytest.mark.slow
def test_a_broker_out_of_reach_costs_nothing(real_topic: Topic, real_kafka: OurBroker) -> None:
    """Its connections stay and nothing comes over them."""
    real_topic.send(map(seen, range(100)))
    with real_topic.source() as source:
        records = take(source, 100, batch=7)
        real_kafka.suspend()
        try:
            until(
                lambda: source.poll(10) == [] and "no answer from the brokers" in source.trouble,
                "the outage is noticed",
            )
        finally:
            real_kafka.resume()
        real_topic.send(map(seen, range(100, 200)))
        records += take(source, 100)
        until(lambda: source.trouble == "", "all is well")
        assert ids(records) == [str(number) for number in range(200)]
        assert source.lost() == {}


@pytest.mark.slow
def test_a_broker_that_comes_later(real_topic: Topic, real_kafka: OurBroker) -> None:
    real_topic.send([seen(0)])
    real_kafka.stop()
    try:
        with real_topic.source() as source:
            assert source.poll(10) == []
            until(lambda: source.trouble.startswith("cannot connect"), "the trouble")
            real_kafka.start()
            assert ids(take(source, 1)) == ["0"]
    finally:
        real_kafka.stop()
        real_kafka.start()


def test_records_that_expired_are_counted(real_topic: Topic, caplog: pytest.LogCaptureFixture) -> None:
    real_topic.send(map(seen, range(10)))
    real_topic.admin.delete_records({TopicPartition(real_topic.name, 0): 6})
    with real_topic.source(positions={f"{real_topic.name}:0": 2}) as source:
        assert ids(take(source, 4)) == ["6", "7", "8", "9"]
        assert source.lost() == {"expired": 4}
    assert "offsets 2 to 5 no longer exist" in caplog.text


def test_a_gap_with_nothing_behind_it_moves_the_position(real_topic: Topic) -> None:
    real_topic.send(map(seen, range(10)))
    real_topic.admin.delete_records({TopicPartition(real_topic.name, 0): 10})
    with real_topic.source(positions={f"{real_topic.name}:0": 2}) as source:
        until(lambda: not source.poll(10) and source.positions()[f"{real_topic.name}:0"] == 10, "the gap is noticed")
        assert source.lost() == {"expired": 8}


def test_a_topic_made_anew_is_read_from_its_beginning(real_topic: Topic) -> None:
    real_topic.send(map(seen, range(10)), timestamp_ms=NOW_MS)
    with real_topic.source(discover_seconds=1.0) as source:
        assert len(take(source, 10)) == 10
        real_topic.admin.delete_topics([real_topic.name])

        def made() -> bool:
            try:
                real_topic.create(2)
            except KafkaError:
                return False
            return True

        until(made, "the topic is made anew")
        real_topic.send(map(seen, range(10, 14)), timestamp_ms=NOW_MS + 1000)
        assert ids(take(source, 4)) == ["10", "11", "12", "13"]
        lost = source.lost()
    assert lost.keys() == {"truncated"}
    assert 6 <= lost["truncated"] <= 10  # what was beyond the new log's end when that was noticed, between 0 and 4


def test_new_partitions_are_read_from_their_beginning(real_topic: Topic) -> None:
    with real_topic.source(start="latest", discover_seconds=0.5) as source:
        until(lambda: not source.poll(1) and len(source.positions()) == 2, "the first two")
        real_topic.admin.create_partitions({real_topic.name: NewPartitions(3)})
        real_topic.send([seen(0)], partition=2)
        assert ids(take(source, 1)) == ["0"]
        positions = source.positions()
    assert positions == {f"{real_topic.name}:0": 0, f"{real_topic.name}:1": 0, f"{real_topic.name}:2": 1}
    del positions[f"{real_topic.name}:2"]  # a checkpoint from before
    with real_topic.source(start="latest", positions=positions) as source:
        assert ids(take(source, 1)) == ["0"]


def test_a_topic_that_comes_later_is_read_from_its_beginning(real_topic: Topic, real_kafka: OurBroker) -> None:
    name = f"{real_topic.name}-2"
    with real_topic.source(topics=[real_topic.name, name], start="latest", discover_seconds=0.5) as source:
        until(lambda: not source.poll(1) and source.trouble.startswith(f"no topic {name}"), "the trouble")
        later = Topic(real_kafka, 1, name)
        later.send([seen(0)])
        later.close()
        assert ids(take(source, 1)) == ["0"]
        until(lambda: source.trouble == "", "all is well")


def ahead(source: KafkaSource) -> int:
    """How many messages were read and not yet asked for."""
    return sum(len(lane.queue) for lane in source._merge._lanes.values())


def test_what_is_read_ahead_is_bounded(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_source, "FETCH_MESSAGES", 10)
    for partition in (0, 1):
        topic.send((seen(number) for number in range(1000)), partition=partition)
    with topic.source(buffer_bytes=2**20) as source:
        first = until(lambda: source.poll(1), "a record")
        # A message of this size weighs more than 1,500 bytes: there is room for fewer than 700.
        until(lambda: ahead(source) > 200, "it reads ahead")
        time.sleep(1.0)  # for it to read more, if it would
        assert ahead(source) < 720
        assert len(take(source, 1999, batch=10)) + len(first) == 2000


def test_lag_and_offsets_for_those_who_watch(real_topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_source, "CHECK_SECONDS", 0.2)
    group = f"group-{real_topic.name}"
    real_topic.send(map(seen, range(10)))
    with real_topic.source(group=group) as source:
        take(source, 3, batch=3)
        until(lambda: source.lag_records == 7.0, "the lag")

        def committed() -> bool:
            offsets = real_topic.admin.list_group_offsets({group: None})[group]
            return any(found.offset == 3 for found in offsets.values())

        until(committed, "the commit")
        take(source, 7)
        until(lambda: source.lag_records == 0.0, "no lag")
    with real_topic.source(group=group, start="earliest") as source:  # which does not go by the group's
        assert ids(take(source, 1)) == ["0"]


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_tls_and_passwords(
    real_topic: Topic, real_kafka: OurBroker, mechanism: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", PLAIN_PASSWORD)
    (tmp_path / "password").write_text(f"{SCRAM_PASSWORD}\n")
    password = {"env": "KAFKA_PASSWORD"} if mechanism == "PLAIN" else {"file": tmp_path / "password"}
    real_topic.send([seen(0)])
    secure: dict[str, Any] = {
        "brokers": [real_kafka.secure_address],
        "tls": {"ca": real_kafka.certificate},
        "sasl": {"mechanism": mechanism, "username": USER, "password": password},
    }
    with real_topic.source(**secure) as source:
        assert ids(take(source, 1)) == ["0"]


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
def test_a_wrong_password_is_told_and_not_shown(
    real_topic: Topic,
    real_kafka: OurBroker,
    mechanism: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(client, "ANSWER_MS", 2_000)
    monkeypatch.setenv("KAFKA_PASSWORD", "hunter2")
    secure: dict[str, Any] = {
        "brokers": [real_kafka.secure_address],
        "tls": {"ca": real_kafka.certificate},
        "sasl": {"mechanism": mechanism, "username": USER, "password": {"env": "KAFKA_PASSWORD"}},
    }
    with caplog.at_level(logging.DEBUG), real_topic.source(**secure) as source:
        told = until(
            lambda: not source.poll(1) and source.trouble.startswith("cannot connect") and source.trouble, "it"
        )
    assert real_kafka.secure_address in told
    assert "sasl" in told
    assert "hunter2" not in caplog.text + told


def test_a_certificate_of_nobody_is_told(
    real_topic: Topic, real_kafka: OurBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_MS", 2_000)
    with real_topic.source(brokers=[real_kafka.secure_address], tls={}) as source:
        until(lambda: not source.poll(1) and source.trouble.startswith("cannot connect"), "the trouble")


# --- spans --------------------------------------------------------------------------------------------------------


def otlp_span(id: str, start_seconds: float = NOW) -> dict[str, Any]:
    """A span as the OpenTelemetry Collector encodes it in JSON: 64-bit numbers as text."""
    attributes = {
        "gen_ai.request.id": {"stringValue": id},
        "gen_ai.usage.prompt_tokens": {"intValue": "100"},
        "gen_ai.usage.completion_tokens": {"intValue": "20"},
        "gen_ai.request.max_tokens": {"intValue": "64"},
        "gen_ai.latency.time_to_first_token": {"doubleValue": 0.25},
        "gen_ai.latency.e2e": {"doubleValue": 1.5},
        "gen_ai.latency.time_in_queue": {"doubleValue": 0.125},
        "gen_ai.request.top_p": {"doubleValue": 1},
    }
    return {
        "traceId": "5b8efff798038103d269b633813fc60c",
        "spanId": "eee19b7ec3c1b174",
        "name": "llm_request",
        "kind": 2,
        "startTimeUnixNano": str(int(start_seconds * 1e9)),
        "endTimeUnixNano": str(int((start_seconds + 1.5) * 1e9)),
        "attributes": [{"key": key, "value": value} for key, value in attributes.items()],
        "status": {},
    }


def otlp_json(spans: list[dict[str, Any]]) -> bytes:
    resource = {"attributes": [{"key": "k8s.pod.name", "value": {"stringValue": "vllm-0"}}]}
    scope = {"scope": {"name": "vllm.llm_engine"}, "spans": spans}
    return json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}).encode()


def test_spans_in_both_encodings_beside_records(topic: Topic) -> None:
    pytest.importorskip("opentelemetry.proto", reason="needs the extra otlp")
    from google.protobuf import json_format
    from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

    message = otlp_json([otlp_span("a"), otlp_span("x") | {"name": "startup"}])
    protobuf = json_format.Parse(message.replace(b'"a"', b'"b"'), TracesData()).SerializeToString()
    topic.send([message, protobuf, seen(3)])
    with topic.source() as source:
        records = take(source, 3)
        assert source.rejected() == {}
    expected = RequestRecord(
        id="a",
        time_seconds=NOW,
        prompt_tokens=100,
        output_tokens=20,
        max_tokens=64,
        ttft_seconds=0.25,
        e2e_seconds=1.5,
        queue_seconds=0.125,
        pod="vllm-0",
    )
    assert records == [expected, expected.model_copy(update={"id": "b"}), seen(3)]
