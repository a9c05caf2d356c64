"""What the schedulers of each supported version decided, request by request, against both ways to advance.

`KAVIER_SHARED_DATA` holds the runs.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.runs import EXACT, PLAIN, TIERS_033
from kavier_twin.errors import UserError
from kavier_twin.recordings.scenario import load_scenario
from kavier_twin.simulation.policies import apply_overrides, parse_override
from kavier_twin.simulation.runs import simulate
from kavier_twin.simulation.versions import PROFILES

DATA = Path(__file__).parents[1] / "data"
DECISIONS = {"cached": "cached_tokens", "external": "external_tokens", "preemptions": "preemptions"}
TIMES = {"scheduled": "scheduled_seconds", "first_token": "first_token_seconds", "finish": "finish_seconds"}
BOTH_WAYS = pytest.mark.parametrize("stepping", [False, True], ids=["jump", "reference"])

FEATURES = sorted({run for item in EXACT for run in item.runs} - set(PLAIN))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def check(scenario: Path, golden: Path, vllm: str, *, stepping: bool) -> None:
    run, rows = load_scenario(scenario), read(golden)
    fleet = apply_overrides(run.fleet, {"vllm": vllm})
    outcomes = simulate(fleet, run.observed.workload, stepping=stepping).collect()
    outcomes = outcomes[np.argsort(outcomes["index"])]
    assert outcomes["index"].tolist() == [row["index"] for row in rows]
    for ours, theirs in DECISIONS.items():
        assert outcomes[ours].tolist() == [row.get(theirs, 0) for row in rows], theirs
    for ours, theirs in TIMES.items():
        np.testing.assert_allclose(outcomes[ours], [row[theirs] for row in rows], rtol=1e-9, atol=0, err_msg=theirs)


def golden_of(folder: Path, vllm: str) -> Path:
    """The run's decisions under this version; skipped where nobody made them."""
    path = folder / ("golden.jsonl.gz" if vllm == "0.33" else f"golden_{vllm.replace('.', '')}.jsonl.gz")
    if not path.exists():
        pytest.skip(f"{path} does not exist: this run was not made with vLLM {vllm}")
    return path


@BOTH_WAYS
@pytest.mark.parametrize("vllm", PROFILES)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_runs(shared_data: Path, name: str, vllm: str, stepping: bool) -> None:
    folder = shared_data / name
    check(folder, golden_of(folder, vllm), vllm, stepping=stepping)


@BOTH_WAYS
@pytest.mark.parametrize("name", TIERS_033)
def test_tiers_of_033(shared_data: Path, name: str, stepping: bool) -> None:
    golden = shared_data / "vllm_golden_features" / "tiers_033" / name / "golden.jsonl.gz"
    check(DATA / "tiers" / name, golden, "0.33", stepping=stepping)


@BOTH_WAYS
@pytest.mark.parametrize("vllm", PROFILES)
@pytest.mark.parametrize("name", FEATURES)
def test_features(shared_data: Path, name: str, vllm: str, stepping: bool) -> None:
    folder = shared_data / name
    check(folder, golden_of(folder, vllm), vllm, stepping=stepping)


def test_every_given_run_is_tried(shared_data: Path) -> None:
    """A run that is added to the data is added here."""
    given = (shared_data / "vllm_golden_033").iterdir()
    assert sorted(PLAIN) == sorted(f"vllm_golden_033/{folder.name}" for folder in given)
    tiers = shared_data / "vllm_golden_features" / "tiers_033"
    assert sorted(folder.name for folder in tiers.iterdir()) == sorted(TIERS_033)


def scenario_of(folder: Path, **changes: Any) -> Path:
    """A golden run whose scenario.json has these keys; `engine` is added to the engine's."""
    source = DATA / "golden" / "ties"
    (folder / "trace.jsonl.gz").write_bytes((source / "trace.jsonl.gz").read_bytes())
    scenario = json.loads((source / "scenario.json").read_text())
    scenario["engine"] |= changes.pop("engine", {})
    (folder / "scenario.json").write_text(json.dumps(scenario | changes))
    return folder


@pytest.mark.parametrize(
    ("version", "profile"),
    [(None, "0.32"), ("0.32.0", "0.32"), ("0.33.1rc2", "0.33"), ("0.33", "0.33"), ("v0.47.0", "0.33"), ("0.9", "0.32")],
)
def test_a_run_is_simulated_as_its_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str | None, profile: str
) -> None:
    run = load_scenario(scenario_of(tmp_path, **({} if version is None else {"vllm": version})))
    assert run.fleet.engine.vllm == profile
    assert bool(caplog.records) == (version in ("v0.47.0", "0.9"))
    assert apply_overrides(run.fleet, dict([parse_override("vllm=0.32")])).engine.vllm == "0.32"


def test_what_is_no_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scenario\.json: vllm is 'latest'"):
        load_scenario(scenario_of(tmp_path, vllm="latest"))


def test_an_engine_setting_that_is_not_modelled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="spec"):
        load_scenario(scenario_of(tmp_path, engine={"spec": {"method": "eagle", "k": 3}}))
