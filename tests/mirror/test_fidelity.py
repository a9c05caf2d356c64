"""What errors amount to over windows of event time, and which KPIs are trusted for it."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from kavier_twin.mirror.fidelity.trust import MAX_ERROR, REGAINED_BELOW, Judge, TrustSettings
from kavier_twin.mirror.fidelity.windows import BUCKET_SECONDS, Windows, WindowScore
from kavier_twin.mirror.mirror import Mirror, MirrorSettings
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.telemetry import EngineSample, RequestSeen

FLEET = FleetSettings(engine=EngineSettings(num_gpu_blocks=400), step_time=StepTime(fixed=0.015))


def score_of(windows: Windows, now: float, kpi: str, statistic: str, window: str) -> WindowScore | None:
    found = [s for s in windows.scores(now) if (s.kpi, s.statistic, s.window) == (kpi, statistic, window)]
    return found[0] if found else None


def test_quantiles_are_exact_to_a_bin_and_means_exactly() -> None:
    rng = np.random.default_rng(1)
    predicted, observed = rng.lognormal(-2.0, 1.0, (2, 5000))
    windows = Windows()
    for number, (a, b) in enumerate(zip(predicted.tolist(), observed.tolist(), strict=True)):
        windows.add("ttft_seconds", 1e9 + number * 0.05, a, b)
    now = 1e9 + 250.0
    mean = score_of(windows, now, "ttft_seconds", "mean", "5m")
    assert mean is not None
    assert mean.predicted == pytest.approx(predicted.mean(), rel=1e-9)
    assert mean.error == pytest.approx(predicted.mean() / observed.mean() - 1.0)
    for statistic, share in (("p50", 0.5), ("p99", 0.99)):
        found = score_of(windows, now, "ttft_seconds", statistic, "5m")
        assert found is not None
        assert found.observed == pytest.approx(np.quantile(observed, share), rel=0.03)


def test_the_share_of_exact_pairs_is_of_the_last_hour() -> None:
    windows = Windows()
    assert np.isnan(windows.exact_ratio("prefix_cache_hit_ratio", -np.inf))
    for second in range(0, 7200, 60):
        windows.add("prefix_cache_hit_ratio", second, 16.0, 16.0 if second < 3600 or second % 240 else 17.0, 100.0)
        if second == 3540:
            assert windows.exact_ratio("prefix_cache_hit_ratio", 3599.0) == 1.0
    assert windows.exact_ratio("prefix_cache_hit_ratio", 7199.0) == pytest.approx(0.75, abs=0.01)
    assert np.isnan(windows.exact_ratio("prefix_cache_hit_ratio", 20_000.0))


def test_windows_forget() -> None:
    windows = Windows()
    for minute in range(600):
        windows.add("e2e_seconds", 60.0 * minute, 2.0 if minute < 590 else 1.0, 1.0)
    now = 60.0 * 599
    short, long = (score_of(windows, now, "e2e_seconds", "mean", window) for window in ("5m", "1h"))
    assert short is not None
    assert long is not None
    assert short.error == 0.0
    assert 0.7 < long.error < 0.9
    assert len(windows.save()["buckets"]) <= 3600 / BUCKET_SECONDS + 1
    assert windows.scores(now + 7200.0) == ()


def test_the_course_of_the_last_hour() -> None:
    """Each stretch holds what ended in it, exactly once, whatever was told of it before more came."""
    windows = Windows(10.0)
    for second in range(5000):
        if not 4000 <= second < 4020:  # nobody asked anything
            windows.add("ttft_seconds", second, 1.0 if second < 4500 else 3.0, 1.0)
            windows.add_end(second + 0.5, second, 10)
    course = windows.course(4996.0)
    assert len(course) == 361
    assert [stretch.until_seconds for stretch in course[-3:]] == [4980.0, 4990.0, 4996.0]
    by_end = {stretch.until_seconds: stretch.values for stretch in course}
    assert by_end[4010.0] == by_end[4020.0] == {}
    assert by_end[4500.0]["ttft_seconds", "mean"] == (1.0, 1.0)
    assert by_end[4510.0]["ttft_seconds", "p99"] == pytest.approx((3.0, 1.0), rel=0.01)
    assert by_end[4500.0]["requests_per_second", ""] == (1.0, 1.0)
    assert ("requests_per_second", "") not in by_end[4996.0]  # it is not over
    windows.add("ttft_seconds", 4985.0, 3.0, 12.0)  # a late record
    late = {stretch.until_seconds: stretch.values for stretch in windows.course(4996.0)}
    assert late[4990.0]["ttft_seconds", "mean"][1] == pytest.approx(2.0)
    assert not any(stretch.values for stretch in windows.course(4996.0 + 7200.0))


def test_a_fork_and_its_origin_go_their_own_ways() -> None:
    windows = Windows()
    windows.add("e2e_seconds", 0.0, 1.0, 1.0)
    fork = windows.fork()
    windows.add("e2e_seconds", 1.0, 3.0, 1.0)
    fork.add("e2e_seconds", 1.0, 5.0, 1.0)
    means = [score_of(each, 2.0, "e2e_seconds", "mean", "5m") for each in (windows, fork)]
    assert [mean and mean.predicted for mean in means] == [2.0, 3.0]
    again = Windows()
    again.restore(fork.save())
    assert again.scores(2.0) == fork.scores(2.0)


def test_throughput_counts_requests_when_they_were_to_end() -> None:
    windows = Windows()
    for second in range(300):
        windows.add_end(second * 1.25, float(second), 10)
    found = score_of(windows, 300.0, "requests_per_second", "", "5m")
    assert found is not None
    assert found.observed == pytest.approx(1.0)
    assert found.error == pytest.approx(-0.2, abs=0.05)


def judged(judge: Judge, error: float, count: int = 1000) -> bool:
    judge.judge([WindowScore("e2e_seconds", "mean", "5m", count, 1.0 + error, 1.0, error)])
    return judge.trust["e2e_seconds"].trusted


def test_trust_is_lost_at_the_bound_and_won_back_below_it() -> None:
    judge = Judge(TrustSettings(max_error={"e2e_seconds": 0.1}))
    assert "nothing observed" in judge.trust["e2e_seconds"].reason
    assert not judged(judge, 0.0, count=5)
    assert "too few" in judge.trust["e2e_seconds"].reason
    between = 0.5 * (REGAINED_BELOW + 1.0) * 0.1
    assert judged(judge, between)
    assert not judged(judge, -0.11)
    assert "-11 %" in judge.trust["e2e_seconds"].reason
    assert not judged(judge, between)
    assert judged(judge, 0.05)
    assert judged(judge, between)
    # What nobody observes goes with its stand-in; what has none is not trusted.
    assert judge.trust["requests_running"].trusted
    assert not judge.trust["power_watts"].trusted


def test_a_small_difference_of_something_small_is_no_concern() -> None:
    judge = Judge(TrustSettings())
    judge.judge([WindowScore("queue_seconds", "mean", "5m", 100, 0.001, 0.004, -0.75)])
    assert judge.trust["queue_seconds"].trusted


def test_bounds_are_checked() -> None:
    with pytest.raises(ValidationError, match="no KPI 'ttft'"):
        TrustSettings(max_error={"ttft": 0.1})
    assert TrustSettings(max_error={"ttft_seconds": 1.0}).max_error == {**MAX_ERROR, "ttft_seconds": 1.0}


def test_engine_gauges_are_compared_at_their_own_time() -> None:
    """Samples that come long after their time, in any order, are held against the mirror as it was then."""
    mirror = Mirror(MirrorSettings(), FLEET)
    for number in range(3):
        mirror.ingest(RequestSeen(id=str(number), time_seconds=100.2 + 20.0 * number, prompt_tokens=50))
    mirror.advance(170.0)
    for time, running in ((150.4, 3), (130.4, 2), (110.4, 1)):
        mirror.ingest(EngineSample(time_seconds=time, requests_running=running, requests_waiting=0))
    mirror.ingest(EngineSample(time_seconds=190.0, requests_running=7))  # its time has not come yet
    mirror.advance(180.0)
    found = {score.kpi: score for score in mirror.scores if score.window == "5m"}
    assert (found["requests_running"].observations, found["requests_running"].observed) == (3, 2.0)
    assert found["requests_running"].error == 0.0
    assert found["requests_waiting"].predicted == 0.0
    mirror.advance(210.0)
    found = {score.kpi: score for score in mirror.scores if score.window == "5m"}
    assert found["requests_running"].observations == 4
