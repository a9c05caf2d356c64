"""(g) Records from Apache Kafka into the twin's hands: records per CPU second, and where the time goes.

One topic of three partitions on a broker of its own (tests/kafka_broker.py), full of requests that share nothing: seen
and finished with 32 block hashes, or as vLLM's spans of 64 in a message, as a Collector batches them. The CPU seconds
are all of this process's threads, less the broker's, which is another process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from benchmarks.common import report
from connectors.kafka.messages import parse_value
from connectors.kafka.settings import KafkaSettings
from connectors.kafka.source import KafkaSource
from kavier_twin.telemetry import RequestFinished, RequestSeen

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from kafka_broker import kafka_broker

RECORDS = 60_000
PARTITIONS = 3
BATCH_RECORDS = 500  # polled at a time, as the daemon does
SPANS_TOGETHER = 64


def main() -> None:
    """Measure each encoding."""
    with kafka_broker() as broker:
        if broker is None or not broker.real:
            raise SystemExit("this benchmark needs Apache Kafka: install Java and Maven")
        rows = [
            _measure(broker.address, name, values())
            for name, values in (("records", _records), ("spans, JSON", _json), ("spans, protobuf", _protobuf))
        ]
    report(
        "(g) ingest from Kafka",
        rows,
        "fetch: kafka-python alone; parse: the same values from memory; order and hand-over: the rest of the whole",
    )


def _measure(address: str, encoding: str, values: list[bytes]) -> dict[str, Any]:
    topic = f"ingest-{time.time_ns()}"
    admin = KafkaAdminClient(bootstrap_servers=address)
    admin.create_topics({topic: {"num_partitions": PARTITIONS, "replication_factor": 1}})
    admin.close()
    producer = KafkaProducer(bootstrap_servers=address, linger_ms=50, batch_size=2**17)
    began_ms = time.time_ns() // 1_000_000
    for number, value in enumerate(values):
        producer.send(topic, value, partition=number % PARTITIONS, timestamp_ms=began_ms + number)
    producer.flush()
    producer.close()
    end_to_end, wall = _cpu_seconds(lambda: _ingest(address, topic))
    fetch, _ = _cpu_seconds(lambda: _fetch(address, topic, len(values)))
    parse, _ = _cpu_seconds(lambda: [parse_value(value, "pool") for value in values])
    return {
        "encoding": encoding,
        "records": RECORDS,
        "MB": sum(map(len, values)) / 1e6,
        "records / CPU s": RECORDS / end_to_end,
        "records / s": RECORDS / wall,
        "CPU s": end_to_end,
        "fetch": f"{fetch / end_to_end:.0%}",
        "parse": f"{parse / end_to_end:.0%}",
        "order and hand-over": f"{1 - (fetch + parse) / end_to_end:.0%}",
    }


def _ingest(address: str, topic: str) -> None:
    source = KafkaSource(KafkaSettings(brokers=(address,), topics=(topic,), start="earliest", group=None))
    taken = 0
    while taken < RECORDS:
        records = source.poll(BATCH_RECORDS)
        taken += len(records)
        if not records:
            time.sleep(0.02)
    source.close()


def _fetch(address: str, topic: str, messages: int) -> None:
    consumer = KafkaConsumer(bootstrap_servers=address, enable_auto_commit=False, auto_offset_reset="earliest")
    consumer.assign([TopicPartition(topic, number) for number in range(PARTITIONS)])
    consumer.seek_to_beginning()
    taken = 0
    while taken < messages:
        taken += sum(map(len, consumer.poll(timeout_ms=200).values()))
    consumer.close()


def _cpu_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall-clock seconds of the better of two runs."""
    found = []
    for _ in range(2):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(found)


def _records() -> list[bytes]:
    now = time.time()
    values = []
    for number in range(RECORDS // 2):
        hashes = tuple((number * 32 + block) * 0x9E3779B97F4A7C15 % 2**64 for block in range(32))
        at = now + number / 100
        seen = RequestSeen(
            id=f"r{number}", time_seconds=at, prompt_tokens=500, block_tokens=16, block_hashes=hashes, pod="vllm-0"
        )
        ended = RequestFinished(id=f"r{number}", time_seconds=at, output_tokens=200, ttft_seconds=0.2, e2e_seconds=3.0)
        values += [seen.model_dump_json().encode(), ended.model_dump_json(exclude_none=True).encode()]
    return values


def _json() -> list[bytes]:
    starts = range(0, RECORDS, SPANS_TOGETHER)
    return [json.dumps(_message(range(n, min(n + SPANS_TOGETHER, RECORDS)))).encode() for n in starts]


def _protobuf() -> list[bytes]:
    return [json_format.Parse(value, TracesData()).SerializeToString() for value in _json()]


def _message(numbers: range) -> dict[str, Any]:
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": [_span(number) for number in numbers]}]}]}


def _span(number: int) -> dict[str, Any]:
    start = time.time_ns()
    attributes: dict[str, dict[str, Any]] = {
        "gen_ai.request.id": {"stringValue": f"r{number}"},
        "gen_ai.usage.prompt_tokens": {"intValue": "500"},
        "gen_ai.usage.completion_tokens": {"intValue": "200"},
        "gen_ai.request.max_tokens": {"intValue": "512"},
        "gen_ai.latency.time_to_first_token": {"doubleValue": 0.2},
        "gen_ai.latency.e2e": {"doubleValue": 3.0},
        "gen_ai.latency.time_in_queue": {"doubleValue": 0.01},
        "gen_ai.latency.time_in_model_prefill": {"doubleValue": 0.1},
        "gen_ai.latency.time_in_model_decode": {"doubleValue": 2.8},
        "gen_ai.latency.time_in_model_inference": {"doubleValue": 2.9},
    }
    return {
        "name": "llm_request",
        "kind": 2,
        "startTimeUnixNano": str(start),
        "endTimeUnixNano": str(start + 3_000_000_000),
        "attributes": [{"key": key, "value": value} for key, value in attributes.items()],
    }


if __name__ == "__main__":
    main()
