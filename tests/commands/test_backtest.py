"""`kavier-twin backtest`: the whole twin over a trace, its forecasts judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kavier_twin.commands.main import main
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.forecast.slo import Slo
from kavier_twin.mirror.mirror import Mirror
from kavier_twin.recordings.scenario import load_scenario
from kavier_twin.simulation.kpi_table import METRICS
from kavier_twin.studies.backtest import backtest, reshaped
from kavier_twin.telemetry import RequestRecord

RECORDINGS = Path(__file__).parents[1] / "data" / "recordings"
SETTINGS = ForecastSettings(every_seconds=10.0, horizons_seconds=(10.0, 30.0), scenarios=2, workers=2)


def requests(count: int, every_seconds: float, output_tokens: int = 50) -> list[RequestRecord]:
    return [
        RequestRecord(id=str(n), time_seconds=every_seconds * n, prompt_tokens=200, output_tokens=output_tokens)
        for n in range(count)
    ]


def write(path: Path, records: list[RequestRecord]) -> Path:
    path.write_text("".join(record.model_dump_json(exclude_none=True) + "\n" for record in records))
    return path


@pytest.mark.slow
def test_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slos = tmp_path / "slo.yaml"
    slos.write_text("slos:\n- {name: patient, metric: e2e_p95_seconds, threshold: 3.0}\n")
    options = ["--every", "20", "--horizons", "20,40", "--scenarios", "2", "--plots", str(tmp_path / "plots")]
    assert main(["backtest", str(RECORDINGS / "shift-300"), "--slo", str(slos), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"] is True
    assert found["requests"] == 942
    scored = {(kpi["kpi"], kpi["horizon_seconds"]): kpi for kpi in found["kpis"]}
    assert {horizon for _, horizon in scored} == {20.0, 40.0}
    # The twin foresees hits better than persistence, and the size of all else.
    assert scored["prefix_cache_hit_ratio", 40.0]["error"] < 0.05
    assert scored["e2e_p95_seconds", 40.0]["error"] < 2.0
    assert found["breaches"][0]["brier"] <= 1.0
    written = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"fan-e2e_p95_seconds.png", "alerts-patient.png"} <= written


def test_the_engine_of_a_simulated_reality_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration would lead away from it, as the mirror does not see which replica serves whom."""
    monkeypatch.setattr(Mirror, "use", lambda *_: pytest.fail("calibrated"))
    backtest(load_scenario(write(tmp_path / "calm.jsonl", requests(600, 0.2))), SETTINGS, (), warm_up_seconds=90.0)


def test_forecasts_know_nothing_of_what_comes(tmp_path: Path) -> None:
    """Another second half changes no forecast made before."""
    slos = (Slo(name="slow", metric="e2e_p95_seconds", threshold=1.0),)
    calm = requests(600, 0.2)
    busy = calm[:300] + [r.model_copy(update={"output_tokens": 400}) for r in calm[300:]]
    runs = [
        backtest(load_scenario(write(tmp_path / f"{name}.jsonl", records)), SETTINGS, slos, warm_up_seconds=10.0)
        for name, records in (("calm", calm), ("busy", busy))
    ]
    before, after = (
        [{row[:4] + row[4:6]: row.observed for row in run.kpis if (row.time_seconds <= 60.0) == early} for run in runs]
        for early in (True, False)
    )
    assert before[0].keys() == before[1].keys()
    assert len(before[0]) > 20
    assert before[0] != before[1]  # what came is another thing
    assert after[0].keys() != after[1].keys()
    # Reality is the simulation that the twin knows the engine of: where load goes on as it was, it foresees it well.
    calm_e2e = [row for row in runs[0].kpis if row.kpi == "e2e_p95_seconds"]
    assert np.mean([abs(row.median / row.observed - 1.0) for row in calm_e2e]) < 0.1


def test_load_takes_the_shape_that_is_told() -> None:
    calm = requests(1_000, 1.0)
    shaped = reshaped(calm, [(0.0, 1.0), (100.0, 1.0), (200.0, 4.0)])
    times = np.array([record.time_seconds for record in shaped])
    assert [record.id for record in shaped] == [record.id for record in calm]
    counts = np.histogram(times, [0.0, 100.0, 200.0, 300.0])[0]
    assert counts == pytest.approx([100, 250, 400], abs=3)
    assert len(reshaped([], [(0.0, 2.0)])) == 0


@pytest.mark.parametrize(
    ("slos", "options", "says"),
    [
        ("- {name: a, metric: ttft, threshold: 1}\n", [], "metric"),
        ("fast\n", [], "expected a list"),
        ("- {name: a, metric: ttft_p99_seconds, threshold: 1}\n", ["--horizons", "a"], "--horizons"),
        ("- {name: a, metric: ttft_p99_seconds, threshold: 1}\n", ["--every", "0"], "--every"),
        ("- {name: a, metric: ttft_p99_seconds, threshold: 1}\n", ["--shape", "5:1,2:3"], "--shape"),
        ("- {name: a, metric: ttft_p99_seconds, threshold: 1}\n", ["--horizons", "900"], "too short"),
    ],
)
def test_wrong_use(
    slos: str, options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slo.yaml").write_text(slos)
    trace = write(tmp_path / "trace.jsonl", requests(5, 1.0))
    assert main(["backtest", str(trace), "--slo", str(tmp_path / "slo.yaml"), *options]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


def test_every_objective_is_foreseen_and_judged(tmp_path: Path) -> None:
    """Whatever KPI it bounds, but for refused requests, which no telemetry tells of."""
    (tmp_path / "fleet.yaml").write_text(
        "hardware: {gpu: H100 SXM 80GB, model: meta-llama/Llama-3.1-8B}\n"
        "footprint: {price_per_gpu_hour: 2.5, currency: USD, carbon: 300}\n"
    )
    lower = {"prefix_cache_hit_ratio", "output_tokens_per_second", "requests_per_second"}
    slos = tuple(Slo(name=metric, metric=metric, threshold=1e12 if metric in lower else -1.0) for metric in METRICS)
    trace = write(tmp_path / "trace.jsonl", requests(400, 0.2))
    found = backtest(load_scenario(trace, fleet_file=tmp_path / "fleet.yaml"), SETTINGS, slos, warm_up_seconds=10.0)
    judged = set(METRICS) - {"requests_rejected"}
    assert {score.kpi for score in found.scores.kpis} == judged
    assert {score.slo for score in found.scores.breaches} == judged == {alert.slo for alert in found.scores.alerts}
    # Each is on the wrong side of its threshold, below or above: foreseen as surely broken, and seen so.
    assert all(score.breached == score.forecasts > 0 and score.brier < 0.05 for score in found.scores.breaches)
    assert set(found.scores.unobserved) == {"requests_rejected"}
    # The twin knows the engine: the sizes of what it draws and how fast it decodes are foreseen as they are read.
    for kpi in ("power_watts", "itl_p99_seconds"):
        rows = [row for row in found.kpis if row.kpi == kpi]
        assert np.mean([abs(row.median / row.observed - 1.0) for row in rows]) < 0.15, kpi
