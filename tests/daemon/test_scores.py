"""Scores of a running pool: judged by what the mirror applied, kept across restarts, shown."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest

from forecast.forecasts import forecast_of, row
from kavier_twin.commands.main import main
from kavier_twin.errors import UserError
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.forecast.result import Forecast, Quantiles
from kavier_twin.forecast.slo import Slo
from kavier_twin.mirror.applied import Applied, Arrived, Ended
from kavier_twin.mirror.checkpoint_file import Saved
from kavier_twin.scores.keeper import ScoreKeeper
from kavier_twin.scores.scorer import Settled
from kavier_twin.scores.store import KEEP_SECONDS, ScoreStore, read_judged
from kavier_twin.serve.metrics.exporter import registry_of
from kavier_twin.serve.models import TwinView
from kavier_twin.simulation.footprint import Footprint, PowerModel
from kavier_twin.telemetry import EngineSample, GpuSample, RequestFinished

SETTINGS = ForecastSettings(slos=(Slo(name="slow", metric="e2e_p95_seconds", threshold=2.0),))
FOOTPRINT = Footprint(power=PowerModel(idle_watts=100.0, max_watts=700.0))


def request(number: int) -> list[Applied]:
    """One of a second, all of it."""
    finished = RequestFinished(
        id=str(number),
        time_seconds=number + 1.0,
        output_tokens=10,
        ttft_seconds=0.1,
        e2e_seconds=1.0,
        cached_tokens=40,
    )
    return [Arrived(str(number), float(number)), Ended(float(number), 100, finished)]


def forecast(time: float, median: float = 1.1, probability: float = 0.0) -> Forecast:
    quantiles = {0.05: median - 0.05, 0.5: median, 0.95: median + 0.05}
    return forecast_of(time, *(row("today", horizon, quantiles, probability) for horizon in (30.0, 60.0)))


def go_on(keeper: ScoreKeeper, start: int, stop: int) -> None:
    """A request a second, a forecast every ten."""
    for second in range(start, stop):
        keeper.follow(request(second), second + 1.0)
        if second % 10 == 0:
            keeper.judge(forecast(float(second)), "today")


def resumed(path: Path, number: int, saved: Saved | None, pool: str = "chat") -> ScoreKeeper:
    """Another process, from the checkpoint of this number."""
    found = ScoreKeeper(pool, SETTINGS, ScoreStore(path))
    found.resume(number, saved and as_read(saved))
    return found


def as_read(saved: Saved) -> Saved:
    return Saved(json.loads(json.dumps(saved.document)), saved.arrays)


def rows_of(path: Path) -> set[tuple[object, ...]]:
    """All that was judged, but for when."""
    with sqlite3.connect(path) as db:
        tables = [db.execute(f"SELECT * FROM {table}").fetchall() for table in ("kpis", "breaches", "moments")]
    return {row[3:] for rows in tables for row in rows}


@given(st.lists(st.tuples(st.integers(10, 60), st.integers(0, 150)), max_size=6))
@settings(deadline=None, max_examples=10)
def test_any_restarts_change_nothing(kills: list[tuple[int, int]]) -> None:
    """Killed so long after a checkpoint, at any moment: what was judged in between is judged again, and counted once.

    Forecasts are made at fixed seconds here, so that everything is the same.
    """
    with TemporaryDirectory() as directory:
        lasting, path = (
            ScoreKeeper("chat", SETTINGS, ScoreStore(Path(directory) / "lasting")),
            Path(directory) / "killed",
        )
        go_on(lasting, 0, 400)
        keeper, at, number = ScoreKeeper("chat", SETTINGS, ScoreStore(path)), 0, 0
        saved = keeper.save(0)
        for before, after in kills:
            go_on(keeper, at, at + before)
            at, number = at + before, number + 1
            saved = keeper.save(number)
            go_on(keeper, at, at + after)  # and is killed
            keeper = resumed(path, number, saved)
        go_on(keeper, at, 400)
        assert keeper.scores == lasting.scores
        assert keeper.scores.kpis[0].forecasts > 30
        assert rows_of(path) == rows_of(Path(directory) / "lasting")


def test_an_older_checkpoint_undoes_what_was_judged_since(tmp_path: Path) -> None:
    """The newest one was damaged: rows that it counts are dropped with it."""
    path = tmp_path / "scores.sqlite3"
    keeper = ScoreKeeper("chat", SETTINGS, ScoreStore(path))
    go_on(keeper, 0, 150)
    older = keeper.save(1)
    go_on(keeper, 150, 200)
    keeper.save(2)
    go_on(keeper, 200, 250)
    again = resumed(path, 1, older)
    go_on(again, 150, 250)
    assert again.scores == keeper.scores


def test_objectives_and_horizons_may_change_at_a_restart(tmp_path: Path) -> None:
    """Open forecasts of an objective that is gone are scored without it."""
    path = tmp_path / "scores.sqlite3"
    keeper = ScoreKeeper("chat", SETTINGS, ScoreStore(path))
    go_on(keeper, 0, 150)
    other = SETTINGS.model_copy(update={"slos": (Slo(name="other", metric="e2e_p95_seconds", threshold=1.0),)})
    again = ScoreKeeper("chat", other, ScoreStore(path))
    again.resume(1, as_read(keeper.save(1)))
    for second in range(150, 300):
        again.follow(request(second), second + 1.0)
    quantiles = {0.05: 1.0, 0.5: 1.1, 0.95: 1.2}
    again.judge(forecast_of(300.0, row("today", 45.0, quantiles, 0.0)), "today")
    assert again.scores.kpis[0].forecasts == 15
    assert {score.slo for score in again.scores.breaches} == {"slow"}  # from before


def test_a_pool_that_begins_anew_keeps_what_was_judged(tmp_path: Path) -> None:
    """Also at the next restart, from a checkpoint whose number is lower than that which the rows were written for."""
    path = tmp_path / "scores.sqlite3"
    keeper = ScoreKeeper("chat", SETTINGS, ScoreStore(path))
    keeper.save(50)
    go_on(keeper, 0, 200)
    again = resumed(path, 0, None)
    assert again.scores.kpis == keeper.scores.kpis
    assert again.scores.pending == 0
    last = resumed(path, 1, again.save(1))
    assert last.scores.kpis == keeper.scores.kpis


def test_pools_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite3"
    go_on(ScoreKeeper("chat", SETTINGS, ScoreStore(path)), 0, 200)
    assert resumed(path, 0, None, "code").scores.kpis == ()


def test_old_scores_and_requests_are_dropped(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite3")
    keeper = ScoreKeeper("chat", SETTINGS, store)
    go_on(keeper, 0, 1_000)
    assert len(store.judged("chat").kpis) > 100
    assert 0 < keeper.save(1).arrays["requests"].shape[0] < 400
    nothing = Settled([], [], [])
    with sqlite3.connect(store.path) as db:
        (newest,) = db.execute("SELECT MAX(judged) FROM kpis").fetchone()
    store.save("chat", nothing, 1, newest + KEEP_SECONDS + 1.0)
    assert store.judged("chat") == nothing


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


def test_another_versions_file_is_refused(tmp_path: Path) -> None:
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
    assert caplog.text.count("cannot write scores") == 1


def test_metrics_show_both_intervals() -> None:
    keeper = ScoreKeeper("chat", SETTINGS)
    for second in range(600):
        keeper.follow(request(second), second + 1.0)
        if second % 10 == 0:
            # Said to be 1.3 to 1.4: never so. Widened intervals learn it.
            keeper.judge(forecast(float(second), 1.35, 0.7), "today")
    registry = registry_of(lambda: {"chat": TwinView(pool="chat", version="", unix_seconds=0.0, scores=keeper.scores)})
    of = {"pool": "chat", "kpi": "e2e_seconds", "statistic": "p95", "horizon": "30"}

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
    assert "no daemon answers" in capsys.readouterr().err


def test_intervals_come_from_the_policy_in_force() -> None:
    keeper = ScoreKeeper("chat", SETTINGS)
    today = forecast(5.0).rows
    keeper.judge(forecast_of(5.0, row("other", 30.0, {0.5: 9.0}, 1.0), *today), "today")
    assert np.max([interval.high for interval in keeper.scores.intervals]) < 2.0


def test_engines_and_gpus_judge_what_requests_do_not_tell(tmp_path: Path) -> None:
    """Also across a restart; and what nothing tells is told as not observed."""
    keeper = ScoreKeeper("chat", SETTINGS, ScoreStore(tmp_path / "scores.sqlite3"))
    kpis = {"kv_cache_usage_ratio": 0.3, "power_watts": 640.0, "itl_p99_seconds": 0.02}
    for second in range(300):
        keeper.follow(request(second), second + 1.0)
        if second % 15 == 0:
            about = {"time_seconds": float(second), "pod": "a"}
            keeper.read(EngineSample(**about, kv_cache_usage_ratio=0.25, requests_running=1.0, requests_waiting=0.0))
            keeper.read(GpuSample(**about, gpu="GPU-1", power_watts=400.0))
        if second % 10 == 0:
            rows = tuple(
                replace(one, kpis={**one.kpis, **{kpi: Quantiles({0.5: value}) for kpi, value in kpis.items()}})
                for one in forecast(float(second)).rows
            )
            keeper.judge(forecast_of(float(second), *rows), "today", FOOTPRINT)
        if second == 150:
            keeper = resumed(tmp_path / "scores.sqlite3", 1, keeper.save(1))
    scores = {score.kpi: score for score in keeper.scores.kpis if score.horizon_seconds == 30.0}
    assert scores["kv_cache_usage_ratio"].error == pytest.approx(0.05)
    assert scores["power_watts"].error == pytest.approx(640.0 - 1.54 * 400.0)
    assert scores["kv_cache_usage_ratio"].forecasts == scores["e2e_p95_seconds"].forecasts  # none lost in the restart
    assert keeper.scores.unobserved == {"itl_p99_seconds": keeper.scores.unobserved["itl_p99_seconds"]}
