"""Scores of a running pool: judged from the stream, kept across restarts, shown."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest

from forecast.forecasts import forecast_of, row
from kavier_twin.commands.main import main
from kavier_twin.errors import UserError
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.forecast.result import Forecast, Quantiles
from kavier_twin.forecast.slo import Slo
from kavier_twin.scores.keeper import ScoreKeeper
from kavier_twin.scores.scorer import Settled
from kavier_twin.scores.store import KEEP_SECONDS, ScoreStore, read_judged
from kavier_twin.serve.metrics.exporter import registry_of
from kavier_twin.serve.models import TwinView
from kavier_twin.simulation.footprint import Footprint, PowerModel
from kavier_twin.telemetry import EngineSample, GpuSample, RequestRecord, RequestSeen

SETTINGS = ForecastSettings(slos=(Slo(name="slow", metric="e2e_p95_seconds", threshold=2.0),))
FOOTPRINT = Footprint(power=PowerModel(idle_watts=100.0, max_watts=700.0))


def record(number: int) -> RequestRecord:
    return RequestRecord(
        id=str(number),
        time_seconds=float(number),
        prompt_tokens=100,
        output_tokens=10,
        ttft_seconds=0.1,
        e2e_seconds=1.0,
        cached_tokens=40,
    )


def forecast(time: float, median: float = 1.1, probability: float = 0.0) -> Forecast:
    quantiles = {0.05: median - 0.05, 0.5: median, 0.95: median + 0.05}
    return forecast_of(time, *(row("today", horizon, quantiles, probability) for horizon in (30.0, 60.0)))


def go_on(keeper: ScoreKeeper, start: int, stop: int) -> None:
    """A request a second, a forecast every ten."""
    for second in range(start, stop):
        keeper.take(record(second))
        if second % 10 == 0:
            keeper.judge(forecast(float(second)), "today")


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    """Also where the stream is repeated from some time before: open forecasts are judged by requests of both lives."""
    lasting = ScoreKeeper("chat", SETTINGS)
    go_on(lasting, 0, 400)
    store = ScoreStore(tmp_path / "scores.sqlite3")
    go_on(ScoreKeeper("chat", SETTINGS, store), 0, 221)
    store.close()
    again = ScoreKeeper("chat", SETTINGS, ScoreStore(tmp_path / "scores.sqlite3"))
    assert again.scores.pending > 0
    go_on(again, 205, 400)
    assert again.scores.kpis == lasting.scores.kpis
    assert again.scores.kpis[0].forecasts > 30
    assert again.scores.breaches == lasting.scores.breaches
    assert not again.scores.unscored


def test_pools_do_not_mix(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite3")
    go_on(ScoreKeeper("chat", SETTINGS, store), 0, 200)
    assert ScoreKeeper("code", SETTINGS, store).scores.kpis == ()


def test_requests_under_way_at_the_restart_are_known(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite3")
    keeper = ScoreKeeper("chat", SETTINGS, store)
    keeper.take(RequestSeen(id="long", time_seconds=1.0, prompt_tokens=5))
    go_on(keeper, 2, 12)
    assert store.requests("chat")[1] == {"long": (1.0, 5)}


def test_old_scores_and_requests_are_dropped(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite3")
    go_on(ScoreKeeper("chat", SETTINGS, store), 0, 1_000)
    assert len(store.judged("chat").kpis) > 100
    ended, _ = store.requests("chat")
    assert 0 < len(ended) < 400
    nothing = Settled([], [], [])
    with sqlite3.connect(store.path) as db:
        (newest,) = db.execute("SELECT MAX(judged) FROM kpis").fetchone()
    store.save("chat", nothing, (), (), {}, (), now_unix=newest + KEEP_SECONDS + 1.0, forget_before_seconds=1e9)
    assert store.judged("chat") == nothing
    assert store.requests("chat")[0] == []


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_damaged_file_is_moved_aside(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "scores.sqlite3"
    store = ScoreStore(path)
    go_on(ScoreKeeper("chat", SETTINGS, store), 0, 600)
    store.close()
    whole = path.read_bytes()
    bad = b"not a database at all" * 100 if damage == "text" else whole[:4096] + b"\0" * 4096 + whole[8192:]
    path.write_bytes(bad)
    keeper = ScoreKeeper("chat", SETTINGS, ScoreStore(path))
    assert keeper.scores.kpis == ()
    assert "scores.sqlite3.damaged-1" in caplog.text
    assert path.with_name("scores.sqlite3.damaged-1").read_bytes() == bad
    go_on(keeper, 0, 200)
    assert keeper.scores.kpis


def test_a_newer_files_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite3"
    ScoreStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="version 99"):
        ScoreStore(path)
    with pytest.raises(UserError, match="version 99"):
        read_judged(path)


def test_a_write_that_fails_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite3")
    keeper = ScoreKeeper("chat", SETTINGS, store)
    store.close()
    go_on(keeper, 0, 100)  # goes on in memory
    assert keeper.scores.kpis
    assert store.failures == 10
    assert caplog.text.count("could not be written") == 1


def test_metrics_show_both_intervals() -> None:
    keeper = ScoreKeeper("chat", SETTINGS)
    for second in range(600):
        keeper.take(record(second))
        if second % 10 == 0:
            # Said to be 1.3 to 1.4: never so. Widened intervals learn it.
            keeper.judge(forecast(float(second), 1.35, 0.7), "today")
    registry = registry_of(lambda: {"chat": TwinView(pool="chat", version="", unix_seconds=0.0, scores=keeper.scores)})
    of = {"pool": "chat", "kpi": "e2e_p95_seconds", "horizon": "30"}

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"kavier_twin_{name}", {**of, **labels})

    assert value("score_coverage_ratio", interval="simulated") == 0.0
    widened = value("score_coverage_ratio", interval="widened")
    assert widened is not None
    assert widened > 0.7
    assert value("prediction_bound", interval="simulated", bound="low") == pytest.approx(1.3)
    low = value("prediction_bound", interval="widened", bound="low")
    assert low is not None
    assert low <= 1.0 + 1e-9
    assert value("score_error_to_persistence_ratio") is None  # persistence was right to the last bit
    slo = {"pool": "chat", "slo": "slow", "horizon": "30"}
    assert registry.get_sample_value("kavier_twin_score_brier", {**slo, "method": "simulated"}) == pytest.approx(0.49)
    assert b"kavier_twin_pending_forecasts" in generate_latest(registry)


def test_the_command_reads_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scores.sqlite3"
    store = ScoreStore(path)
    keeper = ScoreKeeper("chat", SETTINGS, store)
    go_on(keeper, 0, 200)
    assert main(["scores", "--db", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["pools"]["chat"]
    assert found["kpis"][0]["forecasts"] == keeper.scores.kpis[0].forecasts
    assert found["kpis"][0]["error"] == pytest.approx(0.1)
    assert main(["scores", "--db", str(path)]) == 0
    assert "e2e p95" in capsys.readouterr().out
    for wrong, says in (("nowhere", "no such file"), ("text", "not a file of scores")):
        (tmp_path / "text").write_text("a text, and no database")
        assert main(["scores", "--db", str(tmp_path / wrong)]) == 1
        assert says in capsys.readouterr().err
    assert main(["scores", "--url", "http://127.0.0.1:9"]) == 1
    assert "no daemon answers there" in capsys.readouterr().err


def test_intervals_come_from_the_policy_in_force() -> None:
    keeper = ScoreKeeper("chat", SETTINGS)
    today = forecast(5.0).rows
    keeper.judge(forecast_of(5.0, row("other", 30.0, {0.5: 9.0}, 1.0), *today), "today")
    assert np.max([interval.high for interval in keeper.scores.intervals]) < 2.0


def test_engines_and_gpus_judge_what_requests_do_not_tell(tmp_path: Path) -> None:
    """Also across a restart; and what nothing tells is told as not observed."""
    store = ScoreStore(tmp_path / "scores.sqlite3")
    keeper = ScoreKeeper("chat", SETTINGS, store)
    kpis = {"kv_usage_mean_ratio": 0.3, "power_mean_watts": 640.0, "itl_p99_seconds": 0.02}
    for second in range(300):
        keeper.take(record(second))
        if second % 15 == 0:
            about = {"time_seconds": float(second), "pod": "a"}
            keeper.take(EngineSample(**about, kv_cache_usage_ratio=0.25, requests_running=1.0, requests_waiting=0.0))
            keeper.take(GpuSample(**about, gpu="GPU-1", power_watts=400.0))
        if second % 10 == 0:
            rows = tuple(
                replace(one, kpis={**one.kpis, **{kpi: Quantiles({0.5: value}) for kpi, value in kpis.items()}})
                for one in forecast(float(second)).rows
            )
            keeper.judge(forecast_of(float(second), *rows), "today", FOOTPRINT)
        if second == 150:
            store.close()
            keeper = ScoreKeeper("chat", SETTINGS, store := ScoreStore(tmp_path / "scores.sqlite3"))
    scores = {score.kpi: score for score in keeper.scores.kpis if score.horizon_seconds == 30.0}
    assert scores["kv_usage_mean_ratio"].error == pytest.approx(0.05)
    assert scores["power_mean_watts"].error == pytest.approx(640.0 - 1.54 * 400.0)
    assert scores["kv_usage_mean_ratio"].forecasts == scores["e2e_p95_seconds"].forecasts  # none lost in the restart
    assert keeper.scores.unobserved == {"itl_p99_seconds": keeper.scores.unobserved["itl_p99_seconds"]}


def test_a_file_of_the_version_before_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite3"
    store = ScoreStore(path)
    go_on(ScoreKeeper("chat", SETTINGS, store), 0, 200)
    store.close()
    with sqlite3.connect(path) as db:
        db.executescript(
            "DROP TABLE readings; ALTER TABLE kpis DROP COLUMN served; ALTER TABLE kpis DROP COLUMN known;"
            "ALTER TABLE breaches DROP COLUMN simulated; PRAGMA user_version = 1;"
        )
    assert read_judged(path)["chat"].kpis
    again = ScoreStore(path)
    assert again.readings("chat") == []
    assert again.judged("chat").kpis
