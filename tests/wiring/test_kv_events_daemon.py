"""KV events over real ZeroMQ beside a stream of requests: the daemon says how far its caches are the engine's."""

from __future__ import annotations

import json
from pathlib import Path

import msgpack
import pytest

from connectors.kv_events.source import KvEventsSource
from connectors.traces import read_trace
from connectors.traces.recording import read_kv_events
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.forecast.forecaster import ForecastSettings
from kavier_twin.recordings.scenario import load_scenario
from kavier_twin.telemetry import TelemetryRecord
from kv_publisher import Publisher
from waiting import wait_until

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"


class AfterEvents:
    """The recording's requests from a time on, as soon as all KV events have come."""

    name = "requests"
    trouble = ""
    last_record_seconds = None
    exhausted = False

    def __init__(self, start: float, events: KvEventsSource, last: float) -> None:
        self._events, self._last = events, last
        self._records = [record for record in read_trace(RECORDING).records if record.time_seconds >= start]

    def poll(self, max_records: int) -> list[TelemetryRecord]:
        if (self._events.last_record_seconds or 0.0) < self._last:
            return []
        taken, self._records = self._records[:max_records], self._records[max_records:]
        self.exhausted = not self._records
        return list(taken)

    def rejected(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("start", [0.0, 105.0])
def test_caches_agree_from_the_start_and_after_a_late_one(start: float) -> None:
    began = json.loads((RECORDING / "meta.json").read_text())["started_unix"]
    batches = [[time - began, *rest] for time, *rest in (row["batch"] for row in read_kv_events(RECORDING))]
    publisher = Publisher(topic=b"kv@vllm-0@tiny")
    publisher.send(*map(msgpack.packb, batches))
    events = KvEventsSource(publisher.endpoint, replay_endpoint=publisher.replay)
    pool = PoolTwin(load_scenario(RECORDING).fleet, forecast=ForecastSettings(scenarios=1, horizons_seconds=(5.0,)))
    requests = AfterEvents(start, events, batches[-1][0])
    daemon = Daemon([pool], [Feed(events), Feed(requests)])
    daemon.start()
    try:
        wait_until(lambda: daemon.view.caches and daemon.view.event_seconds > batches[-1][0] - 20.0, 120.0)
        (cache,) = daemon.view.caches
        assert (cache.pod, cache.engine) == ("vllm-0", "0")
        assert cache.agreement_ratio >= 0.97
        assert (cache.filled or 0) == pytest.approx(0 if start == 0.0 else 395, abs=5)
        exact = daemon.view.exact_cache_ratio
        assert exact > 0.98
    finally:
        assert daemon.stop()
        publisher.close()
