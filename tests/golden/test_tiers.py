"""What vLLM's own OffloadingConnector decided, request by request, against both ways to advance.

`tests/data/tiers/README.md` tells how the runs were made.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from kavier_twin.recordings.scenario import load_scenario
from kavier_twin.simulation.runs import simulate

RUNS = Path(__file__).parents[1] / "data" / "tiers"
DECISIONS = {"cached": "cached_tokens", "external": "external_tokens", "preemptions": "preemptions"}
TIMES = {"scheduled": "scheduled_seconds", "first_token": "first_token_seconds", "finish": "finish_seconds"}


@pytest.mark.parametrize("stepping", [False, True], ids=["jump", "reference"])
@pytest.mark.parametrize("name", sorted(folder.name for folder in RUNS.iterdir() if folder.is_dir()))
def test_decisions_are_vllms(name: str, stepping: bool) -> None:
    folder = RUNS / name
    scenario = load_scenario(folder)
    golden = [json.loads(line) for line in gzip.decompress((folder / "golden.jsonl.gz").read_bytes()).splitlines()]
    summary = json.loads((folder / "scenario.json").read_text())["summary"]
    fleet = simulate(scenario.fleet, scenario.observed.workload, stepping=stepping)
    outcomes = fleet.collect()
    outcomes = outcomes[np.argsort(outcomes["index"])]
    for ours, theirs in DECISIONS.items():
        assert outcomes[ours].tolist() == [row[theirs] for row in golden], theirs
    for ours, theirs in TIMES.items():
        np.testing.assert_allclose(outcomes[ours], [row[theirs] for row in golden], rtol=1e-9, atol=0, err_msg=theirs)
    replica = fleet.state.replicas[0]
    for ours, theirs in {
        "steps": "engine_steps",
        "stored_bytes": "stored_bytes",
        "loaded_bytes": "loaded_bytes",
    }.items():
        assert int(replica[ours]) == summary[theirs], theirs
