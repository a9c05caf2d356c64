from __future__ import annotations

import numpy as np
import pytest

from forecast.streams import fleet_settings
from kavier_twin.forecast.kpis import measure
from kavier_twin.simulation.carbon import CarbonIntensity
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.footprint import Footprint, PowerModel
from kavier_twin.simulation.kpis import Counters
from kavier_twin.simulation.workload import make_workload


def fleet(arrivals: list[float], prompt: int, output: int, **engine: int) -> Fleet:
    fleet = Fleet(fleet_settings(**({"async_scheduling": False} | engine)))
    fleet.feed(make_workload(arrivals, prompt, output))
    return fleet


def test_a_request_on_its_own() -> None:
    one = fleet([1.0], 100, 11)
    before = Counters.of(one.state, 0.0)
    one.run(10.0)
    kpis = measure(one, before, one.collect(), 0.0)
    step = 0.01 + 1e-4 + 106 * 1e-8
    assert kpis["ttft_p50_seconds"] == kpis["ttft_p99_seconds"] == pytest.approx(0.01 + 100 * 2e-5)
    assert kpis["e2e_p95_seconds"] == pytest.approx(0.012 + 10 * step, rel=1e-3)
    assert kpis["itl_p99_seconds"] == pytest.approx(step, rel=0.02)
    assert kpis["queue_p95_seconds"] == 0.0
    assert kpis["prefix_cache_hit_ratio"] == 0.0
    assert kpis["requests_running"] == pytest.approx(kpis["e2e_p95_seconds"] / 10.0)
    assert kpis["output_tokens_per_second"] == pytest.approx(1.1)
    assert kpis["requests_per_second"] == pytest.approx(0.1)
    assert kpis["requests_rejected"] == kpis["preemptions"] == 0.0


def test_energy_from_now_to_the_horizon() -> None:
    """What was before the scenario began does not count; without a footprint nothing is known."""
    settings = fleet_settings(async_scheduling=False)
    power = PowerModel(idle_watts=100.0, max_watts=700.0)
    footprint = Footprint(power=power, pue=1.0, carbon=CarbonIntensity(gco2_per_kwh=360.0), price_per_gpu_hour=3.6)
    told = Fleet(settings.model_copy(update={"footprint": footprint}))
    told.feed(make_workload([0.0, 20.0], 100, 100))
    told.run(20.0)
    told.collect()
    before = Counters.of(told.state, 20.0)
    told.run(40.0)
    kpis = measure(told, before, told.collect(), 0.0)
    assert 100.0 < kpis["power_watts"] < 200.0
    assert kpis["energy_joules_per_million_tokens"] == pytest.approx(20.0 * kpis["power_watts"] * 1e6 / 200)
    assert kpis["carbon_grams_per_million_tokens"] == pytest.approx(kpis["energy_joules_per_million_tokens"] / 1e4)
    assert kpis["cost_per_million_tokens"] == pytest.approx(0.02 * 1e6 / 200)
    untold = Fleet(settings.model_copy(update={"footprint": None}))
    untold.feed(make_workload([0.0], 100, 10))
    before = Counters.of(untold.state, 0.0)
    untold.run(10.0)
    kpis = measure(untold, before, untold.collect(), 0.0)
    assert np.isnan(kpis["power_watts"])
    assert np.isnan(kpis["cost_per_million_tokens"])


def test_those_who_wait_count_with_their_age() -> None:
    """One slot: while the first request runs, the others wait, and nothing but their age tells."""
    busy = fleet([0.0, 1.0, 2.0], 100, 10_000, max_num_seqs=1)
    before = Counters.of(busy.state, 0.0)
    busy.run(50.0)
    kpis = measure(busy, before, busy.collect(), 0.0)
    assert kpis["ttft_p50_seconds"] == pytest.approx(48.0)
    assert kpis["ttft_p99_seconds"] == pytest.approx(49.0, abs=0.1)
    assert kpis["queue_p95_seconds"] == pytest.approx(49.0, abs=0.2)
    assert kpis["e2e_p95_seconds"] == pytest.approx(50.0, abs=0.2)


def test_the_young_do_not_make_latency_look_better() -> None:
    steady = fleet([0.0, *np.linspace(9.9, 9.99, 50).tolist()], 100, 300)
    before = Counters.of(steady.state, 0.0)
    steady.run(10.0)
    outcomes = steady.collect()
    assert outcomes.size == 1
    latency = float(outcomes["finish"][0] - outcomes["arrival"][0])
    assert measure(steady, before, outcomes, 0.0)["e2e_p95_seconds"] == pytest.approx(latency)


def test_what_happened_before_the_scenario_began_does_not_count() -> None:
    later = fleet([0.0, 20.0], 100, 500)
    later.run(1.0)
    before = Counters.of(later.state, 1.0)
    later.run(30.0)
    kpis = measure(later, before, later.collect(), 0.0)
    assert kpis["ttft_p50_seconds"] == pytest.approx(0.012)  # of the second; the first had its token before
    assert kpis["requests_per_second"] == pytest.approx(2 / 29.0)
    assert kpis["queue_p95_seconds"] == 0.0


def test_queue_time_begins_behind_the_frontend() -> None:
    fleet = Fleet(fleet_settings())
    workload = make_workload([1.0], 100, 5)
    fleet.feed(workload._replace(delivered=workload.arrival + 0.25))
    before = Counters.of(fleet.state, 0.0)
    fleet.run(5.0)
    kpis = measure(fleet, before, fleet.collect(), 0.25)
    assert kpis["queue_p95_seconds"] == pytest.approx(0.0, abs=1e-9)
    assert kpis["ttft_p50_seconds"] == pytest.approx(0.25 + 0.012)


def test_refused_requests_have_no_latency_but_are_counted() -> None:
    refused = fleet([1.0, 1.1], 3_000, 5, num_gpu_blocks=100)
    before = Counters.of(refused.state, 0.0)
    refused.run(5.0)
    kpis = measure(refused, before, refused.collect(), 0.0)
    assert kpis["requests_rejected"] == 2.0
    assert np.isnan(kpis["ttft_p50_seconds"])
    assert kpis["requests_per_second"] == 0.0
