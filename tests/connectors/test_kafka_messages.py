"""What a Kafka record's value may hold: telemetry, spans in two encodings, and anything else."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import effort
from connectors.kafka import otlp
from connectors.kafka.messages import parse_value
from connectors.traces.base import MAX_LINE_BYTES, Malformed
from kavier_twin.telemetry import EngineSample, RequestFinished, RequestRecord, RequestSeen

REASONS = {
    "empty",
    "too-long",
    "not-utf8",
    "not-json",
    "not-an-object",
    "unknown-kind",
    "missing-field",
    "bad-value",
    "hash-coverage",
    "hash-chain",
    "not-otlp",
}

SEEN: dict[str, Any] = {
    "version": 1,
    "kind": "request_seen",
    "id": "a",
    "time_seconds": 1_790_000_000.5,
    "pool": "chat",
    "model": "m",
    "session": "s",
    "prompt_tokens": 70,
    "max_tokens": 100,
    "block_hashes": [1, 2, 3],
    "block_tokens": 32,
    "priority": 0,
    "pod": "p",
}
FINISHED: dict[str, Any] = {
    "kind": "request_finished",
    "id": "a",
    "time_seconds": 1_790_000_002.5,
    "output_tokens": 3,
    "ttft_seconds": 0.1,
    "e2e_seconds": 2.0,
    "queue_seconds": 0.01,
    "cached_tokens": 32,
    "preemptions": 0,
    "finish_reason": "stop",
    "block_hashes": [1, 2, 3, 4],
}
WHOLE: dict[str, Any] = {**SEEN, **FINISHED, "kind": "request", "hashes_cover_output": False, "block_hashes": [1, 2]}
SAMPLE: dict[str, Any] = {"kind": "engine_sample", "time_seconds": 1.0, "requests_running": 3, "pod": "p"}


def attribute(key: str, **value: Any) -> dict[str, Any]:
    return {"key": key, "value": value}


def span(**more: Any) -> dict[str, Any]:
    return {
        "name": "llm_request",
        "kind": 2,
        "startTimeUnixNano": "1790000000500000000",
        "endTimeUnixNano": "1790000002500000000",
        "attributes": [
            attribute("gen_ai.request.id", stringValue="a"),
            attribute("gen_ai.usage.prompt_tokens", intValue="70"),
            attribute("gen_ai.usage.completion_tokens", intValue=3),
            attribute("gen_ai.latency.time_to_first_token", doubleValue=0.25),
            attribute("gen_ai.request.temperature", doubleValue=0.7),
            attribute("somebody.elses", arrayValue={"values": []}),
        ],
        **more,
    }


def message(*spans: Any, **resource: Any) -> dict[str, Any]:
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": list(spans)}]}]}


def parse(value: Any) -> list[Any]:
    return parse_value(value if isinstance(value, bytes) else json.dumps(value).encode(), "pool")


def test_each_kind_of_record() -> None:
    for value, kind in (
        (SEEN, RequestSeen),
        (FINISHED, RequestFinished),
        (WHOLE, RequestRecord),
        (SAMPLE, EngineSample),
    ):
        (record,) = parse(value)
        assert type(record) is kind


def test_a_record_that_speaks_of_spans_is_a_record() -> None:
    (record,) = parse(SEEN | {"session": "resourceSpans"})
    assert record.session == "resourceSpans"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "empty"),
        (b" " * (MAX_LINE_BYTES + 1), "too-long"),
        ([], "not-an-object"),
        (SEEN | {"block_hashes": [1, 2, 3, 4]}, "hash-coverage"),
        (SEEN | {"block_hashes": [1, 2, 1]}, "hash-chain"),
        (FINISHED | {"block_hashes": [7, 7]}, "hash-chain"),
        (WHOLE | {"block_hashes": [1, 2, 3, 4]}, "hash-coverage"),
        (SEEN | {"version": 2}, "bad-value"),
        (SEEN | {"time_seconds": math.nan}, "bad-value"),
        (FINISHED | {"ttft_seconds": -0.1}, "bad-value"),
        ({"resourceSpans": 3}, "not-otlp"),
        ({"resourceSpans": [{"scopeSpans": {}}]}, "not-otlp"),
        (message(3), "not-otlp"),
        (message(span(attributes=3)), "not-otlp"),
        (message(span(startTimeUnixNano="soon")), "bad-value"),
        (message(span(startTimeUnixNano=True)), "bad-value"),
        (message(span(startTimeUnixNano=None)), "bad-value"),
        (message(span(startTimeUnixNano=0)), "missing-field"),
        (message(span(attributes=[])), "missing-field"),
        (message(span(attributes=[attribute("gen_ai.latency.e2e", doubleValue="NaN")])), "bad-value"),
        (message(span(attributes=[attribute("gen_ai.usage.prompt_tokens", intValue="-1")])), "bad-value"),
        (message(span(), attributes=3), "not-otlp"),
        (b"\x0a\xff\xff", "not-otlp"),
        (b"\n{}", "not-otlp"),
    ],
)
def test_what_is_no_record(value: Any, reason: str) -> None:
    (found,) = parse(value)
    assert isinstance(found, Malformed)
    assert found.reason == reason


def test_a_bad_span_leaves_the_others() -> None:
    spans = [span(name="other"), span(attributes=[]), span(startTimeUnixNano="x"), span()]
    found = parse(message(*spans, attributes=[attribute("k8s.pod.name", stringValue="vllm-3")]))
    assert [getattr(entry, "reason", None) for entry in found] == ["missing-field", "bad-value", None]
    assert found[-1] == RequestRecord(
        id="a",
        time_seconds=1_790_000_000.5,
        pool="pool",
        prompt_tokens=70,
        output_tokens=3,
        ttft_seconds=0.25,
        e2e_seconds=2.0,  # the span's length, as no attribute says
        pod="vllm-3",
    )


def test_without_the_library_protobuf_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "_protobuf", lambda: None)
    (found,) = parse(b"\x0a\x00")
    assert found.reason == "no-otlp-library"
    assert "kavier-twin[otlp]" in found.detail


# --- anything at all ----------------------------------------------------------------------------------------------

ODD: list[Any] = [
    *(
        None,
        True,
        "",
        "x" * 600,
        "\ud800",
        "\u0000",
        "日本語\u202e",
        [],
        {},
        [[]],
        -1,
        0,
        1,
        2**63,
        2**64,
        10**400,
        0.5,
        -0.0,
    ),
    *(
        1e308,
        -1e308,
        math.nan,
        math.inf,
        -math.inf,
        "NaN",
        "1",
        [1] * 50,
        list(range(5000)),
        [-1],
        [2**64],
        {"a": {"b": []}},
    ),
    *("request", "request_seen", "request_finished", "resourceSpans", "llm_request"),
]


def mutated(dice: random.Random) -> bytes | None:
    """A value that is nearly right, or not at all."""
    base = dice.choice([SEEN, FINISHED, WHOLE, SAMPLE, message(span()), message(span(), span())])
    value = json.loads(json.dumps(base))
    for _ in range(dice.choice([0, 1, 1, 1, 2, 5])):
        place = value
        while True:  # somewhere in the tree
            if isinstance(place, dict) and place:
                key: Any = dice.choice(list(place))
            elif isinstance(place, list) and place:
                key = dice.randrange(len(place))
            else:
                break
            if isinstance(place[key], dict | list) and dice.random() < 0.7:
                place = place[key]
                continue
            change = dice.random()
            if change < 0.6:
                place[key] = deepcopy(dice.choice(ODD))
            elif change < 0.8 and isinstance(place, dict):
                del place[key]
            elif isinstance(place, dict):
                place[f"{key}{dice.choice(ODD)}"[:40]] = deepcopy(place[key])
            else:
                place.append(deepcopy(place[key]))
            break
    data = json.dumps(value, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")
    form = dice.random()
    if form < 0.05:
        return dice.choice([None, b"", b"null", b"[" * 100_000, b"\xff\xfe", b"9" * 5000, b"{" + data, data + data])
    if form < 0.15:
        return data[: dice.randrange(len(data) + 1)]
    if form < 0.25:
        at = dice.randrange(len(data))
        return data[:at] + dice.randbytes(dice.randrange(4)) + data[at + 1 :]
    if form < 0.35:
        return as_protobuf(dice)
    return data


def as_protobuf(dice: random.Random) -> bytes:
    trace = pytest.importorskip("opentelemetry.proto.trace.v1.trace_pb2", reason="needs the extra otlp")
    traces = trace.TracesData()
    scope_spans = traces.resource_spans.add().scope_spans.add()
    found = scope_spans.spans.add(name=dice.choice(["llm_request", "llm_request", "other"]))
    found.start_time_unix_nano = dice.choice([0, 1_790_000_000_500_000_000, 2**64 - 1])
    found.end_time_unix_nano = dice.choice([0, 1, 1_790_000_002_500_000_000, 2**64 - 1])
    for name in (*otlp._FIELDS, "other"):
        if dice.random() < 0.9:
            value = found.attributes.add(key=name).value
            kind = dice.choice(["int_value", "double_value", "string_value", "bool_value", None])
            if kind == "int_value":
                value.int_value = dice.choice([-1, 0, 3, 70, 2**63 - 1])
            elif kind == "double_value":
                value.double_value = dice.choice([0.25, -1.0, math.nan, math.inf])
            elif kind == "string_value":
                value.string_value = dice.choice(["", "a", "\u0000", "x" * 600])
            elif kind == "bool_value":
                value.bool_value = True
    data = bytearray(traces.SerializeToString())
    if dice.random() < 0.3:
        data[dice.randrange(1, len(data))] = dice.randrange(256)
    return bytes(data)


def fuzz(count: int, dice: random.Random) -> Counter[str]:
    """Parse `count` values; how many came out as what."""
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        found = parse_value(mutated(dice), "pool")
        for entry in found:
            if isinstance(entry, Malformed):
                assert entry.reason in REASONS
                outcomes[entry.reason] += 1
                continue
            assert math.isfinite(entry.time_seconds)
            if isinstance(entry, RequestSeen):
                assert 1 <= entry.prompt_tokens <= 100_000_000
                assert len(set(entry.block_hashes)) == len(entry.block_hashes)
                assert all(0 <= hash < 2**64 for hash in entry.block_hashes)
            outcomes["record"] += 1
        if not found:
            outcomes["no span of a request"] += 1
    return outcomes


def test_anything_is_a_record_or_counted_by_reason() -> None:
    outcomes = fuzz(5_000, random.Random(1))
    assert set(outcomes) >= {"record", "no span of a request", *REASONS - {"too-long"}}
    assert outcomes.total() >= 5_000


@pytest.mark.slow
def test_much_of_anything() -> None:
    count = effort.times(20_000)
    outcomes = fuzz(count, effort.dice())
    assert outcomes.total() >= count
    assert 0.1 < outcomes["record"] / outcomes.total() < 0.7  # it is neither all right nor all wrong


def test_spans_with_the_names_of_todays_conventions() -> None:
    """As Collectors rename them, and vLLM is to: the old names are deprecated."""
    path = Path(__file__).parents[1] / "data" / "cases" / "otlp-input-tokens.json"
    (record,) = parse(json.loads(path.read_text()))
    assert isinstance(record, RequestRecord)
    assert (record.id, record.pod, record.time_seconds) == ("cmpl-1", "vllm-0", 1_790_000_000.0)
    assert (record.prompt_tokens, record.output_tokens, record.max_tokens) == (1_000, 100, 256)
    assert (record.ttft_seconds, record.e2e_seconds, record.queue_seconds) == (0.1, 1.5, 0.01)


def test_what_spans_tell_by_new_names_alone() -> None:
    reasons = {"values": [{"stringValue": "length"}, {"stringValue": "stop"}]}
    attributes = [
        attribute("gen_ai.response.id", stringValue="cmpl-2"),
        attribute("gen_ai.usage.prompt_tokens", intValue="999"),
        attribute("gen_ai.usage.input_tokens", intValue="1000"),
        attribute("gen_ai.usage.output_tokens", intValue=100),
        attribute("gen_ai.usage.cache_read.input_tokens", intValue="640"),
        attribute("gen_ai.request.model", stringValue="m"),
        attribute("gen_ai.response.finish_reasons", arrayValue=reasons),
    ]
    (record,) = parse(message(span(attributes=attributes)))
    assert isinstance(record, RequestRecord)
    assert (record.id, record.prompt_tokens, record.cached_tokens) == ("cmpl-2", 1_000, 640)
    assert (record.model, record.finish_reason) == ("m", "length")
    (nameless,) = parse(message(span(spanId="00f067aa0ba902b7", attributes=attributes[1:])))
    assert isinstance(nameless, RequestRecord)
    assert nameless.id == "00f067aa0ba902b7"
