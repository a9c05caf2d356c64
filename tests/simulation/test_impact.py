"""Energy, carbon and cost: units, conservation, and what they grow with."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from effort import examples
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.footprint import Footprint, PowerModel
from kavier_twin.simulation.impact import Impact, impact, impact_of_run
from kavier_twin.simulation.kpis import Counters
from kavier_twin.simulation.power import Reading, alive_seconds, phase_seconds
from kavier_twin.simulation.settings import EngineSettings, FleetSettings, StepTime
from kavier_twin.simulation.workload import Workload, make_workload

STEP_TIME = StepTime(
    fixed=0.01,
    per_prefill_token=1e-5,
    per_decode_sequence=1e-4,
    per_context_token=1e-7,
    per_prefill_attention=1e-9,
    linear_layers=((1, 0.005), (512, 0.006), (8192, 0.096)),
)
POWER = PowerModel(idle_watts=100.0, max_watts=700.0, compute_load=0.9, memory_load=0.4)
HOUR = 3600.0


def fleet_settings(*, replicas: int = 1, step_time: StepTime = STEP_TIME, **footprint: Any) -> FleetSettings:
    return FleetSettings(
        engine=EngineSettings(num_gpu_blocks=2_000),
        step_time=step_time,
        replicas=replicas,
        footprint=Footprint(**({"power": POWER, "pue": 1.0} | footprint)),
    )


def chat(requests: int = 40, gap_seconds: float = 0.5) -> Workload:
    return make_workload([gap_seconds * n for n in range(requests)], 300, 40)


def ran(settings: FleetSettings, workload: Workload, until: float = math.inf) -> Fleet:
    fleet = Fleet(settings)
    fleet.feed(workload)
    fleet.run(until)
    return fleet


def of_run(settings: FleetSettings, workload: Workload, until: float = math.inf) -> Impact:
    found = impact_of_run(ran(settings, workload, until), 0.0)
    assert found is not None
    return found


# --- units --------------------------------------------------------------------------------------------------------


def idle_hour(**footprint: Any) -> Impact:
    """One replica that does nothing for an hour."""
    power = PowerModel(idle_watts=1000.0, max_watts=1000.0)
    fleet = Fleet(fleet_settings(**({"power": power} | footprint)))
    fleet.run(HOUR)
    found = impact_of_run(fleet, 0.0)
    assert found is not None
    return found


def test_one_kilowatt_for_an_hour_is_one_kilowatt_hour() -> None:
    hour = idle_hour(carbon=400.0, price_per_gpu_hour=2.5)
    assert hour.power_watts == pytest.approx(1000.0)
    assert hour.energy_joules == pytest.approx(3.6e6)
    assert hour.carbon_grams == pytest.approx(400.0)  # 400 g/kWh x 1 kWh
    assert (hour.gpu_hours, hour.cost, hour.currency) == (pytest.approx(1.0), pytest.approx(2.5), "EUR")
    assert math.isnan(hour.energy_joules_per_million_tokens)  # there was no token


def test_pue_counts_for_energy_and_carbon_and_not_for_cost() -> None:
    hour = idle_hour(pue=1.5, carbon=400.0, price_per_gpu_hour=2.5)
    assert (hour.power_watts, hour.energy_joules) == (pytest.approx(1500.0), pytest.approx(5.4e6))
    assert (hour.carbon_grams, hour.cost) == (pytest.approx(600.0), pytest.approx(2.5))


def test_gpus_of_a_replica_multiply() -> None:
    one, eight = of_run(fleet_settings(), chat()), of_run(fleet_settings(gpus_per_replica=8), chat())
    for name in ("energy_joules", "energy_prefill_joules", "energy_idle_joules", "carbon_grams", "gpu_hours"):
        assert getattr(eight, name) == pytest.approx(8 * getattr(one, name))


def test_per_million_tokens() -> None:
    """One request of a million tokens in all: what the run took is what a million tokens took."""
    settings = fleet_settings(price_per_gpu_hour=3.0)
    engine = EngineSettings(num_gpu_blocks=70_000, max_model_len=2**21)
    found = of_run(settings.model_copy(update={"engine": engine}), make_workload([0.0], 999_000, 1_000))
    assert found.energy_joules_per_million_tokens == pytest.approx(found.energy_joules)
    assert found.energy_watt_hours_per_million_tokens == pytest.approx(found.energy_joules / 3600.0)
    assert found.energy_joules_per_million_output_tokens == pytest.approx(1000 * found.energy_joules)
    assert found.carbon_grams_per_million_tokens == pytest.approx(found.carbon_grams)
    assert found.cost_per_million_tokens == pytest.approx(found.cost) == pytest.approx(3.0 * found.gpu_hours)


def test_what_is_not_told_is_not_known() -> None:
    untold = of_run(fleet_settings(), chat())
    assert math.isnan(untold.cost)
    assert math.isnan(untold.cost_per_million_tokens)
    stale = of_run(fleet_settings(carbon={"points": [[-HOUR * 10, 100.0]]}), chat())
    assert math.isnan(stale.carbon_grams)
    assert stale.energy_joules == untold.energy_joules
    without = fleet_settings().model_copy(update={"footprint": None})
    assert impact_of_run(ran(without, chat()), 0.0) is None


def test_defaults_are_named_and_only_they() -> None:
    assert len(Footprint(power=PowerModel(idle_watts=1, max_watts=2)).assumed()) == 3
    told = {"power": POWER, "pue": 1.2, "carbon": 100}
    assert Footprint.model_validate(told).assumed() == ()


# --- where the energy goes ----------------------------------------------------------------------------------------


@examples(25)
@given(
    st.lists(st.tuples(st.floats(0.0, 20.0), st.integers(1, 3000), st.integers(1, 100)), min_size=1, max_size=20).map(
        sorted
    ),
    st.integers(1, 3),
    st.floats(0.5, 40.0),
)
def test_energy_is_conserved(requests: list[tuple[float, int, int]], replicas: int, until: float) -> None:
    """The phases add up, to idle power while alive and what busy time draws beyond; no GPU draws above its limit."""
    workload = make_workload(*(list(column) for column in zip(*requests, strict=True)))
    fleet = ran(fleet_settings(replicas=replicas), workload, until)
    found = impact_of_run(fleet, 0.0)
    assert found is not None
    phases = (found.energy_idle_joules, found.energy_prefill_joules, found.energy_decode_joules)
    assert found.energy_joules == pytest.approx(sum(phases) + found.energy_reading_joules)
    assert found.energy_idle_joules == pytest.approx(100.0 * replicas * until)
    assert found.gpu_hours == pytest.approx(replicas * until / HOUR)
    busy = float(fleet.state.replicas["busy_seconds"].sum())
    dynamic = found.energy_joules - found.energy_idle_joules
    assert dynamic <= 600.0 * busy * (1 + 1e-9)
    assert found.energy_joules <= 700.0 * replicas * until * (1 + 1e-9)
    if int(fleet.state.replicas["steps"].sum()) > int(fleet.state.replicas["in_flight"].sum()):
        assert dynamic >= 0.4 * 600.0 * busy * (1 - 1e-9)


def test_stretches_add_up_to_the_whole() -> None:
    fleet = Fleet(fleet_settings(price_per_gpu_hour=1.0))
    fleet.feed(chat())
    readings = [Reading.of(fleet.state, 0.0)]
    for time in np.linspace(0.0, 30.0, 13)[1:]:
        fleet.run(float(time))
        readings.append(Reading.of(fleet.state, float(time)))
    tokens = int(fleet.state.replicas["prompt_tokens"].sum()), int(fleet.state.replicas["output_tokens"].sum())
    pieces, whole = (
        impact(fleet.settings, readings, *tokens),
        impact(fleet.settings, readings[:: len(readings) - 1], *tokens),
    )
    assert pieces is not None
    assert whole is not None
    assert pieces.energy_joules == pytest.approx(whole.energy_joules, rel=0.01)  # a step under way counts in the next
    for name in ("cost", "energy_idle_joules", "gpu_hours"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name))


def test_prefill_draws_more_than_decode() -> None:
    """Prompts without outputs keep the GPU near its limit, outputs without prompts well below."""
    prefill = of_run(fleet_settings(), make_workload([0.0] * 8, 8_000, 1), 0.5)
    decode = of_run(fleet_settings(), make_workload([0.0] * 8, 1, 2_000), 5.0)
    assert prefill.power_watts > 580.0
    assert decode.power_watts < 380.0
    assert decode.energy_reading_joules > 5 * decode.energy_decode_joules
    assert prefill.energy_prefill_joules > 10 * prefill.energy_decode_joules


def test_larger_decode_batches_draw_more_and_cost_less_a_token() -> None:
    small, large = (of_run(fleet_settings(), make_workload([0.0] * n, 1, 2_000), 5.0) for n in (1, 256))
    assert large.power_watts > small.power_watts + 20.0
    assert large.energy_joules_per_million_tokens < 0.02 * small.energy_joules_per_million_tokens


def test_linear_layers_split_into_computing_and_reading() -> None:
    """By hand: eight decodes in a step of 15 ms; 5 ms read the weights while 8 tokens x 11.7 us are computed."""
    step_time = StepTime(fixed=0.01, linear_layers=((1, 0.005), (512, 0.006), (8192, 0.096)))
    settings = fleet_settings(step_time=step_time)
    fleet = Fleet(settings)
    fleet.feed(make_workload([0.0] * 8, 1, 2_000))
    fleet.run(1.0)
    before = Reading.of(fleet.state, 1.0)
    fleet.run(5.0)
    phases = phase_seconds(before, Reading.of(fleet.state, 5.0), step_time)
    step, computing = 0.01 + step_time.linear_seconds(8), 8 * 0.09 / 7680
    assert phases.prefill == 0.0
    assert phases.decode == pytest.approx(4.0 * computing / step, rel=1e-6)
    assert phases.reading == pytest.approx(4.0 * (0.01 + 0.005) / step, rel=1e-6)
    assert phases.busy == pytest.approx(4.0)


def test_a_slower_pace_draws_longer_not_more() -> None:
    """A changed pace stretches every coefficient alike: watts stay, joules grow with time."""
    fast, slow = Fleet(fleet_settings()), Fleet(fleet_settings())
    names = ("fixed", "per_prefill_token", "per_decode_sequence", "per_context_token", "linear_scale")
    for name in names:
        slow.state.engines[name] *= 3.0
    slow.state.engines["per_prefill_attention"] *= 3.0
    found = []
    for fleet, seconds in ((fast, 4.0), (slow, 12.0)):
        fleet.feed(make_workload([0.0] * 4, 300, 10_000))
        fleet.run(seconds)
        found.append(impact_of_run(fleet, 0.0))
    assert found[0] is not None
    assert found[1] is not None
    assert found[1].energy_joules == pytest.approx(3.0 * found[0].energy_joules, rel=0.01)


@cache
def chat_served() -> Fleet:
    return ran(fleet_settings(), chat())


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 500.0), st.floats(0.0, 500.0))
@examples(30)
def test_more_watts_more_joules(compute: float, memory: float, idle: float, above: float) -> None:
    lower = PowerModel(idle_watts=idle, max_watts=idle + above, compute_load=compute / 2, memory_load=memory / 2)
    higher = PowerModel(idle_watts=idle, max_watts=idle + 2 * above, compute_load=compute, memory_load=memory)
    fleet = chat_served()
    last = Reading.of(fleet.state, fleet.now_seconds)
    readings = [last.at_start(fleet.state, 0.0), last]
    low, high = (impact(fleet_settings(power=power), readings, 1000, 100) for power in (lower, higher))
    assert low is not None
    assert high is not None
    assert low.energy_joules <= high.energy_joules
    assert idle <= low.power_watts * (1 + 1e-9)


# --- replicas that come and go ------------------------------------------------------------------------------------


def test_a_replica_counts_while_it_is_there() -> None:
    fleet = Fleet(fleet_settings(replicas=2))
    fleet.at(100.0, Fleet.add)
    fleet.at(200.0, Fleet.let_go, 0)
    fleet.at(300.0, Fleet.crash, 1)
    fleet.run(1000.0)
    assert alive_seconds(fleet.state.replicas, 1000.0) == pytest.approx(200.0 + 300.0 + 900.0)
    assert alive_seconds(fleet.state.replicas, 150.0) == pytest.approx(150.0 + 150.0 + 50.0)


def test_one_that_is_to_leave_counts_until_its_last_request_ended() -> None:
    fleet = Fleet(fleet_settings(replicas=2))
    fleet.feed(make_workload([0.0, 0.0], 100, 1_000))
    fleet.at(1.0, Fleet.let_go, 0)
    fleet.run(2.0)
    assert alive_seconds(fleet.state.replicas, 2.0) == pytest.approx(4.0)
    fleet.run(1000.0)
    ended = float(fleet.state.replicas["last_completion"][0])
    assert 10.0 < ended < 100.0
    assert alive_seconds(fleet.state.replicas, 1000.0) == pytest.approx(1000.0 + ended)


def test_a_policy_with_fewer_replicas_costs_less() -> None:
    found = {}
    for replicas in (1, 2, 4):
        fleet = Fleet(fleet_settings(replicas=2, price_per_gpu_hour=2.0))
        before = Counters.of(fleet.state, 0.0)
        fleet.apply({"replicas": replicas})
        fleet.feed(chat())
        fleet.run(60.0)
        after = Counters.of(fleet.state, 60.0)
        found[replicas] = impact(fleet.settings, [before.reading, after.reading], after.prompt_tokens, 1)
    costs = [value.cost for value in found.values() if value is not None]
    assert costs == pytest.approx([2.0 * n * 60.0 / HOUR for n in (1, 2, 4)])
    joules = [value.energy_joules for value in found.values() if value is not None]
    assert joules == sorted(joules)


# --- carbon over time ---------------------------------------------------------------------------------------------


def test_carbon_follows_the_hour() -> None:
    """The stream begins at 23:30 UTC: half an hour at 230 g, half an hour at 0 g."""
    schedule = {"by_hour_utc": [float(10 * hour) for hour in range(24)]}
    hour = idle_hour(carbon=schedule, time_zero=datetime(2026, 1, 31, 23, 30, tzinfo=UTC))
    assert hour.carbon_grams == pytest.approx(115.0)


def test_samples_let_carbon_follow_the_load() -> None:
    """All work lies in the first half hour, which is clean: a single mean intensity would charge it half."""
    settings_ = fleet_settings(
        power=PowerModel(idle_watts=0.0, max_watts=700.0), carbon={"points": [[0, 0.0], [1800, 100.0]]}
    )
    sampled, coarse = Fleet(settings_), Fleet(settings_)
    sampled.sample_every(60.0)
    grams = []
    for fleet in (sampled, coarse):
        fleet.feed(chat())
        fleet.run(HOUR)
        found = impact_of_run(fleet, 0.0)
        assert found is not None
        grams.append(found.carbon_grams)
    assert grams[0] == 0.0
    assert grams[1] > 0.0


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"power": {"idle_watts": 100.0}}, "max_watts"),
        ({"power": {"idle_watts": 100.0, "max_watts": 50.0}}, "below idle_watts"),
        ({"power": {"idle_watts": 1.0, "max_watts": 2.0, "compute_load": 1.5}}, "compute_load"),
        ({"power": POWER, "pue": 0.9}, "pue"),
        ({"power": POWER, "currency": "Euro"}, "currency"),
        ({"power": POWER, "gpus_per_replica": 0}, "gpus_per_replica"),
        ({"power": POWER, "time_zero": "2026-01-31T00:00:00"}, "time_zero"),
        ({"pue": 1.2}, "power"),
    ],
)
def test_what_is_no_footprint_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Footprint.model_validate(wrong)


def test_policies_keep_the_footprint() -> None:
    fleet = Fleet(fleet_settings())
    fleet.apply({"max_num_seqs": 2, "kv_cache_dtype": "fp8"})
    assert fleet.settings.footprint == fleet_settings().footprint
