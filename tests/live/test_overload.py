"""A real vLLM in a calm, a climb to an overload and a fall, and the twin beside it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from live.chat_load import ChatLoad
from live.rig import Moment, Rig, Watch, settled

pytestmark = [pytest.mark.real, pytest.mark.slow]

SESSIONS_PER_SECOND = 0.8
# Some 1.8 requests/s of 4 that the engine holds, then more than it holds, then little, so that the queue drains.
SHAPE = ((0.0, 1.0), (50.0, 1.0), (70.0, 4.0), (130.0, 4.0), (140.0, 0.2), (160.0, 0.2))
MINUTE_SECONDS = 60.0
OVERLOAD_WAITING = 20.0  # mean of a minute
TARGET_ERROR = 0.05  # of waiting and running in an overload
LATENCY_TARGET_ERROR = 0.10
GRACE_SECONDS = 10.0  # until gauges that Prometheus scrapes have taken the trust
LATENCIES = (("ttft_seconds", "p99"), ("e2e_seconds", "p95"))
GAUGES: dict[str, tuple[Callable[[Moment], float], Callable[[Moment], float]]] = {
    "waiting": (lambda one: one.waiting, lambda one: one.mirrored_waiting),
    "running": (lambda one: one.running, lambda one: one.mirrored_running),
}


def mean(minute: Iterable[Moment], what: Callable[[Moment], float]) -> float:
    return float(np.mean([what(one) for one in minute]))


def error(minute: Sequence[Moment], gauge: str) -> float:
    """The relative error of the mean of a minute."""
    real, mirrored = GAUGES[gauge]
    return abs(mean(minute, mirrored) - mean(minute, real)) / max(mean(minute, real), 1.0)


def described(minute: Sequence[Moment]) -> str:
    """A line of the report."""
    means = "  ".join(
        f"{gauge} {mean(minute, real):.2f} mirrored {mean(minute, mirrored):.2f}"
        for gauge, (real, mirrored) in GAUGES.items()
    )
    trusted = sum(one.trusted for one in minute)
    reasons = {reason for one in minute for reason in one.reasons}
    return f"{minute[0].time_seconds:.0f}  {means}  trusted {trusted}/{len(minute)}  {sorted(reasons)}"


def latency_errors(history: dict[str, Any], within: Sequence[Sequence[Moment]]) -> dict[str, list[float]]:
    """Relative errors of the history's minutes that end within these, by KPI and statistic."""
    begin, end = within[0][0].time_seconds, within[-1][-1].time_seconds
    found = {}
    for series in history["series"]:
        if (name := (series["kpi"], series["statistic"])) in LATENCIES:
            rows = zip(history["event_seconds"], series["mirrored"], series["observed"], strict=True)
            found["_".join(name)] = [
                abs(mirrored - observed) / observed
                for at, mirrored, observed in rows
                if begin < at <= end + MINUTE_SECONDS and mirrored is not None and observed
            ]
    return found


def sustained(moments: Sequence[Moment]) -> Iterator[Moment]:
    """Those at which mirror and gauges were apart by more than twice the bound for the last `GRACE_SECONDS`.

    Gauges reach the twin by Prometheus, two scrapes late at most.
    """
    since = math.inf
    for one in moments:
        apart = any(
            abs(mirrored(one) - real(one)) > max(2 * TARGET_ERROR * real(one), 2.0)
            for real, mirrored in GAUGES.values()
        )
        since = min(since, one.time_seconds) if apart else math.inf
        if one.time_seconds - since > GRACE_SECONDS:
            yield one


def test_the_mirror_is_right_in_an_overload(live: Rig) -> None:
    twin = live.make_twin()
    twin.start()
    load = ChatLoad([live.replicas[0].tap.url], SESSIONS_PER_SECOND, SHAPE)
    twin.wait_until_ready()
    watch = Watch(live, twin)
    load.join()
    state = settled(live, twin)
    watch.stop()
    minutes = [list(group) for _, group in itertools.groupby(watch.moments, lambda one: one.time_seconds // 60)]
    for minute in minutes:
        print(described(minute))
    overload = [minute for minute in minutes if mean(minute, lambda one: one.waiting) > OVERLOAD_WAITING]
    assert overload, "the load was no overload"

    records = live.records()
    clients = {seen.id for seen in load.seen if seen.answered}
    assert all(seen.answered or seen.left for seen in load.seen)
    finished = {id for kind, id in records if kind == "request_finished"}
    assert clients <= finished, "an answer has no record"
    print(
        json.dumps({"records": state["records"], "dropped": state["dropped"], "finished": state["finished_requests"]})
    )
    assert state["records"]["accepted"] == len(records)  # each once, whatever was sent again or completed
    assert state["records"]["late"] == state["records"]["rejected"] == state["records"]["future_time"] == 0
    assert not any(state["dropped"].values())
    assert state["finished_requests"] == len(finished)

    worst = max(error(minute, gauge) for minute in overload for gauge in GAUGES)
    latencies = latency_errors(twin.get("/v1/history"), overload)
    print(json.dumps({"worst_gauge_error": worst, "latency_errors": latencies}))
    assert worst <= TARGET_ERROR
    assert set(latencies) == {"_".join(name) for name in LATENCIES}
    assert all(error <= LATENCY_TARGET_ERROR for errors in latencies.values() for error in errors)
    print(f"trusted in {sum(one.trusted for one in watch.moments)} of {len(watch.moments)} seconds")
    assert not [one for one in sustained(watch.moments) if one.trusted]
