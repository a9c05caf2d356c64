from __future__ import annotations

import threading

import pytest

from forecast.streams import chat_stream, empty_snapshot, fleet_settings, snapshot_at, state_bytes
from kavier_twin.forecast.executors import ThreadExecutor
from kavier_twin.forecast.settings import ForecastSettings
from kavier_twin.forecast.slo import Slo
from kavier_twin.forecast.sweep import sweep
from kavier_twin.forecast.whatif import Answer, Busy, NothingYet, Question, WhatIf, answer
from kavier_twin.mirror.snapshot import Snapshot
from kavier_twin.simulation.policies import Policy, PolicyError

PATIENCE_SECONDS = 60.0
SLOS = (Slo(name="hits", metric="prefix_cache_hit_ratio", threshold=1.0),)


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return snapshot_at(chat_stream(1, 160.0), fleet_settings(num_gpu_blocks=500), 150.0, 100.0, held=True)


def ask(snapshot: Snapshot, **question: object) -> Answer:
    given = {"horizon_seconds": 60.0, "scenarios": 2, "budget_seconds": 60.0} | question
    return answer(snapshot, Question.model_validate(given), SLOS, ThreadExecutor(2))


def test_the_same_figures_as_a_forecast(snapshot: Snapshot) -> None:
    """Today's policy and the one asked about, on the scenarios that a cycle with the same seed draws: those whose load
    is not trending."""
    before = state_bytes(snapshot.fleet)
    found = ask(snapshot, overrides={"num_gpu_blocks": "0.5x"}, scenarios=3, seed=4)
    policies = (Policy(name="today"), Policy(name="half", overrides={"num_gpu_blocks": "0.5x"}))
    settings = ForecastSettings(policies=policies, horizons_seconds=(60.0,), scenarios=4, seed=4, slos=SLOS)
    forecast = sweep(snapshot, settings, ThreadExecutor(1))
    assert [case.name for case in found.cases] == ["today", "asked"]
    for case, row in zip(found.cases, forecast.rows, strict=True):
        assert {metric: spread.p50 for metric, spread in case.kpis.items()} == {
            metric: quantiles.p50 for metric, quantiles in row.kpis.items()
        }
        assert case.breach_probability == row.breach_probability
    assert found.scenarios == 3
    assert found.vllm_flags == ("--num-gpu-blocks-override 250",)
    assert state_bytes(snapshot.fleet) == before


def test_more_load_is_more_work_and_more_replicas_share_it(snapshot: Snapshot) -> None:
    found = ask(snapshot, overrides={"replicas": 2}, load=3.0)
    assert [(case.name, case.load) for case in found.cases] == [("today", 1.0), ("today_at_load", 3.0), ("asked", 3.0)]
    now, loaded, asked = (case.kpis for case in found.cases)
    assert loaded["requests_per_second"].p50 > 2.0 * now["requests_per_second"].p50  # type: ignore[operator]
    assert loaded["requests_running"].p50 > 2.0 * now["requests_running"].p50  # type: ignore[operator]
    assert asked["itl_p99_seconds"].p50 < loaded["itl_p99_seconds"].p50  # type: ignore[operator]
    assert not found.deployable
    assert "replicas=2" in found.hypothetical_reasons[0]


def test_fp8_means_more_blocks_in_the_same_memory(snapshot: Snapshot) -> None:
    today, asked = ask(snapshot, overrides={"kv_cache_dtype": "fp8"}).cases
    assert asked.kpis["prefix_cache_hit_ratio"].p50 > today.kpis["prefix_cache_hit_ratio"].p50 + 0.02  # type: ignore[operator]
    assert ask(snapshot, overrides={"kv_cache_dtype": "fp8"}).vllm_flags == ("--kv-cache-dtype fp8",)


def test_nothing_asked_is_today_alone(snapshot: Snapshot) -> None:
    assert [case.name for case in ask(snapshot).cases] == ["today"]


def test_what_was_not_observed_is_null() -> None:
    found = ask(empty_snapshot())
    assert found.cases[0].kpis["ttft_p99_seconds"].p50 is None
    assert Answer.model_validate_json(found.model_dump_json()) == found


def test_what_cannot_be_is_told(snapshot: Snapshot) -> None:
    with pytest.raises(PolicyError, match="unknown policy setting 'color'"):
        ask(snapshot, overrides={"color": "red"})
    with pytest.raises(NothingYet):
        WhatIf(lambda: None, SLOS, 1).ask(Question())


def test_questions_queue_within_a_limit(snapshot: Snapshot) -> None:
    """While one is answered another waits; a third is refused; afterwards there is room again."""
    entered, go_on = threading.Event(), threading.Event()

    def source() -> Snapshot:
        entered.set()
        assert go_on.wait(PATIENCE_SECONDS)
        return snapshot

    what_if = WhatIf(source, SLOS, 1, most_waiting=1)
    answers: list[Answer] = []
    question = Question(horizon_seconds=5.0)
    asking = [threading.Thread(target=lambda: answers.append(what_if.ask(question))) for _ in range(2)]
    asking[0].start()
    assert entered.wait(PATIENCE_SECONDS)
    asking[1].start()
    while what_if.asked < 2:
        asking[1].join(0.001)
    with pytest.raises(Busy, match="1 questions wait"):
        what_if.ask(question)
    go_on.set()
    for thread in asking:
        thread.join(PATIENCE_SECONDS)
    assert len(answers) == 2
    assert what_if.asked == 0
    assert what_if.ask(question).cases == answers[0].cases
