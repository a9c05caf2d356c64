"""What is written about the records is what the code takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from connectors.kafka.settings import KafkaSettings
from connectors.settings import KvEvents, Prometheus, VllmMetrics
from connectors.traces.telemetry import parse_record
from kavier_twin.commands.main import main
from kavier_twin.telemetry import RequestFinished, RequestRecord, RequestSeen

DOCS = Path(__file__).resolve().parents[2] / "docs"


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / "telemetry.md").read_text(), re.DOTALL)


def test_the_schema_file_is_what_the_models_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert (DOCS / "telemetry.schema.json").read_text() == printed, (
        "run: kavier-twin schema > docs/telemetry.schema.json"
    )
    assert set(json.loads(printed)["discriminator"]["mapping"]) >= {"request_seen", "request_finished", "request"}


def test_the_examples_are_records() -> None:
    records = [parse_record(text.encode()) for text in fences("json")]
    assert [type(record) for record in records] == [RequestSeen, RequestFinished, RequestRecord]


def test_the_examples_of_sources_are_sources() -> None:
    kafka, kv_events, mimir, nim = (source for text in fences("yaml") for source in yaml.safe_load(text)["sources"])
    assert KafkaSettings.model_validate(kafka).topics == ("llm-requests", "otlp_spans")
    assert set(kafka) | {"name", "pool"} == set(KafkaSettings.model_fields)
    assert KvEvents.model_validate(kv_events).pod == "vllm-0"
    assert Prometheus.model_validate(mimir).headers == {"X-Scope-OrgID": "team-a"}
    assert VllmMetrics.model_validate(nim).metric_prefix == "nim_"
