"""Our own telemetry as JSON lines, one record a line, told apart by `kind`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, ClassVar

from pydantic import Field, TypeAdapter, ValidationError

from connectors.traces.base import Head, Malformed, Reader, covered, decode, describe, request
from kavier_twin.telemetry import (
    CarbonSample,
    EngineSample,
    GpuSample,
    KvEventBatch,
    RequestFinished,
    RequestRecord,
    RequestSeen,
    TelemetryRecord,
)

RECORD: TypeAdapter[TelemetryRecord] = TypeAdapter(Annotated[TelemetryRecord, Field(discriminator="kind")])


def parse_record(line: bytes) -> TelemetryRecord:
    """The record that a JSON object holds. Raises Malformed, also for hashes that contradict the rest."""
    try:
        record = RECORD.validate_json(decode(line), strict=True)
    except ValidationError as error:
        raise describe(error) from None
    if isinstance(record, RequestSeen):  # a RequestRecord is one, too
        covered(record)
    if isinstance(record, RequestSeen | RequestFinished) and len(set(record.block_hashes)) < len(record.block_hashes):
        raise Malformed("hash-chain", "one hash twice: a chained hash stands for all that is before it")
    return record


class TelemetryReader(Reader):
    """Parses every kind of record. A whole trace has the requests: `request` lines, and arrivals with their ends."""

    name = "telemetry"
    expected = 'JSON lines of telemetry records {"kind": "request" and so on, "time_seconds", ...}'
    marks: ClassVar[frozenset[str]] = frozenset({"kind", "time_seconds"})

    @classmethod
    def recognises(cls, head: Head) -> bool:
        return any(cls.marks <= row.keys() for row in head.objects)

    def parse(self, row: bytes) -> TelemetryRecord:
        return parse_record(row)

    def requests(
        self, rows: Iterable[tuple[int, TelemetryRecord]], reject: Callable[[int, Malformed], None]
    ) -> Iterator[RequestRecord]:
        """Arrivals are joined with their ends by id, in any order; what finds no partner is rejected.

        Of several records of one kind and id the fullest counts, as a producer may send a second one that completes
        the first.
        """
        begun: dict[str, tuple[int, RequestSeen]] = {}
        ended: dict[str, tuple[int, RequestFinished]] = {}
        for line, record in rows:
            if isinstance(record, CarbonSample | EngineSample | GpuSample | KvEventBatch):
                continue
            if isinstance(record, RequestFinished):
                end = ended.get(record.id)
                if end is None or record.completes(end[1]):
                    ended[record.id] = (line, record)
                elif not end[1].completes(record):
                    reject(line, Malformed("duplicate-id", "an earlier line has the same kind and id"))
            else:
                start = begun.get(record.id)
                if start is None or record.completes(start[1]):
                    begun[record.id] = (line, record)
                elif not start[1].completes(record):
                    reject(line, Malformed("duplicate-id", "an earlier line has the same kind and id"))
        records: list[RequestRecord] = []
        for id, (line, seen) in begun.items():
            if isinstance(seen, RequestRecord):
                records.append(seen)
            elif id not in ended:
                reject(line, Malformed("unfinished", "no line says how the request ended"))
            else:
                line, finished = ended.pop(id)
                try:
                    records.append(join(seen, finished))
                except Malformed as what:
                    reject(line, what)
        for line, _ in ended.values():
            reject(line, Malformed("unseen", "no line says how the request began"))
        hashed = [record for record in records if record.block_hashes]
        sizes = {record.block_tokens for record in hashed}
        self.hash_block_tokens = sizes.pop() if len(sizes) == 1 else None
        self.hashes_cover_output = bool(hashed) and all(record.hashes_cover_output for record in hashed)
        yield from records


def join(seen: RequestSeen, finished: RequestFinished) -> RequestRecord:
    """The whole story of a request from its two halves. Raises Malformed where they contradict each other."""
    whole = bool(finished.block_hashes) and seen.block_tokens is not None
    e2e = finished.e2e_seconds
    return request(
        **seen.model_dump(exclude={"kind", "block_hashes"}),
        block_hashes=finished.block_hashes if whole else seen.block_hashes,
        hashes_cover_output=whole,
        output_tokens=finished.output_tokens,
        ttft_seconds=finished.ttft_seconds,
        e2e_seconds=finished.time_seconds - seen.time_seconds if e2e is None else e2e,
        queue_seconds=finished.queue_seconds,
        cached_tokens=finished.cached_tokens,
        preemptions=finished.preemptions,
        finish_reason=finished.finish_reason,
    )
