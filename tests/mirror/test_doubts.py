"""What takes trust at once, and gives it back."""

from __future__ import annotations

import math

import pytest

from kavier_twin.mirror.fidelity.doubts import LATE_SECONDS, Doubts
from kavier_twin.mirror.fidelity.gauges import Pair
from kavier_twin.mirror.fidelity.trust import MAX_ERROR
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import EngineSample, RequestSeen


def scraped(doubts: Doubts, kpi: str, *rounds: tuple[float, float], engines: int = 1) -> list[bool]:
    """Whether there was a doubt after each round; a round is known to be over when the next begins."""
    found = []
    for number, (mirrored, observed) in enumerate(rounds):
        doubts.gauges(Pair(kpi, float(number), mirrored, observed, f"/{engine}/0") for engine in range(engines))
        found.append(bool(doubts.reasons()))
    return found


def test_gauges_that_contradict_twice_and_then_agree() -> None:
    doubts = Doubts(MAX_ERROR)
    right, wrong = (100.0, 98.0), (4.0, 98.0)
    assert scraped(doubts, "requests_waiting", right, wrong, right, wrong, wrong, wrong, right, right) == [
        *(False, False, False, False, False),
        *(True, True, False),
    ]


@pytest.mark.parametrize(
    ("kpi", "mirrored", "observed", "doubted"),
    [
        ("requests_waiting", 0.0, 2.0, False),  # the engine and its records are cut at different moments
        ("requests_waiting", 0.0, 4.0, True),
        ("requests_waiting", 51.0, 100.0, False),  # within the bound
        ("requests_waiting", 49.0, 100.0, True),
        ("requests_running", 200.0, 100.0, True),
        ("kv_cache_usage_ratio", 0.5, 0.59, False),
        ("kv_cache_usage_ratio", 0.5, 0.65, True),
    ],
)
def test_how_far_gauges_must_be_off(kpi: str, mirrored: float, observed: float, doubted: bool) -> None:
    doubts = Doubts(MAX_ERROR)
    scraped(doubts, kpi, *3 * [(mirrored, observed)])
    assert bool(doubts.reasons()) == doubted
    assert all(reason.startswith(kpi) for reason in doubts.reasons())


def test_of_several_engines_the_mean_counts() -> None:
    doubts = Doubts(MAX_ERROR)
    for _ in range(4):
        doubts.gauges(
            [Pair("requests_waiting", 0.0, 10.0, 0.0, "/a/0"), Pair("requests_waiting", 0.0, 10.0, 20.0, "/b/0")]
        )
    assert not doubts.reasons()


def test_late_records() -> None:
    doubts = Doubts(MAX_ERROR)
    doubts.records(0.0, {"accepted": 1000, "late": 100})
    doubts.records(10.0, {"accepted": 1100, "late": 102})
    assert not doubts.reasons()
    doubts.records(20.0, {"accepted": 1150, "late": 112})
    assert doubts.reasons() == ["7% of the records came too late to be applied (mirror.late_seconds)"]
    doubts.records(21.0 + LATE_SECONDS, {"accepted": 1350, "late": 112})
    doubts.records(22.0 + LATE_SECONDS, {"accepted": 1450, "late": 112})
    assert not doubts.reasons()


@pytest.mark.parametrize(("per_second", "doubted"), [(2, False), (1, True)])
def test_coverage_of_a_stream(per_second: int, doubted: bool) -> None:
    """Half of the traffic passes the tap by; what engines count tells so."""
    engine = EngineSettings(num_gpu_blocks=1_000, max_num_seqs=64)
    mirror = Mirror(MirrorSettings(), FleetSettings(engine=engine, step_time=StepTime(fixed=0.01)))
    for second in range(0, 300):
        for number in range(per_second):
            mirror.ingest(RequestSeen(id=f"{second}-{number}", time_seconds=float(second), prompt_tokens=10, pod="a"))
        if second % 5 == 0:
            mirror.ingest(
                EngineSample(
                    time_seconds=float(second),
                    pod="a",
                    requests_running=0.0,
                    requests_waiting=0.0,
                    requests_finished_by_reason={"stop": 2.0 * second},
                )
            )
        mirror.advance(float(second))
    assert mirror.doubts.coverage_ratio == pytest.approx(per_second / 2, abs=0.05)
    assert any("of the requests that the engines received" in reason for reason in mirror.doubts.reasons()) == doubted


def test_without_metrics_nobody_knows_the_coverage() -> None:
    assert math.isnan(Doubts(MAX_ERROR).coverage_ratio)
