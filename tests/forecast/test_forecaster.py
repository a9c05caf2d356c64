from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from forecast.streams import chat_stream, fleet_settings, snapshot_at
from kavier_twin.forecast.forecaster import Forecaster, ForecastSettings
from kavier_twin.forecast.result import Forecast
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.simulation.policies import DEFAULT_POLICIES

PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return snapshot_at(chat_stream(1, 60.0), fleet_settings(num_gpu_blocks=500), 50.0, 50.0)


@pytest.fixture
def forecaster() -> Iterator[Forecaster]:
    settings = ForecastSettings(
        every_seconds=0.02, budget_seconds=PATIENCE_SECONDS, horizons_seconds=(1.0, 5.0), scenarios=1, workers=1
    )
    forecaster = Forecaster(settings)
    yield forecaster
    forecaster.stop()


def test_defaults() -> None:
    settings = ForecastSettings()
    assert settings.horizons_seconds == (60.0, 300.0, 900.0)
    assert settings.policies == DEFAULT_POLICIES
    assert {slo.metric: slo.threshold for slo in settings.slos} == {"ttft_p99_seconds": 2.0, "e2e_p95_seconds": 30.0}
    assert ForecastSettings.model_validate_json(settings.model_dump_json()) == settings


def test_horizons_are_put_in_order() -> None:
    assert ForecastSettings(horizons_seconds=(300, 60, 300)).horizons_seconds == (60.0, 300.0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"every_seconds": 0}, "greater than 0"),
        ({"horizons_seconds": ()}, "at least 1"),
        ({"horizons_seconds": (-1.0,)}, "greater than 0"),
        ({"scenarios": 0}, "greater than or equal to 1"),
        ({"workers": 0}, "greater than or equal to 1"),
        ({"policies": ({"name": "a", "overrides": {"max_num_seqs": 1}},)}, "without overrides"),
        ({"policies": ({"name": "a"}, {"name": "a"})}, "more than once: a"),
        ({"slos": ({"name": "a", "metric": "requests_running", "threshold": 1},) * 2}, "more than once: a"),
        ({"recent": 1}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ForecastSettings.model_validate(wrong)


def test_run(snapshot: Snapshot, forecaster: Forecaster) -> None:
    forecast = forecaster.run(snapshot)
    assert forecast.duration_seconds is not None
    assert forecast.duration_seconds > 0.0
    assert len(forecast.rows) == 2 * len(DEFAULT_POLICIES)
    again = forecaster.run(snapshot)
    assert (forecast.rows, forecast.verdict) == (again.rows, again.verdict)


def test_cycles_until_stopped(snapshot: Snapshot, forecaster: Forecaster) -> None:
    published: list[Forecast] = []
    several, overlapping = threading.Event(), threading.Event()
    one_at_a_time = threading.Lock()

    def source() -> Snapshot:
        if not one_at_a_time.acquire(blocking=False):
            overlapping.set()
        return snapshot

    def publish(forecast: Forecast) -> None:
        published.append(forecast)
        one_at_a_time.release()
        if len(published) == 3:
            several.set()

    forecaster.start(source, publish)
    assert several.wait(PATIENCE_SECONDS)
    forecaster.stop()
    count = len(published)
    assert forecaster.cycles == count >= 3
    assert forecaster.failures == 0
    assert not overlapping.is_set()
    assert published[0].rows == published[2].rows
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("APScheduler", "forecast"))]
    assert len(published) == count


def test_an_error_costs_one_cycle(snapshot: Snapshot, forecaster: Forecaster, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    published = threading.Event()

    def source() -> Snapshot | None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no mirror")
        return None if len(calls) == 2 else snapshot

    with caplog.at_level(logging.ERROR):
        forecaster.start(source, lambda forecast: published.set())
        assert published.wait(PATIENCE_SECONDS)
        forecaster.stop()
    assert forecaster.failures == 1
    assert forecaster.cycles >= 1
    assert "no mirror" in caplog.text


def test_stop_waits_for_the_cycle_under_way(snapshot: Snapshot, forecaster: Forecaster) -> None:
    entered, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def source() -> None:
        entered.set()
        assert go_on.wait(PATIENCE_SECONDS)
        done.set()

    forecaster.start(source, lambda forecast: None)
    assert entered.wait(PATIENCE_SECONDS)
    stopping = threading.Thread(target=forecaster.stop)
    stopping.start()
    go_on.set()
    stopping.join(PATIENCE_SECONDS)
    assert not stopping.is_alive()
    assert done.is_set()


def test_started_twice_is_an_error_and_stopped_it_can_start_again(forecaster: Forecaster) -> None:
    asked = threading.Event()
    forecaster.start(lambda: None, lambda forecast: None)
    with pytest.raises(RuntimeError, match="already running"):
        forecaster.start(lambda: None, lambda forecast: None)
    forecaster.stop()
    forecaster.stop()
    forecaster.start(asked.set, lambda forecast: None)
    assert asked.wait(PATIENCE_SECONDS)
