"""The API against its own description."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from schemathesis.generation import GenerationMode

import effort
from kavier_twin.serve.access import Access
from kavier_twin.serve.app import Twin, make_app
from kavier_twin.serve.limits import Limits
from kavier_twin.serve.models import History, Series
from kavier_twin.simulation.kpi_table import KPIS, METRICS
from serve.twins import TOKEN, FakePool, Served
from serve.views import empty_view, full_view

APP = make_app(
    Twin(lambda: {"chat": full_view(), "code": empty_view("code")}, {"chat": FakePool(), "code": FakePool()}),
    Access(token=lambda: TOKEN),
    Limits(),
)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
SCHEMA.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])


@SCHEMA.parametrize()
@settings(max_examples=effort.times(25), suppress_health_check=list(HealthCheck))
def test_answers_are_as_described(case: schemathesis.Case) -> None:
    """Whatever is asked, right or wrong: the status, the media type and the content are among those described."""
    # Which settings there are, and that one policy is today's, is more than a schema of fields can say.
    excluded = [] if case.method == "GET" else [schemathesis.checks.positive_data_acceptance]
    case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=excluded)


def test_the_description_has_examples_for_what_is_sent_and_answered() -> None:
    served = Served()
    try:
        described = json.loads(served.ask("GET", "/openapi.json")[2])
    finally:
        served.server.close()
    assert described["paths"]["/v1/policies"]["put"]["security"] == [{"token": []}]
    assert "security" not in described["paths"]["/v1/policies"]["get"]
    for name, schema in described["components"]["schemas"].items():
        for field, told in schema.get("properties", {}).items():
            composed = "$ref" in json.dumps(told)  # what it is made of has examples of its own
            assert composed or "examples" in told or "examples" in schema or "default" in told, f"{name}.{field}"


def test_every_example_is_valid_by_its_own_schema() -> None:
    served = Served()
    try:
        described = json.loads(served.ask("GET", "/openapi.json")[2])
    finally:
        served.server.close()
    registry = Registry().with_resource("urn:api", DRAFT202012.create_resource(described))
    checked = 0
    for schema in _with_examples(described):
        validator = Draft202012Validator(json.loads(json.dumps(schema).replace('"#/', '"urn:api#/')), registry=registry)
        for example in schema["examples"]:
            validator.validate(example)
            checked += 1
    assert checked > 100


def _with_examples(found: Any) -> Iterator[dict[str, Any]]:
    """Every part of a description that has examples."""
    if isinstance(found, dict):
        if isinstance(found.get("examples"), list):
            yield found
        found = list(found.values())
    if isinstance(found, list):
        for part in found:
            yield from _with_examples(part)


def test_the_table_of_kpis_is_served() -> None:
    served = Served()
    try:
        found = json.loads(served.ask("GET", "/v1/kpis")[2])
    finally:
        served.server.close()
    assert [kpi["name"] for kpi in found["kpis"]] == list(KPIS)
    assert found["kpis"][0]["unit"]["scales"][0] == {"from_value": 0.0, "factor": 1000.0, "sign": " ms"}
    assert list(found["metrics"]) == list(METRICS)
    assert found["metrics"]["ttft_p99_seconds"] == {"kpi": "ttft_seconds", "statistic": "p99"}


def test_state_tells_what_is_not_known_as_null() -> None:
    served = Served()
    try:
        found = json.loads(served.ask("GET", "/v1/state")[2])["pools"][0]
    finally:
        served.server.close()
    assert found["gauges"][0] == {"kpi": "requests_running", "mirrored": 3.0, "observed": 4.0}
    assert found["gauges"][1] == {"kpi": "requests_waiting", "mirrored": 1.0, "observed": None}
    assert [(replica["state"], replica["prefix_cache_hit_ratio"]) for replica in found["replicas"]] == [
        ("ready", 0.8),
        ("draining", None),
    ]


def test_forecast_tells_quantiles_and_objectives() -> None:
    served = Served()
    try:
        found = json.loads(served.ask("GET", "/v1/forecast?pool=chat")[2])["pools"][0]
    finally:
        served.server.close()
    predicted = found["outlook"]["policies"][0]["horizons"][0]["predicted"][0]
    assert predicted["quantiles"] == {"0.1": 0.5, "0.5": 0.75, "0.9": 1.0}
    assert found["slos"][0] == {
        "name": "fast",
        "kpi": "ttft_seconds",
        "statistic": "p99",
        "threshold": 1.0,
        "higher_is_better": False,
    }


def test_history_is_told_by_pool() -> None:
    served = Served()
    try:
        history = History((60.0, 85.0), (Series("ttft_seconds", "p99", (0.2, math.nan), (0.3, 0.4)),))
        served.views["code"] = replace(full_view("code"), history=history)
        found = json.loads(served.ask("GET", "/v1/history")[2])["pools"]
    finally:
        served.server.close()
    assert found[0] == {"pool": "chat", "event_seconds": [], "series": []}
    assert found[1]["event_seconds"] == [60.0, 85.0]
    [series] = found[1]["series"]
    assert series == {"kpi": "ttft_seconds", "statistic": "p99", "mirrored": [0.2, None], "observed": [0.3, 0.4]}
