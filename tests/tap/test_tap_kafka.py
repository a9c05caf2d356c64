"""The tap as a process before Apache Kafka: records arrive, text does not, and without Kafka no client suffers."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kafka_broker import SCRAM_PASSWORD, USER, OurBroker
from kavier_twin.daemon.config import read_settings
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.tap.hashing import BlockHasher
from tap.openai_server import OpenAIServer, Running, serving, token_ids
from tap.tap_process import tap_process
from waiting import PATIENCE_SECONDS, until

kafka = pytest.importorskip("kafka", reason="needs the extra kafka")

CANARY = "xyzzy-plugh-9f3a"
KEY = "sk-canary-key-77"


@pytest.fixture
def engine() -> OpenAIServer:
    return OpenAIServer()


@pytest.fixture
def upstream(engine: OpenAIServer) -> Iterator[Running]:
    with serving(engine) as running:
        yield running


@pytest.fixture
def topic(real_kafka: OurBroker) -> str:
    return real_kafka.new_topic()


def values(broker: OurBroker, topic: str, count: int) -> list[bytes]:
    """The topic's messages, keys with them, once there are `count` requests that were seen, or that finished."""
    consumer = kafka.KafkaConsumer(topic, bootstrap_servers=broker.address, auto_offset_reset="earliest", group_id=None)
    found: list[bytes] = []

    def read() -> bool:
        for messages in consumer.poll(timeout_ms=200).values():
            found.extend(message.key + b" " + message.value for message in messages)
        return len({(value.split(b" ")[0], b"request_seen" in value) for value in found}) >= count

    try:
        until(read, f"{count} records")
    finally:
        consumer.close()
    return found


def post(url: str, number: int = 0, **more: Any) -> httpx.Response:
    message = {"role": "user", "content": f"{CANARY} {number} " + "once upon a time " * 4}
    asked = {"model": "base", "messages": [message], "max_tokens": 3, "stream": True, **more}
    headers = {"Authorization": f"Bearer {KEY}", "X-Session-ID": "s"}
    return httpx.post(f"{url}/v1/chat/completions", json=asked, headers=headers, timeout=30.0)


@pytest.mark.slow
def test_traffic_through_the_tap_and_kafka_is_mirrored_and_its_text_is_nowhere(
    real_kafka: OurBroker, topic: str, upstream: Running, engine: OpenAIServer, tmp_path: Path
) -> None:
    options = ("--upstream", upstream.url, "--kafka", real_kafka.address, "--topic", topic, "--pool", "chat")
    with tap_process(tmp_path / "log", *options) as tap:
        for number in range(20):
            assert post(tap.url, number).status_code == 200
        # What goes wrong must not show the text either.
        assert post(tap.url, cache_salt=CANARY).status_code == 200
        assert post(tap.url, model=CANARY * 100).status_code == 200  # longer than a record's model may be
        httpx.post(f"{tap.url}/v1/completions", content=f'{{"prompt": "{CANARY}"'.encode())
        httpx.post(f"{tap.url}/v1/completions", json={"prompt": {"a": CANARY}, "stream": True})
        httpx.get(f"{tap.url}/{CANARY}", headers={"Authorization": f"Bearer {KEY}"})
        messages = values(real_kafka, topic, 46)
        engine.tokenize_status = 500
        assert post(tap.url, 30).status_code == 200
        tap.counted('without_hashes_total{reason="tokenize-failed"} 1.0')
        metrics = tap.metrics()
        assert tap.end() == 0
        told = "\n".join((tap.said, metrics, *map(repr, messages)))
    assert f"Bearer {KEY}".encode() == engine.requests[0][2][b"authorization"]
    assert KEY not in told
    told = told.replace(json.dumps((CANARY * 100)[:512]), "")  # a model's name is no text
    assert CANARY not in told

    settings = tmp_path / "twin.yaml"
    settings.write_text(f"""
pool: chat
fleet: {{engine: {{num_gpu_blocks: 300}}}}
sources: [{{type: kafka, brokers: ["{real_kafka.address}"], topics: [{topic}], start: earliest, group: null}}]
mirror: {{late_seconds: 60}}
forecast: {{scenarios: 2, horizons_seconds: [5], policies: [{{name: today}}], every_seconds: 1000}}
http: {{port: 0}}
""")
    daemon = Daemon.of(read_settings(settings))
    daemon.start()
    try:
        until(lambda: daemon.view.finished_requests == 24, "all requests are mirrored")
        assert daemon.view.records["accepted"] == 48
        assert daemon.view.records["rejected"] == 0
    finally:
        assert daemon.stop()
    seen = [json.loads(value.split(b" ", 1)[1]) for value in messages if b"request_seen" in value]
    hashes = {tuple(record.get("block_hashes", ())) for record in seen}
    prompt = f"{CANARY} 0 " + "once upon a time " * 4
    assert BlockHasher("sha256", 16).hashes(token_ids(prompt)) in hashes


@pytest.mark.slow
def test_kafka_away_costs_no_request_and_what_waited_arrives(
    real_kafka: OurBroker, topic: str, upstream: Running, tmp_path: Path
) -> None:
    options = ("--upstream", upstream.url, "--kafka", real_kafka.address, "--topic", topic)
    with tap_process(tmp_path / "log", *options) as tap:
        assert post(tap.url).status_code == 200
        assert len(values(real_kafka, topic, 2)) == 2
        real_kafka.stop()
        try:
            for number in range(30):
                assert post(tap.url, number).status_code == 200
            until(lambda: tap.metric("buffered_records") >= 60, "all that Kafka does not have count as buffered")
            assert tap.metric('records_total{kind="request_finished"}') == 1
            until(lambda: "records cannot be handed on" in tap.said, "the log tells of it")
        finally:
            real_kafka.start()
        until(lambda: tap.metric("buffered_records") == 0, "none is left")
        until(lambda: "records are handed on again" in tap.said, "the log tells of the end, too")
        assert tap.said.count("records cannot be handed on") == tap.said.count("records are handed on again") == 1
        assert len({value.split(b" ")[0] for value in values(real_kafka, topic, 62)}) == 31
        assert "dropped_total{" not in tap.metrics()
        assert tap.end() == 0


@pytest.mark.slow
def test_a_tap_starts_and_ends_without_kafka(
    real_kafka: OurBroker, topic: str, upstream: Running, tmp_path: Path
) -> None:
    """And hands on what waited if Kafka comes meanwhile."""
    options = ("--upstream", upstream.url, "--kafka", real_kafka.address, "--topic", topic)
    real_kafka.stop()
    try:
        with tap_process(tmp_path / "log", *options) as tap:
            assert post(tap.url).status_code == 200
            tap.counted("buffered_records 2.0")
            real_kafka.start()
            assert len(values(real_kafka, topic, 2)) == 2
            tap.counted("buffered_records 0.0")
            real_kafka.stop()
            assert post(tap.url).status_code == 200
            assert tap.end() == 0
            assert "not handed on at the end" in tap.said
    finally:
        real_kafka.start()


def test_kafka_by_tls_and_sasl(real_kafka: OurBroker, topic: str, upstream: Running, tmp_path: Path) -> None:
    security = tmp_path / "kafka.yaml"
    security.write_text(f"""
tls: {{ca: {real_kafka.certificate}}}
sasl: {{mechanism: SCRAM-SHA-512, username: {USER}, password: {{env: TAP_TEST_PASSWORD}}}}
""")
    options = ("--upstream", upstream.url, "--kafka", real_kafka.secure_address, "--topic", topic)
    environment = {"TAP_TEST_PASSWORD": SCRAM_PASSWORD}
    with tap_process(tmp_path / "log", *options, "--kafka-security", security, environment=environment) as tap:
        assert post(tap.url).status_code == 200
        assert len(values(real_kafka, topic, 2)) == 2
        for process in (tap.process.pid, tap.worker()):
            assert SCRAM_PASSWORD.encode() not in Path(f"/proc/{process}/cmdline").read_bytes()
        assert tap.end() == 0
        assert SCRAM_PASSWORD not in tap.said


def test_a_signal_ends_it_after_the_answers_under_way(upstream: Running, engine: OpenAIServer, tmp_path: Path) -> None:
    engine.pause_seconds = 0.1
    output = tmp_path / "records.jsonl"
    answers: list[httpx.Response] = []
    with tap_process(tmp_path / "log", "--upstream", upstream.url, "--output", output) as tap:
        client = threading.Thread(target=lambda: answers.append(post(tap.url, max_tokens=15)))
        client.start()
        until(lambda: engine.requests, "the request is under way")
        status = tap.end()
        client.join()
        assert status == 0
    assert answers[0].text.endswith("data: [DONE]\n\n")
    kinds = [json.loads(line)["kind"] for line in output.read_text().splitlines()]
    assert kinds == ["request_seen", "request_finished"]


def test_the_grace_ends(upstream: Running, engine: OpenAIServer, tmp_path: Path) -> None:
    engine.pause_seconds = 0.1
    output = tmp_path / "records.jsonl"
    with tap_process(tmp_path / "log", "--upstream", upstream.url, "--output", output, "--grace", "1s") as tap:
        asked = {"model": "base", "prompt": "a", "max_tokens": 1000, "stream": True}
        with httpx.stream("POST", f"{tap.url}/v1/completions", json=asked) as answer:
            next(answer.iter_raw())
            assert tap.end(signal.SIGINT) == 130
    assert engine.cancelled.wait(PATIENCE_SECONDS)
    assert json.loads(output.read_text().splitlines()[1])["finish_reason"] == "abort"


@pytest.mark.slow
def test_traffic_outlives_the_process_that_makes_records(upstream: Running, tmp_path: Path) -> None:
    output = tmp_path / "records.jsonl"
    with tap_process(tmp_path / "log", "--upstream", upstream.url, "--output", output) as tap:
        first = tap.worker()
        os.kill(first, signal.SIGKILL)
        assert post(tap.url).status_code == 200
        until(lambda: "another one is started" in tap.said, "it is told")
        until(lambda: tap.worker() not in (0, first), "another one")
        until(lambda: post(tap.url).status_code == 200 and output.read_text().count("request_finished"), "records")
        assert CANARY not in tap.said + output.read_text()
        os.kill(tap.worker(), signal.SIGKILL)
        assert tap.end() == 0  # though just now there is no worker, or one that starts
