"""`kavier-twin counterfactual`: one recorded run from another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kavier_twin.commands.main import main
from kavier_twin.studies.counterfactual import step_ratio

RECORDINGS = Path(__file__).parents[1] / "data" / "recordings"


@pytest.mark.slow
def test_caching_on_from_off_and_off_from_on(capsys: pytest.CaptureFixture[str]) -> None:
    """The targets: hit ratio within 1 point, mean TTFT and e2e within 10 % once the machines' speeds are set equal."""
    first, second = RECORDINGS / "chat-400", RECORDINGS / "chat-400-nocache"
    assert main(["counterfactual", str(first), str(second), "--json"]) == 0
    off, on = json.loads(capsys.readouterr().out)["predictions"]
    assert off["changed"] == {"prefix_caching": ["True", "False"]}
    assert off["step_ratio"] * on["step_ratio"] == pytest.approx(1.0)
    for one in (off, on):
        assert one["same_requests"] == one["requests"] == 661
        for prediction in one["predicted"].values():
            assert abs(prediction["errors"]["hit_ratio"]) < 1.0
        errors = one["predicted"]["scaled second by second"]["errors"]
        assert abs(errors["ttft_seconds"]) < 0.10
        assert abs(errors["e2e_seconds"]) < 0.10
        # Not so without the machine's speed: what is scaled away is told.
        assert abs(one["predicted"]["raw"]["errors"]["e2e_seconds"]) > 0.10


def test_equal_batches_are_compared() -> None:
    """Twice as slow at every size is twice as slow, however often each size came up in either run."""
    source = {1: np.full(90, 0.01), 4: np.full(10, 0.02), 7: np.full(5, 9.0)}
    target = {1: np.full(5, 0.02), 4: np.full(80, 0.04)}
    assert step_ratio(source, target) == pytest.approx(2.0)
    assert np.isnan(step_ratio(source, {2: np.ones(3)}))


@pytest.mark.parametrize("missing", ["steps.jsonl.gz", "meta.json"])
def test_what_is_missing_is_told(missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(RECORDINGS / "chat-400-nocache", tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    assert main(["counterfactual", str(tmp_path / "run"), str(RECORDINGS / "chat-400")]) == 1
    error = capsys.readouterr().err
    assert missing.split(".")[0] in error
    assert "Traceback" not in error
