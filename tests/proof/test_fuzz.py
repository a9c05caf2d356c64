"""Anything that can stand in a Kafka record: nothing of it ends the twin, and nothing of it disappears."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from typing import Any

import pytest

import effort
from connectors.kafka import source
from connectors.kafka.messages import parse_value
from connectors.traces.base import Malformed
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import EngineSample, RequestFinished, RequestRecord, RequestSeen

RECORDS = effort.times(20_000)
BATCH_RECORDS = 500
FLEET = FleetSettings(
    engine=EngineSettings(num_gpu_blocks=500, max_model_len=4_096, max_num_seqs=16, max_num_batched_tokens=2_048),
    step_time=StepTime(fixed=0.005, per_prefill_token=1e-5),
    replicas=2,
)
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1.5, -0.0, 1e-300, 1e300, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**40, math.nan,
    math.inf, -math.inf, "", "a", "\x00", "\ud800", "💥" * 200, "x" * 600, "1", "NaN", [], [1], [[]], {}, {"a": 1},
)  # fmt: skip
OFFERED = ("accepted", "completed", "duplicate", "late", "future_time")  # what can become of a record
REASONS = (*OFFERED, "unknown_request", "never_finished", "not_simulated", "ended_after_all")


class Writer:
    """Writes requests of a made-up load, most of them broken in one or several places."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.time_seconds = 1e6
        self._ids: list[str] = ["r"]

    def value(self) -> bytes:
        rng = self._rng
        self.time_seconds += rng.expovariate(20.0)
        record = rng.choice([self._seen, self._seen, self._finished, self._finished, self._whole, self._sample])()
        if rng.random() < 0.5:
            for _ in range(rng.choice([1, 1, 1, 2, 5])):
                self._break(record)
        text = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.05:
            text = self._garble(text)
        return text

    def _seen(self) -> dict[str, Any]:
        rng = self._rng
        if rng.random() < 0.9:
            self._ids.append(f"r{len(self._ids)}")
        blocks = rng.randrange(0, 20)
        return {
            "version": 1,
            "kind": "request_seen",
            "id": self._some_id(),
            "time_seconds": self.time_seconds + rng.uniform(-3.0, 1.0),
            "session": rng.choice([None, "s", f"s{rng.randrange(50)}"]),
            "prompt_tokens": rng.choice([1, 16, max(1, 16 * blocks), rng.randrange(1, 5_000), 10**8]),
            "max_tokens": rng.choice([None, 0, 1, 100, 10**8]),
            # Chains that contradict each other: the same hashes behind others, repeated, in another size.
            "block_hashes": [rng.choice([rng.randrange(6), rng.getrandbits(64)]) for _ in range(blocks)],
            "block_tokens": rng.choice([16, 16, 16, 32, 1, 1_000, 1_048_576]),
            "priority": rng.choice([0, 0, 0, -5, 7, 2**31, -(2**62), 2**70]),
            "pod": rng.choice([None, "a", "b", "ü"]),
        }

    def _finished(self) -> dict[str, Any]:
        rng = self._rng
        return {
            "kind": "request_finished",
            "id": self._some_id(),
            "time_seconds": self.time_seconds + rng.uniform(-3.0, 3.0),
            "output_tokens": rng.choice([0, 1, 30, rng.randrange(1, 1_000), 10**8]),
            "ttft_seconds": rng.choice([None, 0.0, 0.2, 1e9]),
            "e2e_seconds": rng.choice([None, 0.0, 1.0, 1e-9, 1e9]),
            "cached_tokens": rng.choice([None, 0, 16, 10**8]),
            "block_hashes": [rng.getrandbits(64) for _ in range(rng.choice([0, 0, 5]))],
        }

    def _whole(self) -> dict[str, Any]:
        cover = {"hashes_cover_output": self._rng.random() < 0.5}
        return {**self._finished(), **self._seen(), "kind": "request", **cover}

    def _sample(self) -> dict[str, Any]:
        return {"kind": "engine_sample", "time_seconds": self.time_seconds, "requests_running": 3, "pod": "a"}

    def _some_id(self) -> str:
        return self._ids[-self._rng.randrange(1, 100) % len(self._ids)]

    def _break(self, record: dict[str, Any]) -> None:
        rng = self._rng
        field = rng.choice(list(record))
        what = rng.random()
        if what < 0.15:
            del record[field]
            record.setdefault("version", 1)
        elif what < 0.3:
            record[field] = [rng.choice(ODD) for _ in range(rng.randrange(4))]
        else:
            record[field] = rng.choice(ODD)

    def _garble(self, text: bytes) -> bytes:
        rng = self._rng
        at = rng.randrange(len(text))
        return rng.choice([text[:at], text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :], b"", text * 2, b"[1]"])


@pytest.mark.slow
def test_records_of_any_kind() -> None:
    writer, twin = (
        Writer(effort.dice()),
        PoolTwin(FLEET, MirrorSettings(recalibrate_every_requests=2_000, late_seconds=1.0)),
    )
    rejected: Counter[str] = Counter()
    offered = 0
    batch = []
    for number in range(RECORDS):
        (found,) = parse_value(writer.value(), "default")
        if not isinstance(found, Malformed):
            found = source._not_ahead(found, round(writer.time_seconds * 1000))
        if isinstance(found, Malformed):
            assert found.reason
            rejected[found.reason] += 1
        else:
            ends = isinstance(found, RequestRecord) and found.finished() is not None
            offered += 2 if ends else 1
            batch.append(found)
        if number % BATCH_RECORDS == BATCH_RECORDS - 1:
            twin.ingest(batch, more=False, ended=number == RECORDS - 1)
            batch = []
    mirror = twin.mirror
    taken = sum(mirror.ingested[reason] for reason in OFFERED)
    assert taken == offered  # each half of a request once
    assert set(mirror.ingested) <= set(REASONS), mirror.ingested
    often = RECORDS / 200
    assert min(rejected["bad-value"], rejected["missing-field"], rejected["not-json"], rejected["unknown-kind"]) > often
    assert rejected["future-time"] > 0
    assert min(mirror.ingested["accepted"], mirror.ingested["duplicate"]) > often
    assert mirror.ingested["late"] > 0
    # What is left is a fleet in order, which goes on with records that are right.
    start = mirror.newest_seconds + 10.0
    before = mirror.finished
    good = [
        record
        for number in range(20)
        for record in (
            RequestSeen(id=f"good{number}", time_seconds=start + number, prompt_tokens=100),
            RequestFinished(id=f"good{number}", time_seconds=start + number + 0.5, output_tokens=5, e2e_seconds=0.5),
        )
    ]
    twin.ingest([*good, EngineSample(time_seconds=start)], more=False, ended=True)
    assert mirror.finished == before + 20
    running, waiting, usage = mirror.load()
    assert min(running, waiting) >= 0
    assert 0.0 <= usage <= 1.0
    assert twin.view(()).finished_requests == mirror.finished
