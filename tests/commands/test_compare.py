"""`kavier-twin compare` as a user meets it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from kavier_twin.commands.main import main

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "fuzz-04"

POLICIES = """
- {name: today}
- {name: uncached, overrides: {prefix_caching: false}}
- {name: double, overrides: {num_gpu_blocks: 2x}}
- {name: two, overrides: {replicas: 2, router: session_affinity}}
"""


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    path = tmp_path / "policies.yaml"
    path.write_text(POLICIES)
    return path


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["compare", *arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1  # nothing else there
    return json.loads(out)


def test_each_policy_is_what_simulate_makes_of_it(policies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared = as_json(capsys, str(GOLDEN), "--policies", str(policies), "--no-plot")["policies"]
    assert [one["policy"] for one in compared] == ["today", "uncached", "double", "two"]
    overrides = ([], ["prefix_caching=false"], ["num_gpu_blocks=2x"], ["replicas=2", "router=session_affinity"])
    for one, settings in zip(compared, overrides, strict=True):
        assert main(["simulate", str(GOLDEN), "--json", *(f"--policy={text}" for text in settings)]) == 0
        alone = json.loads(capsys.readouterr().out)
        for kpi in ("prefix_cache_hit_tokens", "engine_steps", "ttft_seconds", "output_tokens_per_second"):
            assert one["kpis"][kpi] == alone[kpi]
        assert one["capacities"] == []


def test_deployable_with_flags_or_hypothetical_with_reasons(policies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared = as_json(capsys, str(GOLDEN), "--policies", str(policies), "--no-plot")["policies"]
    today, uncached, double, two = compared
    assert (today["deployable"], today["vllm_flags"]) == (True, [])
    assert (uncached["deployable"], uncached["vllm_flags"]) == (True, ["--no-enable-prefix-caching"])
    assert (double["deployable"], double["vllm_flags"]) == (True, ["--num-gpu-blocks-override 164"])
    assert not two["deployable"]
    assert any("router" in reason for reason in two["hypothetical"])


def test_hit_ratio_against_capacity_in_one_plot(
    policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "out.png"
    arguments = (str(GOLDEN), "--policies", str(policies), "--capacities", "2,1,4", "--plot", str(plot))
    document = as_json(capsys, *arguments)
    assert document["plot"] == str(plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    today, uncached, double, _ = document["policies"]
    assert [point["factor"] for point in today["capacities"]] == [1.0, 2.0, 4.0]
    ratios = [point["hit_ratio"] for point in today["capacities"]]
    assert ratios[0] == today["kpis"]["prefix_cache_hit_ratio"]
    assert ratios[0] < ratios[2]
    assert {point["hit_ratio"] for point in uncached["capacities"]} == {0.0}
    assert today["capacities"][0]["capacity_tokens"] == (82 - 1) * 64
    assert double["capacities"][0]["hit_ratio"] == double["kpis"]["prefix_cache_hit_ratio"]


def test_results_do_not_depend_on_the_workers(policies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(GOLDEN), "--policies", str(policies), "--no-plot", "--workers")
    assert as_json(capsys, *arguments, "1") == as_json(capsys, *arguments, "4")


def test_a_person_gets_one_table(policies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(GOLDEN), "--policies", str(policies), "--no-plot"]) == 0
    out = capsys.readouterr().out
    for word in ("hit ratio", "TTFT p50", "TTFT p99", "output tok/s", "deployable", "uncached"):
        assert word in out
    assert "uncached: vllm serve --no-enable-prefix-caching" in out
    assert "two: hypothetical: " in out


def test_energy_and_cost_where_the_fleet_tells_them(
    policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        "engine: {num_gpu_blocks: 82, block_size: 64}\nstep_time: {fixed: 0.01, per_prefill_token: 1.0e-5}\n"
        "footprint: {power: {idle_watts: 60, max_watts: 400}, price_per_gpu_hour: 2.0, currency: EUR}\n"
    )
    assert main(["compare", str(GOLDEN), "--policies", str(policies), "--fleet", str(fleet), "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert "Wh/Mtok" in out
    assert "EUR/Mtok" in out


def test_every_problem_of_the_file_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text(
        "- {name: today, override: {}}\n"
        "- {name: small, overrides: {num_gpu_block: 0.5x, max_num_seqs: -3}}\n"
        "- {name: small}\n"
        "- {overrides: {block_size: 32}}\n"
        "- just words\n"
    )
    assert main(["compare", str(GOLDEN), "--policies", str(path)]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert str(path) in said
    for part in (
        "entry 1: override:",
        "entry 2 (small): overrides.num_gpu_block: unknown setting; did you mean num_gpu_blocks?",
        "entry 2 (small): overrides.max_num_seqs:",
        "entry 3 (small): name:",
        "entry 4: name:",
        "entry 5: (entry):",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policies", "/no/policies.yaml"], "/no/policies.yaml"),
        (["--capacities", "1,none"], "--capacities 1,none"),
        (["--capacities", "0"], "expected factors above 0"),
        (["--workers", "0"], "--workers 0"),
        (["--plot", "out.png", "--no-plot"], "exclude each other"),
    ],
)
def test_mistakes_get_a_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(GOLDEN), *arguments]) == 1
    assert said in capsys.readouterr().err


def test_without_matplotlib(
    policies: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    arguments = ["compare", str(GOLDEN), "--policies", str(policies), "--capacities", "1"]
    assert main([*arguments, "--plot", "out.png"]) == 1
    assert "pip install 'kavier-twin[plot]'" in capsys.readouterr().err
    assert main(arguments) == 0  # the table does not need it
    captured = capsys.readouterr()
    assert "today" in captured.out
    assert "pip install 'kavier-twin[plot]'" in captured.err
