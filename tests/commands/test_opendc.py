"""`simulate --export opendc DIR`: what OpenDC reads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from kavier_twin.commands.main import main
from kavier_twin.studies.export_opendc import REPLICA_MHZ

parquet = pytest.importorskip("pyarrow.parquet", reason="the extra opendc is not installed")
GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "fuzz-04"


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict, list[dict], list[dict], list[dict]]:
    """The KPIs, the requests, the tasks and the fragments of a run on two replicas too small for some requests."""
    requests, folder = tmp_path / "requests.jsonl", tmp_path / "deep" / "workload"
    arguments = ["simulate", str(GOLDEN), "--policy", "replicas=2", "--policy", "num_gpu_blocks=41", "--json"]
    assert main([*arguments, "--requests", str(requests), "--export", "opendc", str(folder)]) == 0
    document = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in requests.read_text().splitlines()]
    assert sorted(path.name for path in folder.iterdir()) == ["fragments.parquet", "tasks.parquet"]
    tables = [parquet.read_table(folder / name) for name in ("tasks.parquet", "fragments.parquet")]
    for table in tables:
        assert not any(field.nullable for field in table.schema)  # OpenDC's required columns
    return document, lines, tables[0].to_pylist(), tables[1].to_pylist()


def test_fragments_of_a_task_sum_to_its_duration(run: tuple) -> None:
    _, _, tasks, fragments = run
    assert tasks
    assert all(fragment["duration"] > 0 for fragment in fragments)
    for task in tasks:
        own = [fragment for fragment in fragments if fragment["id"] == task["id"]]
        assert sum(fragment["duration"] for fragment in own) == task["duration"]
        assert len(own) == task["num_fragments"]


def test_a_task_is_a_request_that_was_served(run: tuple) -> None:
    document, lines, tasks, _ = run
    served = {line["index"]: line for line in lines if line["finish_seconds"] is not None}
    assert 0 < document["requests_rejected"] == len(lines) - len(served)
    assert {task["id"] for task in tasks} == set(served)
    for task in tasks:
        line = served[task["id"]]
        assert task["submission_time"].timestamp() == pytest.approx(line["scheduled_seconds"], abs=5.1e-4)
        assert task["duration"] == pytest.approx(1000.0 * (line["finish_seconds"] - line["scheduled_seconds"]), abs=1.0)


def test_tasks_use_what_the_replicas_were_busy(run: tuple) -> None:
    """One request alone has the replica; several share it; together they use the time with something to run."""
    _, lines, tasks, fragments = run
    used = sum(fragment["duration"] * fragment["gpu_usage"] for fragment in fragments) / REPLICA_MHZ / 1000.0
    busy = 0.0
    for replica in (0, 1):
        spans = sorted(
            (line["scheduled_seconds"], line["finish_seconds"])
            for line in lines
            if line["finish_seconds"] is not None and line["replica"] == replica
        )
        end = -np.inf
        for start, stop in spans:
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
    assert used == pytest.approx(busy, abs=1e-3 * len(tasks))  # a millisecond's rounding a task
    assert all(0.0 < fragment["gpu_usage"] <= REPLICA_MHZ for fragment in fragments)


def test_mistakes_get_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(GOLDEN), "--export", "swf", str(tmp_path)]) == 1
    assert "expected opendc" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["simulate", str(GOLDEN), "--export", "opendc", str(tmp_path / "file")]) == 1
    assert "--export opendc" in capsys.readouterr().err
    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> object:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert main(["simulate", str(GOLDEN), "--export", "opendc", str(tmp_path / "new")]) == 1
    assert "pip install 'kavier-twin[opendc]'" in capsys.readouterr().err
