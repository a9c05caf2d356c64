"""vLLM's spans of requests, as an OpenTelemetry Collector writes them to Kafka: OTLP as JSON or as protobuf.

A span `llm_request` is a whole request without hashes. It starts with the arrival; its attributes (vLLM 0.32,
tracing/utils.py and v1/engine/output_processor.py) are seconds since then, and tokens, under the names of vLLM 0.32 or
of today's conventions. Other spans are passed over.
Encodings: https://opentelemetry.io/docs/specs/otlp/, trace/v1/trace.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final

from connectors.traces.base import Malformed, finite, parse_whole, request
from kavier_twin.telemetry import RequestRecord

SPAN_NAME: Final = "llm_request"
_POD: Final = "k8s.pod.name"  # of the resource, where the Collector's k8sattributes processor adds it
# Attribute -> field. Of two names for one field the later counts: those of OpenTelemetry's conventions of today
# (https://opentelemetry.io/docs/specs/semconv/registry/attributes/gen-ai/) come after those of vLLM 0.32.
_FIELDS: Final = {
    "gen_ai.response.id": "id",
    "gen_ai.request.id": "id",
    "gen_ai.request.max_tokens": "max_tokens",
    "gen_ai.usage.prompt_tokens": "prompt_tokens",
    "gen_ai.usage.input_tokens": "prompt_tokens",
    "gen_ai.usage.completion_tokens": "output_tokens",
    "gen_ai.usage.output_tokens": "output_tokens",
    "gen_ai.usage.cached_tokens": "cached_tokens",
    "gen_ai.usage.cache_read.input_tokens": "cached_tokens",
    "gen_ai.latency.time_to_first_token": "ttft_seconds",
    "gen_ai.response.time_to_first_chunk": "ttft_seconds",
    "gen_ai.latency.e2e": "e2e_seconds",
    "gen_ai.latency.time_in_queue": "queue_seconds",
    "gen_ai.request.model": "model",
    "gen_ai.response.model": "model",
    "gen_ai.response.finish_reasons": "finish_reason",
}


@dataclass(frozen=True, slots=True)
class Span:
    """A span `llm_request`: unix nanoseconds, and the attributes that are of use."""

    start_nanoseconds: int
    end_nanoseconds: int
    attributes: Mapping[str, Any]
    pod: str | None
    span_id: str = ""


def record_of(span: Span, pool: str) -> RequestRecord:
    """The request that a span tells of. Raises Malformed."""
    if span.start_nanoseconds <= 0:
        raise Malformed("missing-field", "startTimeUnixNano")
    fields = {field: span.attributes[name] for name, field in _FIELDS.items() if name in span.attributes}
    if span.span_id:
        fields.setdefault("id", span.span_id)
    if "e2e_seconds" not in fields and span.end_nanoseconds > 0:
        fields["e2e_seconds"] = (span.end_nanoseconds - span.start_nanoseconds) / 1e9
    return request(time_seconds=span.start_nanoseconds / 1e9, pool=pool, pod=span.pod, **fields)


# --- JSON ---------------------------------------------------------------------------------------------------------


def json_spans(document: Mapping[str, Any]) -> Iterator[Span | Malformed]:
    """The requests' spans of an OTLP message in JSON, and what is wrong with those that are none."""
    try:
        for resource_spans in _objects(document, "resourceSpans"):
            resource = resource_spans.get("resource")
            pod = _json_attributes(resource if isinstance(resource, dict) else {}, {_POD}).get(_POD)
            for scope_spans in _objects(resource_spans, "scopeSpans"):
                for span in _objects(scope_spans, "spans"):
                    if span.get("name") == SPAN_NAME:
                        yield _json_span(span, pod)
    except Malformed as what:  # of the structure: what follows is lost with it
        yield what


def _json_span(span: Mapping[str, Any], pod: str | None) -> Span | Malformed:
    try:
        start, end = _whole(span.get("startTimeUnixNano", 0)), _whole(span.get("endTimeUnixNano", 0))
        span_id = span.get("spanId")
        return Span(
            start, end, _json_attributes(span, _FIELDS.keys()), pod, span_id if isinstance(span_id, str) else ""
        )
    except Malformed as what:
        return what


def _json_attributes(holder: Mapping[str, Any], wanted: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in _objects(holder, "attributes"):
        key = attribute.get("key")
        value = attribute.get("value")
        if not isinstance(key, str) or key not in wanted or not isinstance(value, dict):
            continue
        if "intValue" in value:
            found[key] = _whole(value["intValue"])
        elif "doubleValue" in value:
            found[key] = finite(value["doubleValue"], key)
        elif "stringValue" in value:
            found[key] = value["stringValue"]
        elif isinstance(value.get("arrayValue"), dict):  # of reasons to finish, one for each answer
            entries = _objects(value["arrayValue"], "values")
            if entries and "stringValue" in entries[0]:
                found[key] = entries[0]["stringValue"]
    return found


def _objects(holder: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = holder.get(name, [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise Malformed("not-otlp", f"{name} is not a list of objects")
    return value


def _whole(value: object) -> int:
    """Protobuf's JSON writes 64-bit numbers as text; some writers do not."""
    if isinstance(value, str):
        return parse_whole(value, "a 64-bit number")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise Malformed("bad-value", "a 64-bit number is neither one nor its text")
    return value


# --- protobuf -----------------------------------------------------------------------------------------------------


def protobuf_spans(message: bytes) -> Iterator[Span | Malformed]:
    """The requests' spans of an OTLP message in protobuf. Without the library that is one Malformed."""
    library = _protobuf()
    if library is None:
        yield Malformed("no-otlp-library", "install it with: pip install 'kavier-twin[otlp]'")
        return
    traces_data, decode_error = library
    try:
        traces = traces_data.FromString(message)
    except decode_error:
        yield Malformed("not-otlp", "neither JSON nor an OTLP message in protobuf")
        return
    for resource_spans in traces.resource_spans:
        pod = _attributes(resource_spans.resource.attributes, {_POD}).get(_POD)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                if span.name == SPAN_NAME:
                    attributes = _attributes(span.attributes, _FIELDS.keys())
                    times = span.start_time_unix_nano, span.end_time_unix_nano
                    yield Span(*times, attributes, pod, span.span_id.hex())


def _attributes(attributes: Any, wanted: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in attributes:
        if attribute.key in wanted:
            kind = attribute.value.WhichOneof("value")
            if kind in ("string_value", "int_value", "double_value"):
                found[attribute.key] = getattr(attribute.value, kind)
            elif kind == "array_value" and attribute.value.array_value.values:
                found[attribute.key] = attribute.value.array_value.values[0].string_value
    return found


@cache
def _protobuf() -> tuple[Any, type[Exception]] | None:
    """The message type and what its parsing raises; None where the extra `otlp` is not installed."""
    try:
        types = import_module("opentelemetry.proto.trace.v1.trace_pb2")
        return types.TracesData, import_module("google.protobuf.message").DecodeError
    except ImportError:
        return None
