"""`kavier-twin accuracy`: measured data sets, found, predicted, compared and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kavier_twin.commands.main import main
from kavier_twin.studies.accuracy.find import find

RECORDINGS = Path(__file__).parents[1] / "data" / "recordings"
LATENCY = {"mean": 0.05, "p50": 0.05, "p90": 0.06, "p99": 0.07}


def accuracy(capsys: pytest.CaptureFixture[str], folder: Path, report: Path) -> dict[str, Any]:
    assert main(["accuracy", str(folder), "--report", str(report), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1  # nothing else there
    document: dict[str, Any] = json.loads(out)
    return document


def trial(result: dict[str, Any], basis: str, predicted: str = "") -> dict[str, Any]:
    (found,) = [t for t in result["trials"] if t["basis"] == basis and predicted in t["predicted"]]
    return dict(found)


def stages(model: str) -> dict[str, Any]:
    """One load test of one stage, of a server that never was."""
    stage = {
        "requested_rate": 4.0,
        "sent": 40,
        "success_count": 40,
        "prompt_len": {"mean": 100.0},
        "ttft_s": LATENCY,
        "e2e_s": {name: 20 * value for name, value in LATENCY.items()},
        "derived_tpot_s": 0.02,
    }
    prompts = {"num_groups": 2, "num_prompts_per_group": 5, "system_prompt_len": 40, "output_len": 50}
    run = {
        "id": "made-up",
        "model": model,
        "gpu": "H100 SXM 80GB",
        "tp": 1,
        "load": {"type": "constant"},
        "prompt_structure_effective": prompts,
        "stages": [stage, {**stage, "requested_rate": 8.0}],
    }
    return {"runs": [run]}


def test_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "docs" / "accuracy.md"
    document = accuracy(capsys, RECORDINGS / "chat-400", report)
    (result,) = document["sets"]
    assert result["name"] == "chat-400"
    assert any("nothing predicted from the catalogue" in note.lower() for note in result["notes"])
    calibrated = trial(result, "calibrated")
    assert calibrated["fitted_on"] == "the first third of the requests, by arrival"
    errors = calibrated["errors"]
    assert set(errors) == {"TTFT", "TPOT", "e2e", "hit ratio"}
    assert set(errors["TTFT"]) == {"mean", "p50", "p90", "p99"}
    assert abs(errors["hit ratio"]["mean"]["median"]) <= 0.5  # points, on the last two thirds
    for pair in calibrated["pairs"]:
        share = pair["predicted"] / pair["measured"] - 1
        difference = 100 * (pair["predicted"] - pair["measured"])
        assert pair["error"] == pytest.approx(difference if pair["metric"] == "hit ratio" else share)
    text = report.read_text()
    plot = report.parent / "accuracy" / "chat-400.png"
    assert f"(accuracy/{plot.name})" in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"{errors['TTFT']['p90']['median']:+.1%}" in text


def test_what_is_not_data_and_what_is_broken_do_not_stop_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(RECORDINGS / "chat-400", folder / "good")
    shutil.copytree(RECORDINGS / "chat-400", folder / "no-engine")
    meta = json.loads((folder / "no-engine" / "meta.json").read_text())
    (folder / "no-engine" / "meta.json").write_text(json.dumps({**meta, "engine": None}))
    shutil.copytree(RECORDINGS / "chat-400", folder / "no-meta")
    (folder / "no-meta" / "meta.json").unlink()
    (folder / "pictures").mkdir()
    (folder / "pictures" / "notes.csv").write_text("a,b\n1,2\n")
    (folder / "load").mkdir()
    (folder / "load" / "cut.json").write_text('{"runs": [{"stages": ')
    (folder / "load" / "odd.json").write_text(json.dumps({"runs": [{"id": 3}]}))
    document = accuracy(capsys, folder, tmp_path / "accuracy.md")
    assert [result["name"] for result in document["sets"]] == ["good"]
    assert [entry["name"] for entry in document["skipped"]] == ["pictures"]
    failed = {entry["name"]: entry["reason"] for entry in document["failed"]}
    assert set(failed) == {"no-engine", "no-meta", "load/cut.json", "load/odd.json"}
    for reason in failed.values():
        assert "\n" not in reason
    assert "engine" in failed["no-engine"]
    assert "meta.json" in failed["no-meta"]
    assert "runs.0" in failed["load/odd.json"]
    text = (tmp_path / "accuracy.md").read_text()
    assert "`no-engine`" in text
    assert "`pictures`" in text


def test_requests_that_the_engine_as_told_could_not_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are counted and left out; the others are calibrated on and compared."""
    folder = tmp_path / "short"
    shutil.copytree(RECORDINGS / "chat-400", folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["engine"]["max_model_len"] = 1000
    (folder / "meta.json").write_text(json.dumps(meta))
    (result,) = accuracy(capsys, folder, tmp_path / "accuracy.md")["sets"]
    assert any("that the described engine could not serve" in note for note in result["notes"])
    assert set(trial(result, "calibrated")["errors"]) == {"TTFT", "TPOT", "e2e", "hit ratio"}


def test_models_unknown_to_the_catalogue_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(stages("nobody/unheard-of-7b")))
    rows = "model_path,system,isl,osl,batch_size,silicon_ttft_ms,silicon_tpot_ms"
    (tmp_path / "b.csv").write_text(f"{rows}\nmeta-llama/Llama-3.1-8B,no_such_gpu,128,32,4,50,10\n,,,,,,\n")
    document = accuracy(capsys, tmp_path, tmp_path / "accuracy.md")
    first, second = document["sets"]
    assert any("unheard-of-7b" in note and "not in the catalogue" in note for note in first["notes"])
    assert any("no_such_gpu" in note and "not in the catalogue" in note for note in second["notes"])
    assert any("1 malformed rows" in note for note in second["notes"])
    assert first["trials"] == second["trials"] == []


def test_summaries_of_a_load_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the catalogue every stage is predicted; calibrated, those after the first, which it was fitted to."""
    (tmp_path / "made-up.json").write_text(json.dumps(stages("meta-llama/Llama-3.1-8B")))
    (result,) = accuracy(capsys, tmp_path, tmp_path / "accuracy.md")["sets"]
    points = {pair["point"] for pair in trial(result, "from the catalogue alone")["pairs"]}
    assert points == {"made-up, stage 0", "made-up, stage 1"}
    calibrated = trial(result, "calibrated")
    assert {pair["point"] for pair in calibrated["pairs"]} == {"made-up, stage 1"}
    # The made-up server is about as slow in its second stage, and far slower than the catalogue's.
    assert calibrated["errors"]["TPOT"]["mean"]["median_absolute"] < 0.15
    assert trial(result, "from the catalogue alone")["errors"]["TPOT"]["mean"]["median"] < -0.3


def test_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["accuracy", str(tmp_path)]) == 1
    assert "no measured data set" in capsys.readouterr().err


# --- the measured data: what the numbers are held to ---------------------------------------------------------------


def measured(folder: Path) -> list[dict[str, Any]]:
    """The results of every data set in a folder."""
    sets, _ = find(folder)
    assert sets
    return [data.run(data.path, data.name, lambda step: None).document() for data in sets]


def error(found: dict[str, Any], metric: str, kind: str = "median_absolute") -> float:
    return float(found["errors"][metric]["mean"][kind])


@pytest.mark.slow
def test_single_requests_known_one_by_one(shared_data: Path) -> None:
    """The means of the last two thirds, fitted on the first."""
    for result in measured(shared_data / "rtx"):
        for metric in ("TTFT", "TPOT", "e2e"):
            assert error(trial(result, "calibrated"), metric) <= 0.02, (result["name"], metric)


@pytest.mark.slow
def test_load_tests_on_h100(shared_data: Path) -> None:
    for result in measured(shared_data / "h100"):
        alone = trial(result, "from the catalogue alone", "not overloaded")
        assert error(alone, "e2e") <= 0.10
        assert error(alone, "TTFT") <= 0.12
        assert error(alone, "TPOT") <= 0.10
        calibrated = trial(result, "calibrated")
        assert error(calibrated, "e2e") <= 0.03
        assert error(calibrated, "TTFT") <= 0.08


@pytest.mark.slow
def test_fixed_concurrency_on_h100_and_h200(shared_data: Path) -> None:
    for result in measured(shared_data / "silicon"):
        dense = trial(result, "from the catalogue alone, users starting one by one", "dense")
        assert error(dense, "TPOT") <= 0.10


@pytest.mark.slow
def test_single_requests_on_an_a10(shared_data: Path) -> None:
    for result in measured(shared_data / "kavier"):
        alone = trial(result, "from the catalogue alone")
        assert error(alone, "prefill", "mean_absolute") <= 0.074
        assert error(alone, "decode", "mean_absolute") <= 0.040


@pytest.mark.slow
def test_recordings() -> None:
    for result in measured(RECORDINGS):
        assert error(trial(result, "calibrated"), "hit ratio") <= 0.5
        corrected = trial(result, "calibrated, corrected for the machine's drift")
        assert error(corrected, "hit ratio") <= 0.5
        for metric in ("TTFT", "e2e"):
            assert error(corrected, metric) <= 0.10, (result["name"], metric)
        assert np.isfinite(error(trial(result, "calibrated"), "TTFT"))
