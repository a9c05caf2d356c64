"""From the value of a Kafka record to telemetry records, whatever it is encoded as."""

from __future__ import annotations

from typing import Final

from connectors.kafka.otlp import Span, json_spans, protobuf_spans, record_of
from connectors.traces.base import MAX_LINE_BYTES, Malformed, decode, json_object
from connectors.traces.telemetry import parse_record
from kavier_twin.telemetry import TelemetryRecord

# Field 1 of TracesData, length-delimited: how every OTLP message in protobuf begins. In JSON it is a line feed, with
# which no writer of JSON begins.
_PROTOBUF: Final = b"\x0a"
_OTLP_KEY: Final = "resourceSpans"


def parse_value(value: bytes | None, pool: str) -> list[TelemetryRecord | Malformed]:
    """All records of one value, and what is wrong with each that is none. Spans do not name a pool: theirs is `pool`.

    Never raises, and never quotes the value.
    """
    try:
        if not value:
            raise Malformed("empty", "a Kafka record without a value")
        if len(value) > MAX_LINE_BYTES:
            raise Malformed("too-long", f"more than {MAX_LINE_BYTES} bytes")
        if value.startswith(_PROTOBUF):
            return [_of_span(span, pool) for span in protobuf_spans(value)]
        if b'"resourceSpans"' in value:
            document = json_object(decode(value))
            if _OTLP_KEY in document:
                return [_of_span(span, pool) for span in json_spans(document)]
        return [parse_record(value)]
    except Malformed as what:
        return [what]


def _of_span(span: Span | Malformed, pool: str) -> TelemetryRecord | Malformed:
    if isinstance(span, Malformed):
        return span
    try:
        return record_of(span, pool)
    except Malformed as what:
        return what
