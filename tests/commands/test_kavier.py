"""`kavier-twin kavier`: the paper's experiments as a user meets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kavier_twin.commands.main import main

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"


def test_accuracy(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kavier", "accuracy", str(shared_data / "kavier")]) == 0
    out = capsys.readouterr().out
    assert out.count("9 of 9 published figures are the model's here") == 2
    for line, limits in zip(
        [line for line in out.splitlines() if "MAPE" in line], ((7.39, 7.4), (4.00, 4.0)), strict=True
    ):
        published, _, ours = (float(cell.strip().removesuffix(" %")) for cell in line.split("│")[3:6])
        assert published == limits[0]  # what the paper says of itself
        assert ours <= limits[1]


def test_kv_cache_from_the_trace_s_sums(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kavier", "kv-cache", str(shared_data / "kavier")]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert len(rows) == 8
    for row in rows:
        prefill, of_prefill, decode, of_decode = (cell.strip().replace(",", "") for cell in row[3:7])
        assert float(prefill) == pytest.approx(float(of_prefill), abs=0.011)
        if decode != "(taken)":
            assert float(decode) == pytest.approx(float(of_decode), rel=1e-4)


def test_prefix_policies_beside_a_block_cache(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(shared_data / "kavier")
    arguments = ["--trace", str(RECORDING), "--min-tokens", "64", "--entries", "4,1000"]
    hits = {}
    for scope in ("session", "global"):
        assert main(["kavier", "prefix", data, *arguments, "--scope", scope]) == 0
        out = capsys.readouterr().out
        for entries in (4, 1000):
            row = next(line for line in out.splitlines() if f"64 tokens, {entries} prompts, {scope}" in line)
            hits[scope, entries] = float(row.split("│")[2].strip().removesuffix("%"))
        assert "block cache that evicts nothing" in out
    assert hits["session", 4] <= hits["session", 1000] <= hits["global", 1000]
    assert hits["session", 1000] > 0.0


@pytest.mark.parametrize("experiment", ["accuracy", "kv-cache", "prefix"])
def test_mistakes_get_a_sentence(experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kavier", experiment, str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path) in said
    assert "give the folder of the paper's tables as DATA" in said
    assert "Traceback" not in said
