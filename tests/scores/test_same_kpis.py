"""What really happened is measured as what was simulated: of the same requests both sides give the same KPIs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from effort import examples
from forecast.streams import chat_stream, fleet_settings
from kavier_twin.forecast.kpis import measure
from kavier_twin.scores.observed import Outcome, Reality
from kavier_twin.simulation.fleet import Fleet
from kavier_twin.simulation.kpi_table import KPIS, METRICS, STATISTICS
from kavier_twin.simulation.kpis import Counters, kpis
from kavier_twin.simulation.state import FINISHED, Records

SECONDS = 40.0  # of arrivals
# What follows from records of requests. The rest is vLLM's counters and gauges: they know when a request was preempted,
# and when each of its tokens came.
RECORDED = [metric for metric in METRICS if KPIS[STATISTICS[metric].kpi].interval is not None]
RECORDED += ["requests_per_second", "prefix_cache_hit_ratio"]
UNTIL_SCHEDULED = {*KPIS["queue_seconds"].metrics, "prefix_cache_hit_ratio"}

stretches = st.tuples(st.floats(0.0, 0.9 * SECONDS), st.floats(0.5, SECONDS)).map(lambda ends: (ends[0], sum(ends)))
engines = st.fixed_dictionaries(
    {
        "max_num_seqs": st.sampled_from([2, 4, 64]),
        "num_gpu_blocks": st.sampled_from([160, 400, 2_000]),
        "async_scheduling": st.booleans(),
    }
)


def fleet_of(
    seed: int, engine: dict[str, int], frontend_seconds: float = 0.0, sessions_per_second: float = 1.0
) -> Fleet:
    fleet = Fleet(fleet_settings(replicas=2, **engine))
    workload = chat_stream(seed, SECONDS, sessions_per_second=sessions_per_second)
    fleet.feed(workload._replace(delivered=workload.arrival + frontend_seconds))
    return fleet


def observed(outcomes: Records, frontend_seconds: float) -> Reality:
    """Measured from the records of these requests."""
    reality = Reality()
    for row in outcomes[outcomes["status"] == FINISHED]:
        name, arrival = str(row["index"]), float(row["arrival"])
        reality.arrive(name, arrival)
        reality.end(
            name,
            Outcome(
                arrival=arrival,
                scheduled=float(row["scheduled"]) - frontend_seconds,
                first_token=float(row["first_token"]),
                finish=float(row["finish"]),
                prompt_tokens=float(row["prompt"]),
                output_tokens=float(row["output"]),
                cached_tokens=float(row["cached"]),
            ),
        )
    return reality


@examples(30)
@given(st.integers(0, 10_000), engines, st.floats(0.3, 4.0), st.sampled_from([0.0, 0.03]), stretches)
def test_requests_under_way_and_ended_count_alike(
    seed: int, engine: dict[str, int], rate: float, frontend: float, stretch: tuple[float, float]
) -> None:
    start, stop = stretch
    fleet = fleet_of(seed, engine, frontend, rate)
    fleet.run(start)
    before, ended = Counters.of(fleet.state, start), [fleet.collect()]
    fleet.run(stop)
    ended.append(fleet.collect())
    simulated = measure(fleet, before, ended[-1], frontend)
    assert simulated.keys() == set(METRICS)
    fleet.run()
    ended.append(fleet.collect())
    outcomes = np.concatenate(ended)
    # Records do not hold the time in the frontend, so that a request seems to be in the engine from its arrival on.
    assume(not ((outcomes["arrival"] <= stop) & (stop < outcomes["arrival"] + frontend)).any())
    seen = observed(outcomes, frontend).measure(start, stop)
    for metric in RECORDED:
        if frontend > 0.0 and metric in UNTIL_SCHEDULED:
            continue
        assert seen.get(metric, np.nan) == pytest.approx(simulated[metric], rel=1e-12, abs=1e-12, nan_ok=True), metric


@examples(15)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 64]), st.booleans(), st.floats(0.3, 4.0))
def test_loads_of_a_whole_run_are_those_of_the_counters(seed: int, seqs: int, overlap: bool, rate: float) -> None:
    """Where nothing is preempted and every request begins and ends within the time."""
    fleet = fleet_of(seed, {"max_num_seqs": seqs, "async_scheduling": overlap}, 0.0, rate)
    fleet.run()
    outcomes = fleet.collect()
    simulated = measure(fleet, Counters.of(fleet_of(seed, {}).state, 0.0), outcomes, 0.0)
    whole = kpis(outcomes, None, Counters.of(fleet.state, fleet.now_seconds), start_seconds=0.0)
    seen = observed(outcomes, 0.0).measure(0.0, fleet.now_seconds)
    for metric in ("output_tokens_per_second", "requests_running", "requests_waiting", "prefix_cache_hit_ratio"):
        if not (outcomes["preemptions"] > 0).any():
            assert seen[metric] == pytest.approx(simulated[metric], rel=1e-9, abs=1e-9), metric
        assert getattr(whole, metric) == simulated[metric]
    for metric, (kpi, statistic) in STATISTICS.items():
        if kpi != "itl_seconds" and statistic:  # nobody is under way at the end
            assert getattr(getattr(whole, kpi), statistic) == pytest.approx(simulated[metric], rel=1e-12, nan_ok=True)
