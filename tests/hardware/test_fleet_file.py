"""A fleet described by its hardware, in the fleet file and in the daemon's settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kavier_twin.daemon.config import read_settings
from kavier_twin.errors import UserError
from kavier_twin.hardware.fleet_file import FleetFile, Hardware
from kavier_twin.recordings.scenario import read_fleet
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.impact import impact_of_run
from kavier_twin.simulation.workload import make_workload

H100 = {"gpu": "NVIDIA H100 80GB HBM3", "model": "meta-llama/Llama-3.1-8B-Instruct"}


def fleet_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return path


def test_the_rest_follows_from_gpu_and_model(tmp_path: Path) -> None:
    text = "hardware: {gpu: H100 SXM 80GB, model: Llama-3.1-8B}\nreplicas: 3\nengine: {max_num_seqs: 64}\n"
    fleet = read_fleet(fleet_file(tmp_path, text))
    assert fleet.replicas == 3
    assert fleet.engine.max_num_seqs == 64
    assert fleet.engine.max_num_batched_tokens == 8192  # vLLM's default on 80 GiB
    # 0.92 x 79.2 GiB less 15 GiB of weights, at 2 MiB a block: between 56 and 58 GiB are left.
    assert 26_000 < fleet.engine.num_gpu_blocks < 29_500
    weights_seconds = 15.0e9 / 3.35e12
    assert weights_seconds < fleet.step_time.linear_layers[0][1] < 1.5 * weights_seconds


def test_what_is_given_goes_first(tmp_path: Path) -> None:
    text = "hardware: {gpu: L4, model: Llama-3.1-8B}\nengine: {num_gpu_blocks: 77}\nstep_time: {fixed: 0.5}\n"
    fleet = read_fleet(fleet_file(tmp_path, text))
    assert fleet.engine.num_gpu_blocks == 77
    assert fleet.step_time.fixed == 0.5
    assert fleet.step_time.linear_layers == ()


def test_an_fp8_cache_and_more_gpus_hold_more() -> None:
    blocks = {}
    for name, engine, extra in (
        ("auto", {}, {}),
        ("fp8", {"kv_cache_dtype": "fp8"}, {}),
        ("two", {}, {"tensor_parallel_size": 2}),
    ):
        blocks[name] = FleetFile.model_validate({"hardware": {**H100, **extra}, "engine": engine}).engine.num_gpu_blocks
    assert blocks["fp8"] == pytest.approx(2 * blocks["auto"], rel=0.01)
    assert blocks["two"] > 2 * blocks["auto"]  # each GPU has half of the weights and of every block


def test_watts_and_gpus_come_from_the_card(tmp_path: Path) -> None:
    hardware = "hardware: {gpu: H100 SXM 80GB, model: Llama-3.1-70B, tensor_parallel_size: 4}\n"
    found = read_fleet(fleet_file(tmp_path, hardware)).footprint
    assert found is not None
    assert (found.power.max_watts, found.gpus_per_replica, found.price_per_gpu_hour) == (700.0, 4, None)
    assert 40.0 < found.power.idle_watts < 130.0
    given = hardware + "footprint: {power: {max_watts: 500}, gpus_per_replica: 2, price_per_gpu_hour: 3}\n"
    told = read_fleet(fleet_file(tmp_path, given)).footprint
    assert told is not None
    assert told.power == found.power.model_copy(update={"max_watts": 500.0})
    assert (told.gpus_per_replica, told.price_per_gpu_hour) == (2, 3.0)
    assert read_fleet(fleet_file(tmp_path, hardware + "footprint: null\n")).footprint is None


def test_no_gpu_no_watts(tmp_path: Path) -> None:
    bare = "engine: {num_gpu_blocks: 77}\nstep_time: {fixed: 0.5}\n"
    assert read_fleet(fleet_file(tmp_path, bare)).footprint is None
    with pytest.raises(UserError, match=r"footprint\.power: missing"):
        read_fleet(fleet_file(tmp_path, bare + "footprint: {pue: 1.2}\n"))


@pytest.mark.parametrize(
    ("hardware", "told"),
    [
        ("{gpu: H1000, model: Llama-3.1-8B}", "hardware.gpu: .*'H1000'.*known: "),
        ("{gpu: L4, model: nonsense}", "hardware.model: .*'nonsense'.*config.json"),
        ("{gpu: L4, model: Llama-3.1-8B, tensor_parallel_size: 3}", "hardware: .*32 heads, not a multiple of 3"),
        ("{gpu: RTX 4090, model: Llama-3.1-70B}", "does not fit on 1 x NVIDIA GeForce RTX 4090.*tensor_parallel_size"),
        ("{gpu: L4}", "hardware.model: missing; add it"),
    ],
)
def test_mistakes_are_told_at_their_place_and_nothing_else(tmp_path: Path, hardware: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        read_fleet(fleet_file(tmp_path, f"hardware: {hardware}\nfootprint: {{pue: 1.2}}\n"))
    assert "1 problem" in str(error.value)


def test_the_floor_is_below_the_prior_everywhere() -> None:
    hardware = Hardware.model_validate(H100)
    floor, prior = hardware.floor(), hardware.step_time()
    assert (floor.coefficients() <= prior.coefficients()).all()
    assert 0.5 < floor.linear_scale <= 1.0
    for tokens in (1, 100, 5000):
        assert floor.linear_scale * prior.linear_seconds(tokens) <= prior.linear_seconds(tokens)
    # Nothing reads faster than the memory: 16 bits of eight billion weights at 3.35 TB/s.
    assert floor.linear_scale * floor.linear_seconds(1) >= 0.85 * 2 * 6.98e9 / 3.35e12
    assert np.isfinite(floor.coefficients()).all()


def test_the_daemon_starts_from_the_data_sheet_and_knows_it_is_not_calibrated(tmp_path: Path) -> None:
    path = tmp_path / "twin.yaml"
    (tmp_path / "requests.jsonl").touch()
    path.write_text(
        "fleet:\n  hardware: {gpu: A100 SXM 80GB, model: Qwen3-8B}\n"
        "sources:\n  - {type: trace_file, path: requests.jsonl}\n"
    )
    fleet = read_settings(path).fleet
    assert not fleet.calibrated
    assert fleet.prior == fleet.step_time
    assert fleet.floor is not None
    path.write_text(path.read_text().replace("A100", "A1000"))
    with pytest.raises(UserError, match=r"fleet\.hardware\.gpu: .*A1000") as error:
        read_settings(path)
    assert "1 problem" in str(error.value)


def test_the_draw_lies_where_it_was_published() -> None:
    """H100 SXM: 300 W at batch 1 and up to 600 W at batch 128 (ML.ENERGY v3); prompts 600 to 680 W of 700."""
    settings = FleetFile.model_validate({"hardware": H100, "footprint": {"pue": 1.0}}).settings()

    def watts(requests: int, prompt: int, output: int, seconds: float) -> float:
        fleet = Fleet(settings)
        fleet.feed(make_workload([0.0] * requests, prompt, output))
        fleet.run(seconds)
        found = impact_of_run(fleet, 0.0)
        assert found is not None
        return found.power_watts

    assert watts(1, 100, 3_000, 10.0) == pytest.approx(300.0, rel=0.05)
    assert 350.0 < watts(128, 100, 3_000, 10.0) < 600.0
    assert 600.0 < watts(64, 8_000, 1, 2.0) < 680.0
