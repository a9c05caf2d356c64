"""`kavier-twin capacity` and `kavier-twin misses` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kavier_twin.commands.main import main

DATA = Path(__file__).parents[1] / "data"
CHAT = DATA / "recordings" / "chat-400"


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1  # nothing else there
    return json.loads(out)  # type: ignore[no-any-return]


def test_the_curve_is_within_half_a_point_of_simulating_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    points = as_json(capsys, "capacity", str(CHAT))["points"]
    curve = {point["factor"]: point["hit_ratio"] for point in points}
    sizes = as_json(capsys, "compare", str(CHAT), "--capacities", "0.5,1,2,4,8", "--plot", "/dev/null")
    today = sizes["policies"][0]
    for size in today["capacities"]:
        assert curve[size["factor"]] == pytest.approx(size["hit_ratio"], abs=0.005)
    assert [point["hit_ratio"] for point in points] == sorted(point["hit_ratio"] for point in points)


def test_misses_sum_to_what_simulate_computes(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "misses", str(CHAT))
    simulated = as_json(capsys, "simulate", str(CHAT))
    assert found["requests"] == simulated["requests"]
    assert found["hit_tokens"] == simulated["prefix_cache_hit_tokens"]
    for part in (found, *found["applications"]):
        assert sum(part["missed_tokens"].values()) == part["prompt_tokens"] - part["hit_tokens"]
    assert sum(part["requests"] for part in found["applications"]) == found["requests"]
    assert sum(found["evicted_tokens_by_age"].values()) == found["missed_tokens"]["evicted"] > 0


def test_tables_name_reasons_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["misses", str(CHAT)]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("first_seen", "evicted", "partial_block", "Applications by prompt tokens"))
    assert "caching_off" not in out
    assert main(["capacity", str(CHAT)]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("0.5 x", "today", "8 x", "points"))


def test_a_run_without_prefix_caching_misses_for_that_reason(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "misses", str(DATA / "recordings" / "chat-400-nocache"))
    assert found["missed_tokens"]["caching_off"] == found["prompt_tokens"] > 0


@pytest.mark.parametrize("command", ["capacity", "misses"])
def test_a_trace_without_hashes_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"kind": "request", "id": "a", "time_seconds": 0, "prompt_tokens": 9, "output_tokens": 2}\n')
    assert main([command, str(trace)]) == 1
    assert "no request has block hashes" in capsys.readouterr().err
