"""Several pools in one daemon."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from daemon.test_daemon import FLEET, FORECAST, events, get, metric, recorded, until
from kavier_twin.daemon.checkpoints import Checkpoints
from kavier_twin.daemon.config import read_settings
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.feed import Feed
from kavier_twin.daemon.http_settings import HttpConfig
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.errors import UserError
from kavier_twin.mirror.mirror import MirrorSettings
from kavier_twin.telemetry import RequestRecord, RequestSeen, TelemetryRecord
from memory_source import MemorySource


def pool(name: str) -> PoolTwin:
    return PoolTwin(FLEET, MirrorSettings(pool=name, ordering_seconds=0.5), FORECAST)


def stream(pool_name: str, count: int) -> list[TelemetryRecord]:
    return [event.model_copy(update={"pool": pool_name}) for event in events(recorded(count))]


def state_of(found: PoolTwin) -> tuple[str, dict[str, int], int]:
    digest = hashlib.sha256()
    for array in found.mirror.fleet.state:
        digest.update(array.tobytes())
    return digest.hexdigest(), dict(found.mirror.ingested), found.mirror.finished


def test_records_go_to_the_pool_they_name_and_nowhere_else() -> None:
    source = MemorySource("bus")
    daemon = Daemon([pool("chat"), pool("code")], [Feed(source)], http=HttpConfig(port=0))
    daemon.start()
    try:
        chat, code = stream("chat", 60), stream("code", 30)
        both = sorted([*chat, *code], key=lambda record: record.time_seconds)
        for record in both:  # the same ids in both pools: each pool has its own
            source.push(record)
        source.push(both[0].model_copy(update={"pool": "riddle"}))
        source.push(both[0].model_copy(update={"pool": "default"}))
        source.end()
        until(lambda: [view.finished_requests for view in daemon.views.values()] == [60, 30], "both followed")
        until(lambda: all(view.outlook for view in daemon.views.values()), "both forecast")
        assert daemon.http is not None
        text = get(f"{daemon.http.url}/metrics")[1]
        assert get(f"{daemon.http.url}/readyz")[0] == 200
    finally:
        assert daemon.stop()
    assert metric(text, "kavier_twin_requests_finished_total", pool="chat") == 60.0
    assert metric(text, "kavier_twin_requests_finished_total", pool="code") == 30.0
    assert metric(text, "kavier_twin_records_total", pool="code", result="duplicate") == 0.0
    assert metric(text, "kavier_twin_source_rejected_total", source="bus", reason="unknown-pool") == 2.0
    names = [family.name for family in text_string_to_metric_families(text)]
    assert len(names) == len(set(names))
    alone = pool("code")
    alone.ingest(stream("code", 30), more=False, ended=False)
    alone.ingest([], more=False, ended=True)
    assert state_of(daemon.pools["code"]) == state_of(alone)


def test_a_record_without_a_pool_goes_to_the_only_one_or_to_its_source_s() -> None:
    seen = RequestSeen(id="a", time_seconds=1.0, prompt_tokens=10)
    source = MemorySource()
    for feed, pools, expected in (
        (Feed(source), ["chat"], ["chat"]),
        (Feed(source), ["chat", "code"], []),
        (Feed(source, "code"), ["chat", "code"], ["code"]),
        (Feed(source), ["chat", "default"], ["default"]),
    ):
        source.push(seen)
        assert [name for name, _ in feed.poll(10, pools)[0]] == expected
    source.push(seen.model_copy(update={"pool": "other"}))
    feed = Feed(source, "code")
    assert feed.poll(10, ["code"]) == ([], False)
    assert feed.state.rejected == {"unknown-pool": 1}


def test_checkpoints_hold_all_pools(tmp_path: Path) -> None:
    pools = [pool("chat"), pool("code")]
    for number, twin in enumerate(pools):
        twin.ingest(stream(twin.name, 40 + 20 * number), more=False, ended=False)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(checkpoints.take(pools, []))
    again = {name: pool(name) for name in ("chat", "code", "new")}
    Checkpoints(tmp_path).restore(again, [])
    assert [state_of(again[twin.name]) for twin in pools] == [state_of(twin) for twin in pools]
    assert again["new"].mirror.finished == 0


def test_an_id_that_ends_twice_at_once_is_a_duplicate() -> None:
    """Two whole records of one id and time that contradict each other: the first counts, nothing breaks."""
    record = recorded(1)[0]
    twin = pool("chat")
    ends = [record, record.model_copy(update={"cached_tokens": 1}), record.model_copy(update={"cached_tokens": 2})]
    assert all(isinstance(entry, RequestRecord) for entry in ends)
    twin.ingest(ends, more=False, ended=False)
    twin.ingest([], more=False, ended=True)
    assert twin.mirror.finished == 1
    assert twin.mirror.ingested["duplicate"] == 4


# --- settings -----------------------------------------------------------------------------------------------------


def write(tmp_path: Path, content: dict[str, Any]) -> Path:
    path = tmp_path / "twin.yaml"
    path.write_text(yaml.safe_dump({"sources": [{"type": "trace_file", "path": "x"}]} | content))
    return path


FLEET_SETTINGS = {"engine": {"num_gpu_blocks": 100}}
PROMETHEUS = {"type": "prometheus", "url": "http://prometheus:9090"}


def test_settings_of_several_pools(tmp_path: Path) -> None:
    content = {
        "pools": {
            "chat": {"fleet": FLEET_SETTINGS, "mirror": {"late_seconds": 9}},
            "code": {"fleet": FLEET_SETTINGS | {"replicas": 3}},
        },
        "sources": [PROMETHEUS | {"pool": "code"}, {"type": "trace_file", "path": "x", "pool": "chat"}],
        "http": {"port": 0},
    }
    settings = read_settings(write(tmp_path, content))
    assert settings.by_pool["chat"].mirror.late_seconds == 9.0
    daemon = Daemon.of(settings)
    try:
        assert daemon.pools["code"].fleet.replicas == 3
        assert [source.name for source in daemon.views["code"].sources] == ["prometheus:prometheus:9090"]
        assert len(daemon.views["chat"].sources) == 1
    finally:
        daemon.stop()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "fleet: missing; add it, or pools if there are several"),
        ({"pools": {"a": {"fleet": FLEET_SETTINGS}}, "mirror": {}}, "mirror: belongs to each of the pools"),
        ({"pools": {"a": {"flet": FLEET_SETTINGS}}}, "pools.a.flet: unknown setting; did you mean fleet?"),
        ({"pools": {"a": {"fleet": {"engine": {"num_gpu_blocks": 0}}}}}, "pools.a.fleet.engine.num_gpu_blocks: is 0"),
        ({"fleet": FLEET_SETTINGS, "sources": [PROMETHEUS | {"pool": "b"}]}, "there is no pool 'b'; known: default"),
        (
            {"pools": {"a": {"fleet": FLEET_SETTINGS}, "b": {"fleet": FLEET_SETTINGS}}, "sources": [PROMETHEUS]},
            "sources.0.pool: missing; say whose figures these are: a, b",
        ),
        (
            {
                "pools": {"a": {"fleet": FLEET_SETTINGS}, "b": {"fleet": FLEET_SETTINGS}},
                "sources": [PROMETHEUS | {"pool": "a"}],
            },
            "pools.b: no source gives its records; add one",
        ),
        (
            {
                "pools": {
                    "a": {
                        "fleet": FLEET_SETTINGS,
                        "forecast": {"policies": [{"name": "t"}, {"name": "p", "overrides": {"num_seqs": 1}}]},
                    }
                }
            },
            "pools.a.forecast.policies.1 (p): ",
        ),
    ],
)
def test_what_is_wrong_with_pools_is_told(tmp_path: Path, content: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        read_settings(write(tmp_path, content))
    assert expected in str(caught.value)
