"""Step times from measured operators, where the library is installed."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from kavier_twin.catalog.deployment import Deployment
from kavier_twin.catalog.gpu import find_gpu, gpus
from kavier_twin.catalog.models import find_model
from kavier_twin.hardware import operators
from kavier_twin.hardware.operators import SYSTEMS, SiliconUnavailable, prior, silicon_step_time
from kavier_twin.hardware.roofline import step_time

installed = pytest.mark.skipif(
    find_spec(operators.PACKAGE) is None, reason=f"{operators.DISTRIBUTION} is missing: install the extra `silicon`"
)


def test_without_the_library_the_roofline_steps_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "DISTRIBUTION", "no-such-distribution")
    found = prior(find_gpu("H100 SXM"), find_model("Qwen3-32B"), Deployment(tensor_parallel_size=2))
    assert found.source.startswith("roofline of NVIDIA H100")
    assert found.reason == "no-such-distribution is not installed (extra `silicon`)"


@installed
def test_known_engines_are_measured() -> None:
    found = prior(find_gpu("H100 SXM"), find_model("Qwen3-32B"), Deployment(tensor_parallel_size=2))
    assert found.source.startswith("AIConfigurator 0.12")
    assert "measured operators are 9" in found.reason


@installed
def test_our_cards_are_in_the_database() -> None:
    names = {gpu.name: gpu for gpu in gpus().values()}
    for name in SYSTEMS:
        assert silicon_step_time(names[name], find_model("Llama-3.1-8B")).measured_share > 0.8


@installed
@pytest.mark.parametrize(
    ("gpu", "model", "how"),
    [
        ("H100 SXM", "Qwen3-32B", {"tensor_parallel_size": 2}),
        ("H200", "Llama-3.1-70B", {"tensor_parallel_size": 4, "quantization": "fp8", "kv_cache_dtype": "fp8"}),
        ("A100", "Llama-3.1-8B", {}),
        ("H100 SXM", "CodeLlama-34b", {"tensor_parallel_size": 2}),  # not among the library's own models
    ],
)
def test_two_independent_priors_agree(gpu: str, model: str, how: dict[str, object]) -> None:
    """Operators measured one by one and shares of the data sheet's peaks: the same step within a quarter."""
    deployment = Deployment.model_validate(how)
    measured = silicon_step_time(find_gpu(gpu), find_model(model), deployment).step_time
    estimated = step_time(find_gpu(gpu), find_model(model), deployment)
    for sequences, context in ((1, 500), (32, 1000), (128, 1000), (32, 8000)):
        work = np.array([1.0, 0.0, sequences, sequences * context, 0.0])
        steps = [
            float(work @ times.coefficients()[:5]) + times.linear_seconds(sequences) for times in (measured, estimated)
        ]
        assert steps[0] == pytest.approx(steps[1], rel=0.25)
    for tokens in (1024, 8192):
        work = np.array([1.0, tokens, 0.0, 0.0, tokens**2 / 2])
        steps = [
            float(work @ times.coefficients()[:5]) + times.linear_seconds(tokens) for times in (measured, estimated)
        ]
        assert steps[0] == pytest.approx(steps[1], rel=0.25)


@installed
def test_what_is_not_measured_is_refused_with_the_reason() -> None:
    h100 = find_gpu("H100 SXM")
    for gpu, model, deployment, reason in (
        (find_gpu("RTX 4090"), "Llama-3.1-8B", Deployment(), "no measured operators of NVIDIA GeForce RTX 4090"),
        (h100, "Llama-2-7b", Deployment(), "up to 8 key-value heads"),
        (h100, "mpt-30b", Deployment(tensor_parallel_size=8), "no plain gated transformer"),
        (h100, "Llama-3.1-8B", Deployment(quantization="int8"), "no measured operators of int8"),
    ):
        with pytest.raises(SiliconUnavailable, match=reason):
            silicon_step_time(gpu, find_model(model), deployment)


@installed
def test_mixtures_of_experts_at_a_fixed_concurrency(shared_data: Path) -> None:
    """Time per output token of gpt-oss-120b on H100, up to 64 users, whose 8,192 outputs leave prompts aside."""
    errors = []
    with (shared_data / "silicon" / "vllm_aggregated.csv").open() as file:
        for row in csv.DictReader(file):
            users, prompt, outputs = int(row["batch_size"]), int(row["isl"]), int(row["osl"])
            if "gpt-oss" not in row["model_path"] or users > 64 or outputs < 8192:
                continue
            deployment = Deployment(tensor_parallel_size=int(row["tp_size"]))
            found = silicon_step_time(find_gpu(row["system"]), find_model(row["model_path"]), deployment).step_time
            decode = (
                found.fixed
                + users * found.per_decode_sequence
                + users * (prompt + outputs / 2) * found.per_context_token
                + found.linear_seconds(users)
            )
            errors.append(decode * 1e3 / float(row["silicon_tpot_ms"]) - 1)
    assert len(errors) >= 20
    assert np.median(np.abs(errors)) <= 0.15
