"""What engines and GPUs say as KPIs of a stretch of time: only where it is known, across restarts and gaps."""

from __future__ import annotations

import math

import pytest

from kavier_twin.scores.observed import Outcome, Reality
from kavier_twin.scores.readings import LONGEST_GAP_SECONDS, EngineReading, GpuReading, Readings, SizeReading
from kavier_twin.simulation.carbon import CarbonIntensity
from kavier_twin.simulation.footprint import Footprint, PowerModel

LIMITS = (0.01, 0.1)
SITE = Footprint(
    power=PowerModel(idle_watts=100.0, max_watts=700.0),
    gpus_per_replica=2,
    pue=1.5,
    carbon=CarbonIntensity(gco2_per_kwh=360.0),
    price_per_gpu_hour=3.6,
)


def engine(time: float, running: float = 2.0, preemptions: float = 0.0, itl: tuple[float, ...] = ()) -> EngineReading:
    return EngineReading(time, running, 1.0, 0.5, preemptions, LIMITS if itl else (), itl)


def test_gauges_are_integrated_and_summed_over_engines() -> None:
    found = Readings()
    for time in range(0, 61, 10):
        found.add("a", engine(time, running=float(time)))  # rises from 0 to 60
        if time >= 30:
            found.add("b", engine(time, running=4.0))  # joined in the middle
    kpis, _, replicas = found.measure(0.0, 60.0)
    assert kpis["requests_running"] == pytest.approx(30.0 + 2.0)
    assert kpis["kv_cache_usage_ratio"] == pytest.approx(0.5)
    assert replicas == pytest.approx(1.5)
    assert found.measure(15.0, 25.0).kpis["requests_running"] == pytest.approx(20.0)


def test_what_nobody_read_is_not_observed() -> None:
    found = Readings()
    for time in (0.0, 10.0, 20.0, 30.0 + LONGEST_GAP_SECONDS, 40.0 + LONGEST_GAP_SECONDS):
        found.add("a", engine(time))
    assert "requests_running" in found.measure(0.0, 20.0).kpis
    assert found.measure(0.0, 40.0 + LONGEST_GAP_SECONDS).kpis == {}  # silent in between
    assert found.measure(200.0, 300.0).kpis == {}
    nothing = Readings().measure(0.0, 10.0)
    assert nothing.kpis == {}
    assert math.isnan(nothing.watts)
    assert math.isnan(nothing.replicas)


def test_counters_go_on_across_a_restart_of_the_process() -> None:
    found = Readings()
    for time, count in ((0.0, 10.0), (10.0, 14.0), (20.0, 1.0), (30.0, 3.0)):  # counts anew after 10 s
        found.add("a", engine(time, preemptions=count))
    assert found.measure(0.0, 30.0).kpis["preemptions"] == pytest.approx(7.0)


def test_inter_token_latency_is_read_from_the_buckets_of_all_engines() -> None:
    found = Readings()
    for time in (0.0, 60.0):
        busy = time > 0.0
        found.add("a", engine(time, itl=(80.0, 100.0, 100.0) if busy else (0.0, 0.0, 0.0)))
        found.add("b", engine(time, itl=(100.0, 100.0, 100.0) if busy else (0.0, 0.0, 0.0)))
    # 180 of 200 at most 10 ms, the other 20 between 10 and 100 ms: the 198th is nine tenths of the way.
    assert found.measure(0.0, 60.0).kpis["itl_p99_seconds"] == pytest.approx(0.01 + 0.9 * 0.09)
    found.add("c", EngineReading(0.0, 0.0, 0.0, 0.0, 0.0, (0.5,), (0.0, 0.0)))
    found.add("c", EngineReading(60.0, 0.0, 0.0, 0.0, 0.0, (0.5,), (1.0, 1.0)))
    assert "itl_p99_seconds" not in found.measure(0.0, 60.0).kpis  # other buckets


def test_a_stretch_is_complete_once_every_engine_was_read_after_it() -> None:
    found = Readings()
    found.add("a", engine(0.0))
    found.add("b", engine(0.0))
    found.add("a", engine(15.0))
    assert not found.complete(10.0)
    found.add("b", engine(15.0))
    assert found.complete(10.0)
    assert found.complete(15.0 + LONGEST_GAP_SECONDS)  # they are gone


def test_memory_is_bounded() -> None:
    found = Readings()
    found.spacing_seconds = 5.0
    for time in range(100):
        found.add("a", engine(float(time)))
    found.add("a", engine(3.0))
    (kept,) = (rows for name, rows in found.save()[1].items() if rows.size)
    assert kept.shape[0] == 20
    found.forget(1e4)
    assert found.measure(0.0, 100.0).kpis == {}


def test_watts_energy_carbon_and_cost_at_the_site() -> None:
    """Two boards of 300 W and 2 replicas of 2 GPUs for 100 s, while 10,000 tokens were served."""
    reality = Reality()
    for number in range(100):
        reality.end(str(number), Outcome(number, math.nan, number + 0.1, number + 0.5, 90, 10, math.nan))
    for time in range(0, 101, 10):
        for board in ("0", "1"):
            reality.readings.add(board, GpuReading(float(time), 1e3, 300.0 * time))  # watts of a moment, joules of all
        for replica in ("0", "1"):
            reality.readings.add(replica, engine(float(time)))
    kpis = reality.measure(0.0, 100.0, SITE)
    assert kpis["power_watts"] == pytest.approx(1.5 * 600.0)
    assert kpis["energy_joules_per_million_tokens"] == pytest.approx(9e4 * 100.0)
    assert kpis["carbon_grams_per_million_tokens"] == pytest.approx(9e4 / 1e4 * 100.0)  # 0.1 g a kilojoule
    assert kpis["cost_per_million_tokens"] == pytest.approx(4 * 100.0 * 0.001 * 100.0)
    assert not {"power_watts", "cost_per_million_tokens"} & reality.measure(0.0, 100.0).keys()


def test_without_samples_watts_are_not_observed_and_the_mirror_tells_the_size() -> None:
    reality = Reality()
    reality.end("a", Outcome(1.0, math.nan, 1.5, 2.0, 100, 11, math.nan))
    for time in range(0, 101, 10):
        reality.readings.add("mirror", SizeReading(float(time), 3.0))
    kpis = reality.measure(0.0, 100.0, SITE)
    assert "power_watts" not in kpis
    assert kpis["cost_per_million_tokens"] == pytest.approx(3 * 2 * 0.1 / 111e-6)
    assert kpis["tpot_p99_seconds"] == pytest.approx(0.05)
