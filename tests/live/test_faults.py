"""Faults beside a real vLLM: whatever dies or goes away, no record is lost and none counts twice."""

from __future__ import annotations

import os
import signal
import time

import pytest

from live.chat_load import ChatLoad
from live.rig import Rig, settled
from waiting import until

pytestmark = [pytest.mark.real, pytest.mark.slow]

AWAY_SECONDS = 15.0
TOO_LONG_SECONDS = 900.0


def test_nothing_is_lost_or_double_whatever_fails(live: Rig) -> None:
    twin = live.make_twin(mirror={"calibrate_after_requests": 60, "pod_silent_seconds": 30})
    twin.start()
    first = live.replicas[0]
    load = ChatLoad([first.tap.url], 0.8, ((0.0, 1.0), (TOO_LONG_SECONDS, 1.0)))
    twin.wait_until_ready()

    def goes_on() -> None:
        """Wait until the twin has followed ten further requests to their ends."""
        before = twin.get("/v1/state")["finished_requests"]
        until(lambda: twin.get("/v1/state")["finished_requests"] >= before + 10, "the twin goes on")

    goes_on()
    for _ in range(3):
        twin.kill()
        began = time.monotonic()
        twin.start()
        twin.wait_until_ready()
        print(f"the twin is ready {time.monotonic() - began:.1f} s after its restart")
        goes_on()

    live.kafka.stop(kill=True)
    time.sleep(AWAY_SECONDS)
    live.kafka.start()
    goes_on()

    live.prometheus.suspend()
    time.sleep(AWAY_SECONDS)
    live.prometheus.resume()
    goes_on()

    second = live.add_replica()
    load.addresses.append(second.tap.url)
    until(lambda: len(twin.get("/v1/state")["replicas"]) == 2, "the second replica is mirrored")
    goes_on()
    load.addresses.remove(second.tap.url)
    until(lambda: second.vllm.load() == (0.0, 0.0), "the second replica is idle", patience_seconds=120.0)
    second.vllm.kill()
    live.scrape([first])

    before_faults = len(load.seen)
    os.kill(first.tap.worker(), signal.SIGKILL)
    goes_on()
    first.vllm.kill()
    time.sleep(2.0)
    first.vllm.start()
    first.vllm.wait_until_ready()
    goes_on()
    until(lambda: len(twin.get("/v1/state")["replicas"]) == 1, "the second replica has left", patience_seconds=120.0)
    load.stop()

    state, records = settled(live, twin), live.records()
    clients = {seen.id for seen in load.seen[:before_faults] if seen.answered}
    finished = {id for kind, id in records if kind == "request_finished"}
    print(state["records"], state["dropped"], state["finished_requests"], len(records), len(finished))
    assert clients <= finished, "an answer has no record"
    assert state["records"]["accepted"] == len(records)
    assert state["records"]["late"] == state["records"]["rejected"] == 0
    assert not any(lost for source in state["sources"] for lost in source["lost"].values())
