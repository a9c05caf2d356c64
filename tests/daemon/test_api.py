"""The API of a running daemon: what it changes and what it computes."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from connectors.secret import SecretPlace
from daemon.test_daemon import events, recorded, running, until
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.http_settings import HttpConfig
from memory_source import MemorySource


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """One that has followed 60 requests of a recording, of which some still run."""
    monkeypatch.setenv("TWIN_TOKEN", "token")
    source = MemorySource()
    with running(source, http=HttpConfig(port=0, token=SecretPlace(env="TWIN_TOKEN"))) as found:
        for event in events([record.model_copy(update={"pod": "vllm-7"}) for record in recorded(60)])[:-2]:
            source.push(event)
        until(lambda: found.view.outlook and found.view.outlook.calibrated, "a forecast from calibrated figures")
        yield found


def ask(daemon: Daemon, path: str, method: str = "GET", body: Any = None) -> tuple[int, Any]:
    assert daemon.http is not None
    headers = {"Authorization": "Bearer token", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{daemon.http.url}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_policies_set_are_forecast_from_the_next_cycle_on(daemon: Daemon) -> None:
    wanted = {"policies": [{"name": "now"}, {"name": "tiny", "overrides": {"num_gpu_blocks": "0.25x"}}]}
    status, told = ask(daemon, "/v1/policies", "PUT", wanted)
    assert status == 200
    assert [policy["name"] for policy in told["pools"][0]["policies"]] == ["now", "tiny"]

    def forecast() -> Any:
        outlook = ask(daemon, "/v1/forecast")[1]["pools"][0]["outlook"]
        return outlook if {policy["name"] for policy in outlook["policies"]} == {"now", "tiny"} else None

    tiny = next(policy for policy in until(forecast, "the new policies")["policies"] if policy["name"] == "tiny")
    assert tiny["flags"] == ["--num-gpu-blocks-override 75"]
    assert tiny["deployable"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [({"num_gpu_block": 100}, "unknown"), ({"num_gpu_blocks": 2**30}, "are simulated"), ({"replicas": 0}, "replicas")],
)
def test_what_cannot_be_simulated_is_refused_and_changes_nothing(
    daemon: Daemon, overrides: dict[str, Any], says: str
) -> None:
    before = ask(daemon, "/v1/policies")[1]
    wanted = {"policies": [{"name": "now"}, {"name": "odd", "overrides": overrides}]}
    status, problem = ask(daemon, "/v1/policies", "PUT", wanted)
    assert (status, problem["errors"][0]["field"]) == (422, "policies.1.overrides")
    assert says in problem["detail"]
    assert ask(daemon, "/v1/policies")[1] == before
    status, problem = ask(daemon, "/v1/whatif", "POST", {"overrides": overrides})
    assert (status, problem["errors"][0]["field"]) == (422, "overrides")
    assert says in problem["detail"]


def test_what_if_is_answered_from_the_live_state(daemon: Daemon) -> None:
    body = {"overrides": {"num_gpu_blocks": "0.25x"}, "load": 2.0, "horizon_seconds": 10.0}
    status, answer = ask(daemon, "/v1/whatif", "POST", body)
    assert status == 200
    assert [case["name"] for case in answer["cases"]] == ["today", "today_at_load", "asked"]
    rates = [case["kpis"]["requests_per_second"]["p50"] for case in answer["cases"]]
    assert rates[1] > rates[0]
    assert answer["vllm_flags"] == ["--num-gpu-blocks-override 75"]


def test_a_replica_shows_its_cache_and_its_batch(daemon: Daemon) -> None:
    [replica] = ask(daemon, "/v1/state")[1]["pools"][0]["replicas"]
    status, detail = ask(daemon, f"/v1/state/chat/replicas/{replica['replica']}")
    assert status == 200
    assert detail["blocks"] == 299
    assert detail["blocks_in_use"] + detail["blocks_cached"] + detail["blocks_empty"] == 299
    summary = detail["summary"]
    assert summary["pod"] == "vllm-7"
    assert len(detail["requests"]) == summary["requests_running"] + summary["requests_waiting"] > 0
    assert summary["kv_cache_usage_ratio"] == pytest.approx(detail["blocks_in_use"] / 299)
    held = sum(request["blocks"] for request in detail["requests"])
    assert held >= detail["blocks_in_use"]  # what two requests share is in use once
    assert all(0 <= r["cached_tokens"] < r["prompt_tokens"] and r["output_tokens"] >= 0 for r in detail["requests"])
    assert ask(daemon, "/v1/state/chat/replicas/1")[0] == 404
