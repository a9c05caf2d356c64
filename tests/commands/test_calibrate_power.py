"""`kavier-twin calibrate-power` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kavier_twin.commands.main import main

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"


def files(tmp_path: Path, watts: str | None = None) -> list[str]:
    """A footprint, and watts of a board that always draws 80 W."""
    footprint, path = tmp_path / "footprint.yaml", tmp_path / "watts.csv"
    footprint.write_text("power: {idle_watts: 50, max_watts: 300}\n")
    path.write_text(watts or "time,watts\n" + "".join(f"{second},80\n" for second in range(1, 600)))
    return ["calibrate-power", str(RECORDING), "--watts", str(path), "--footprint", str(footprint)]


def test_the_fitted_model_is_printed_as_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recording's server is nearly always busy: idleness is what the watts tell least of."""
    assert main(files(tmp_path)) == 0
    captured = capsys.readouterr()
    power = yaml.safe_load(captured.out)["power"]
    assert set(power) == {"idle_watts", "max_watts", "compute_load", "memory_load"}
    assert power["max_watts"] == 300.0
    assert "modelled / measured" in captured.err


@pytest.mark.parametrize(
    ("watts", "said"),
    [
        ("time,watts\n2026-01-31T23:00:00Z,100\n", "check that its times match"),
        ("time,watt\n0,100\n", "found time,watt"),
        ("time,watts\n0,-5\n", "watts '-5'"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path: Path, watts: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(tmp_path, watts)) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_a_power_model_to_begin_with_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(tmp_path)[:-2]) == 1
    assert "give them with --footprint" in capsys.readouterr().err
