"""Futures drawn from the first part of real streams, against how those went on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from connectors.traces import read_trace
from forecast.streams import between, fleet_settings, hit_ratio, snapshot_at
from kavier_twin.forecast.futures import draw_futures
from kavier_twin.simulation.settings import EngineSettings
from kavier_twin.simulation.workload import Workload, workload_of
from real_parts import require

pytestmark = pytest.mark.real


def trace(shared_data: Path, name: str) -> Workload:
    path = shared_data / name
    require(name, path.exists(), f"expected at {path}; see tests/conftest.py for where real data lies")
    return workload_of(read_trace(path).records)


@pytest.mark.parametrize("name", ["chat-400", "shift-300"])  # at a rate that goes on; that of ramp-300 does not
def test_recordings_of_a_real_server(shared_data: Path, name: str) -> None:
    path = shared_data / "vllm_recordings" / name
    stream = trace(shared_data, f"vllm_recordings/{name}")
    told = read_trace(path).settings["engine"]
    engine = {key: told[key] for key in EngineSettings.model_fields if key in told}
    snapshot = snapshot_at(stream, fleet_settings(**engine), 120.0, 100.0)
    went_on = between(stream, 120.0, 200.0)
    real = hit_ratio(snapshot.fleet, went_on)
    futures = draw_futures(snapshot, 80.0, range(4))
    assert np.mean([hit_ratio(snapshot.fleet, future) for future in futures]) == pytest.approx(real, abs=0.03)
    assert np.mean([future.output.mean() for future in futures]) == pytest.approx(went_on.output.mean(), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("num_gpu_blocks", [50_000, 200_000])
def test_production_chat_without_session_labels(shared_data: Path, num_gpu_blocks: int) -> None:
    """Caches that hold about twenty seconds and about eighty seconds of the stream."""
    stream = trace(shared_data, "mooncake/conversation_trace.jsonl")
    snapshot = snapshot_at(stream, fleet_settings(num_gpu_blocks=num_gpu_blocks, replicas=1), 2_400.0, 600.0)
    real = hit_ratio(snapshot.fleet, between(stream, 2_400.0, 3_300.0))
    futures = draw_futures(snapshot, 900.0, range(4))
    assert np.mean([hit_ratio(snapshot.fleet, future) for future in futures]) == pytest.approx(real, abs=0.03)
