"""What the catalogue says of a server that a data set tells of."""

from __future__ import annotations

import pytest

from kavier_twin.catalog.deployment import Deployment
from kavier_twin.catalog.errors import CatalogError
from kavier_twin.errors import UserError
from kavier_twin.studies.accuracy.server import CATALOGUE, Server, from_catalogue, gpus_named_in

SERVER = Server("meta-llama/Llama-3.1-8B", "H100 SXM", Deployment(), {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("RTX4090-Llama-3.1-8B", ["rtx_4090"]),
        ("run-3-h100-sxm", ["h100_sxm"]),
        ("L40S", ["l40s"]),
        ("chat-400-nocache", []),
        ("Llama-3.1-8B", []),
    ],
)
def test_a_gpu_in_a_folders_name(name: str, expected: list[str]) -> None:
    assert gpus_named_in(name) == expected


def test_what_the_data_tells_goes_before_the_catalogue() -> None:
    derived = from_catalogue(SERVER, "here").engine
    assert derived.num_gpu_blocks > 10_000
    told = from_catalogue(SERVER._replace(engine={"num_gpu_blocks": 77, "kv_cache_dtype": "fp8_e4m3"}), "here").engine
    assert (told.num_gpu_blocks, told.kv_cache_dtype) == (77, "fp8")
    assert told.max_model_len == derived.max_model_len == 131_072


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_no_coefficient_lies_below_the_hardwares_peak(tensor_parallel: int) -> None:
    server = SERVER._replace(deployment=Deployment(tensor_parallel_size=tensor_parallel))
    prior = from_catalogue(server, "here")
    assert (prior.floor.coefficients() <= prior.step_times[CATALOGUE].coefficients()).all()
    # 8 B parameters in 16 bits at 989.5 TFLOPS: 2,048 tokens cannot take less.
    linear = prior.floor.linear_scale * prior.floor.linear_seconds(2048.0)
    assert 0.5 < linear / (2 * 7.5e9 / tensor_parallel * 2048 / 989.5e12) < 2.0


def test_unknown_and_impossible_servers() -> None:
    with pytest.raises(CatalogError, match="names no model"):
        from_catalogue(SERVER._replace(model=None), "here")
    with pytest.raises(CatalogError, match="B9000"):
        from_catalogue(SERVER._replace(gpu="B9000"), "here")
    with pytest.raises(UserError, match=r"here: engine\.max_num_seqs"):
        from_catalogue(SERVER._replace(engine={"max_num_seqs": "many"}), "here")
