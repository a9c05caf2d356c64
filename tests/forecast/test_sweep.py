from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import pytest

from forecast.streams import between, chat_stream, empty_snapshot, fleet_settings, snapshot_at, state_bytes
from kavier_twin.forecast.executors import Cancelled, ThreadExecutor, never
from kavier_twin.forecast.result import Forecast, Row
from kavier_twin.forecast.settings import ForecastSettings
from kavier_twin.forecast.slo import Slo
from kavier_twin.forecast.sweep import OutOfTime, sweep, sweep_within, trending
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.kpi_table import METRICS
from kavier_twin.simulation.policies import DEFAULT_POLICIES, Policy
from kavier_twin.simulation.workload import Workload

TODAY = Policy(name="today")
HALF = Policy(name="half", overrides={"num_gpu_blocks": "0.5x"})
UNCACHED = Policy(name="uncached", overrides={"prefix_caching": False})


@pytest.fixture(scope="module")
def stream() -> Workload:
    return chat_stream(1, 200.0)


@pytest.fixture(scope="module")
def snapshot(stream: Workload) -> Snapshot:
    """Two replicas whose caches are too small for the stream, with requests in flight that nobody ended yet."""
    return snapshot_at(stream, fleet_settings(replicas=2, num_gpu_blocks=500), 150.0, 100.0, frontend=0.03, held=True)


def settings_of(policies: tuple[Policy, ...], **given: Any) -> ForecastSettings:
    settings = {"horizons_seconds": (20.0, 60.0), "scenarios": 2, "slos": ()} | given
    return ForecastSettings(policies=policies, **settings)


def run(snapshot: Snapshot, policies: tuple[Policy, ...] = (TODAY,), workers: int = 1, **given: Any) -> Forecast:
    return sweep(snapshot, settings_of(policies, **given), ThreadExecutor(workers))


def row(forecast: Forecast, policy: str, horizon: float) -> Row:
    (found,) = [row for row in forecast.rows if (row.policy, row.horizon_seconds) == (policy, horizon)]
    return found


def test_a_row_for_every_policy_and_horizon(snapshot: Snapshot) -> None:
    forecast = run(snapshot, DEFAULT_POLICIES)
    wanted = [(policy.name, horizon) for policy in DEFAULT_POLICIES for horizon in (20.0, 60.0)]
    assert [(row.policy, row.horizon_seconds) for row in forecast.rows] == wanted
    for row in forecast.rows:
        assert tuple(row.kpis) == METRICS
        for quantiles in row.kpis.values():
            assert list(quantiles.values) == [0.05, 0.1, 0.5, 0.9, 0.95]
            assert sorted(quantiles.values.values()) == list(quantiles.values.values())
    assert forecast.rate_requests_per_second == pytest.approx(snapshot.recent.index.size / 100.0, rel=0.05)
    assert forecast.time_seconds == 150.0
    json.dumps(forecast.to_dict(), allow_nan=False)


def test_results_do_not_depend_on_the_number_of_workers(snapshot: Snapshot) -> None:
    texts = {json.dumps(run(snapshot, DEFAULT_POLICIES, workers).to_dict()) for workers in (1, 2, 5)}
    assert len(texts) == 1


def test_results_depend_on_the_seed(snapshot: Snapshot) -> None:
    assert run(snapshot, seed=1).rows == run(snapshot, seed=1).rows
    assert run(snapshot, seed=1).rows != run(snapshot, seed=2).rows


def test_the_snapshot_stays_as_it_is(snapshot: Snapshot) -> None:
    fleet, before = snapshot.fleet, state_bytes(snapshot.fleet)
    recent = [column.copy() for column in snapshot.recent]
    run(snapshot, DEFAULT_POLICIES, 2)
    assert state_bytes(snapshot.fleet) == before
    assert (fleet.now_seconds, fleet.settings.engine.num_gpu_blocks) == (150.0, 500)
    assert all(np.array_equal(a, b) for a, b in zip(snapshot.recent, recent, strict=True))


def test_what_ended_before_is_not_of_the_scenario(stream: Workload) -> None:
    fleet = Fleet(fleet_settings())
    fleet.feed(between(stream, 0.0, 50.0))
    fleet.run(50.0)
    collected = fleet.fork()
    assert collected.collect().size > 50
    recent = between(stream, 0.0, 50.0)
    snapshots = [Snapshot("default", 50.0, each, recent, 50.0, 0.0, calibrated=True) for each in (fleet, collected)]
    assert run(snapshots[0]).rows == run(snapshots[1]).rows


def test_horizons_of_one_run_equal_runs_of_their_own(snapshot: Snapshot) -> None:
    together = run(snapshot, (TODAY, HALF), horizons_seconds=(10.0, 25.0, 60.0))
    for horizon in (10.0, 25.0, 60.0):
        alone = run(snapshot, (TODAY, HALF), horizons_seconds=(horizon,))
        for policy in ("today", "half"):
            a, b = row(together, policy, horizon), row(alone, policy, horizon)
            for metric in METRICS:
                assert a.kpis[metric].p50 == pytest.approx(b.kpis[metric].p50, rel=1e-6, nan_ok=True), metric


def test_less_cache_hits_less_and_none_hits_nothing(snapshot: Snapshot) -> None:
    forecast = run(snapshot, (TODAY, HALF, UNCACHED))
    for horizon in (20.0, 60.0):
        ratios = [row(forecast, name, horizon).kpis["prefix_cache_hit_ratio"] for name in ("today", "half", "uncached")]
        assert ratios[0].p50 > ratios[1].p50 + 0.02
        assert ratios[1].p50 > ratios[2].values[0.95] == 0.0
    assert row(forecast, "uncached", 60.0).kpis["ttft_p50_seconds"].p50 > (
        row(forecast, "today", 60.0).kpis["ttft_p50_seconds"].p50
    )


def test_breach_probability_is_the_share_of_scenarios_that_breach(snapshot: Snapshot) -> None:
    """Of the four of six whose load is not trending."""
    median = row(run(snapshot, scenarios=6), "today", 60.0).kpis["e2e_p95_seconds"].p50
    slos = (
        Slo(name="never", metric="ttft_p99_seconds", threshold=1e6),
        Slo(name="always", metric="prefix_cache_hit_ratio", threshold=1.0),
        Slo(name="half", metric="e2e_p95_seconds", threshold=median),
    )
    forecast = run(snapshot, scenarios=6, slos=slos)
    assert row(forecast, "today", 60.0).breach_probability == {"never": 0.0, "always": 1.0, "half": 0.5}


def test_a_policy_that_cannot_be_is_told_and_the_rest_goes_on(snapshot: Snapshot) -> None:
    impossible = Policy(name="impossible", overrides={"num_gpu_blocks": 0})
    unknown = Policy(name="unknown", overrides={"color": "red"})
    forecast = run(snapshot, (impossible, TODAY, unknown))
    assert {row.policy for row in forecast.rows} == {"today"}
    assert [failed.policy for failed in forecast.failed] == ["impossible", "unknown"]
    assert "num_gpu_blocks" in forecast.failed[0].error
    assert "color" in forecast.failed[1].error
    assert forecast.rows == run(snapshot).rows


def test_nothing_in_sight() -> None:
    slo = Slo(name="hits", metric="prefix_cache_hit_ratio", threshold=0.5)
    forecast = run(empty_snapshot(), DEFAULT_POLICIES, slos=(slo,))
    assert forecast.rate_requests_per_second == 0.0
    for entry in forecast.rows:
        assert entry.kpis["output_tokens_per_second"].p50 == 0.0
        assert math.isnan(entry.kpis["ttft_p99_seconds"].p50)
        assert entry.breach_probability == {"hits": 0.0}
    plain = forecast.to_dict()
    assert plain["rows"][0]["kpis"]["ttft_p99_seconds"] == {
        "values": dict.fromkeys(("0.05", "0.1", "0.5", "0.9", "0.95"))
    }
    assert plain["verdict"]["policy"] == "today"


def test_an_executor_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="workers=0"):
        ThreadExecutor(0)


def test_an_executor_hands_errors_on() -> None:
    with pytest.raises(ZeroDivisionError):
        list(ThreadExecutor(2).run(lambda number, _: 1 // number, [1, 0, 2]))


def test_closing_cancels_what_nobody_waits_for() -> None:
    """The first result is taken, the rest is given up: tasks under way see it, others never begin."""
    begun, waiting = [], threading.Event()

    def wait(number: int, cancelled: Cancelled) -> int:
        begun.append(number)
        while number and not cancelled():
            waiting.wait(0.001)
        return number

    results = ThreadExecutor(1).run(wait, range(100))
    assert next(results) == 0
    results.close()
    assert len(begun) <= 3


def test_more_scenarios_only_where_they_are_needed(snapshot: Snapshot) -> None:
    """Without a cache it is clear at once who is better; what nobody can tell apart needs no more scenarios either."""
    clear = run(snapshot, (TODAY, UNCACHED, Policy(name="same", overrides={"max_num_seqs": 1000})), scenarios=12)
    assert clear.stopped_because == "certain"
    assert clear.scenarios < 12
    assert clear.verdict.policy == "today"
    noisy = run(snapshot, (TODAY, HALF), scenarios=5, certainty=0.999999)
    assert (noisy.stopped_because, noisy.scenarios) == ("all_scenarios", 5)
    assert "3 scenario(s)" in noisy.notes[0]
    assert run(snapshot, scenarios=14, least_scenarios=14, quantiles=(0.1, 0.9)).notes == ()


class Clocked:
    """An executor on which every simulation takes a second of a clock that nothing else moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("kavier_twin.forecast.sweep.time.time", lambda: self.now)

    def run(
        self, function: Callable[[Any, Cancelled], Any], tasks: Iterable[Any], cancelled: Cancelled = never
    ) -> Generator[Any, None, None]:
        for task in tasks:
            found = function(task, cancelled)
            self.now += found is not None
            yield found


@pytest.mark.parametrize(
    ("seconds", "scenarios", "shed"),
    [
        (100.0, 6, []),  # 3 policies, 6 scenarios and a restart in 6
        (13.5, 4, []),
        (9.0, 4, ["uncached"]),  # the last is the least important
        (5.5, 4, ["half", "uncached"]),
        (2.5, 1, []),
        (0.0, 1, ["half", "uncached"]),  # one scenario of today's in any case
    ],
)
def test_what_there_is_no_time_for_is_left_out(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, seconds: float, scenarios: int, shed: list[str]
) -> None:
    settings = settings_of((TODAY, HALF, UNCACHED), scenarios=6, least_scenarios=4, certainty=0.999999)
    with monkeypatch.context() as clocked:
        forecast = sweep_within(snapshot, settings, Clocked(clocked), seconds)
    assert (forecast.scenarios, list(forecast.shed)) == (scenarios, shed)
    assert forecast.stopped_because == ("all_scenarios" if scenarios == 6 else "time")
    assert {row.policy for row in forecast.rows} == {"today", "half", "uncached"} - {*shed}
    whole = sweep(snapshot, settings.model_copy(update={"scenarios": scenarios}), ThreadExecutor(1))
    assert [row for row in whole.rows if row.policy not in shed] == list(forecast.rows)


@pytest.mark.parametrize("looks", [0, 7])
def test_a_sweep_cancelled_has_nothing_to_tell(snapshot: Snapshot, looks: int) -> None:
    """Not even of the scenarios that were simulated before: nobody waits for them, and no policy was shed."""
    looked = itertools.count()
    with pytest.raises(OutOfTime):
        sweep(snapshot, settings_of((TODAY, HALF)), ThreadExecutor(1), lambda: next(looked) >= looks)


def test_the_first_breach_is_found_inside_a_run(snapshot: Snapshot) -> None:
    """More requests than one replica can serve one by one: the queue grows until the objective is broken."""
    slow = Policy(name="slow", overrides={"replicas": 1, "max_num_seqs": 1})
    slos = (Slo(name="queue", metric="queue_p95_seconds", threshold=15.0),)
    forecast = run(snapshot, (TODAY, slow), slos=slos, horizons_seconds=(10.0, 120.0))
    today, broken = forecast.first_breaches
    assert (today.policy, today.early_seconds) == ("today", math.inf)
    assert 10.0 < broken.early_seconds <= broken.expected_seconds < 120.0
    assert broken.expected_seconds % 10.0 == 0.0
    assert (today.probability, broken.probability) == (0.0, 1.0)
    assert row(forecast, "today", 120.0).scenarios == sum(not trending(number) for number in range(forecast.scenarios))
    assert forecast.to_dict()["first_breaches"][0]["expected_seconds"] is None
    assert row(forecast, "slow", 10.0).breach_probability["queue"] == 0.0
    assert row(forecast, "slow", 120.0).breach_interval["queue"][0] > 0.0
