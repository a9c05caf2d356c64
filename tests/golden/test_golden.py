"""What vLLM's own scheduler decided, request by request, against both ways to advance.

`tests/data/golden` holds runs of our own: chat and random settings, and seventeen aimed at rare paths (budget refunds
under priority, heavy preemption, coarse and fine hashes, arrivals on step boundaries, ...). All were made by driving
vLLM 0.32's unmodified scheduler under a virtual clock.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from kavier_twin.recordings.scenario import load_scenario
from kavier_twin.simulation.runs import simulate

OURS = Path(__file__).parents[1] / "data" / "golden"
OTHERS = ("mooncake-conv", "azure-conv")
TIMES = {
    "scheduled": "scheduled_seconds",
    "first_token": "first_token_seconds",
    "finish": "finish_seconds",
}


def check(folder: Path, *, stepping: bool) -> None:
    scenario = load_scenario(folder)
    compressed = folder / "golden.jsonl.gz"
    plain = folder / "golden.jsonl"
    text = gzip.decompress(compressed.read_bytes()).decode() if compressed.exists() else plain.read_text()
    golden = [json.loads(line) for line in text.splitlines()]
    outcomes = simulate(scenario.fleet, scenario.observed.workload, stepping=stepping).collect()
    outcomes = outcomes[np.argsort(outcomes["index"])]
    assert outcomes["index"].tolist() == [row["index"] for row in golden]
    assert outcomes["cached"].tolist() == [row["cached_tokens"] for row in golden]
    assert outcomes["preemptions"].tolist() == [row["preemptions"] for row in golden]
    for ours, theirs in TIMES.items():
        np.testing.assert_allclose(outcomes[ours], [row[theirs] for row in golden], rtol=1e-9, atol=0)


@pytest.mark.parametrize("stepping", [False, True], ids=["jump", "reference"])
@pytest.mark.parametrize("name", sorted(folder.name for folder in OURS.iterdir()))
def test_our_runs(name: str, stepping: bool) -> None:
    check(OURS / name, stepping=stepping)


@pytest.mark.parametrize("stepping", [False, True], ids=["jump", "reference"])
@pytest.mark.parametrize("name", OTHERS)
def test_runs_on_public_traces(shared_data: Path, name: str, stepping: bool) -> None:
    check(shared_data / "vllm_golden" / name, stepping=stepping)
