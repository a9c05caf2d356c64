"""Engine settings as the engines tell them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from daemon.test_daemon import FLEET, until
from kavier_twin.daemon.checkpoints import Checkpoints
from kavier_twin.daemon.config import Settings, read_settings
from kavier_twin.daemon.daemon import Daemon
from kavier_twin.daemon.pool import PoolTwin
from kavier_twin.telemetry import RequestFinished, RequestSeen
from prometheus_server import Pages


class Engine:
    """A server whose settings the test sets."""

    def __init__(self) -> None:
        self.blocks = 777
        self.server = Pages(self._answer)

    def _answer(self, path: str, *_: object) -> tuple[int, str, bytes]:
        if path.startswith("/v1/models"):
            return 200, "application/json", b'{"data": [{"id": "m", "max_model_len": 4096}]}'
        if path != "/metrics":
            return 404, "text/plain", b""
        page = (
            f'vllm:cache_config_info{{block_size="32",num_gpu_blocks="{self.blocks}",enable_prefix_caching="False",'
            f'engine="0"}} 1.0\nvllm:num_requests_running{{engine="0",model_name="m"}} 0\n'
        )
        return 200, "text/plain", page.encode()


@pytest.fixture
def engine() -> Iterator[Engine]:
    found = Engine()
    yield found
    found.server.close()


def settings(tmp_path: Path, engine: Engine, **given: object) -> Settings:
    path = tmp_path / "twin.yaml"
    hardware = {"gpu": "H100 SXM 80GB", "model": "Llama-3.1-8B"}
    metrics = {
        "type": "vllm_metrics",
        "engines": [{"url": f"{engine.server.url}/metrics", "pod": "a"}],
        "interval_seconds": 0.1,
    }
    sources = [metrics, {"type": "trace_file", "path": "requests.jsonl"}]
    content = {"fleet": {"hardware": hardware, "engine": given}, "sources": sources, "http": {"port": 0}}
    path.write_text(yaml.safe_dump(content))
    return read_settings(path)


def test_what_the_file_does_not_say_is_adopted_and_what_it_says_holds(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    daemon = Daemon.of(settings(tmp_path, engine, block_size=16, max_num_seqs=64))
    daemon.start()
    try:
        mirror = daemon.pools["default"].mirror
        until(lambda: mirror.fleet.settings.engine.num_gpu_blocks == 777, "the blocks are adopted")
        adopted = mirror.fleet.settings.engine
        assert not adopted.prefix_caching
        until(lambda: mirror.fleet.settings.engine.max_model_len == 4096, "what another page tells")
        assert (adopted.block_size, adopted.max_num_seqs) == (16, 64)
        until(lambda: daemon.view.engine_contradictions == 1, "the contradiction is shown")
        assert any("block_size is 32 (a, engine 0" in note and "but 16" in note for note in daemon.view.notes)
        engine.blocks = 888  # it restarts with another number
        until(lambda: mirror.fleet.settings.engine.num_gpu_blocks == 888, "the new number is adopted")
        assert not daemon.failed
    finally:
        assert daemon.stop()
    text = caplog.text
    assert "adopted engine settings reported by the engines: num_gpu_blocks 777 (was" in text
    assert "kept as given: block_size, max_num_seqs" in text
    assert text.count("engine configuration: block_size is 32") == 1


def test_a_running_mirror_goes_on_with_what_it_learns(tmp_path: Path) -> None:
    pool = PoolTwin(FLEET, given=["max_num_seqs"])
    for number in range(5):
        pool.ingest(
            [RequestSeen(id=str(number), time_seconds=float(number), prompt_tokens=100)], more=False, ended=False
        )
    pool.adopt({"num_gpu_blocks": 500, "max_num_seqs": 2, "max_model_len": 4096})
    told = pool.mirror.fleet.settings.engine
    assert (told.num_gpu_blocks, told.max_num_seqs, told.max_model_len) == (500, 6, 4096)
    assert pool.mirror.fleet.state.blocks.shape[1] == 500
    pool.ingest(
        [RequestFinished(id=str(number), time_seconds=9.0, output_tokens=5) for number in range(5)],
        more=False,
        ended=False,
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(checkpoints.take([pool], []))
    again = PoolTwin(FLEET)
    assert Checkpoints(tmp_path).restore({"default": again}, [])
    assert again.mirror.fleet.settings.engine == told  # before any engine speaks
    again.ingest([], more=False, ended=True)
    assert again.mirror.finished == 5
    assert again.mirror.load() == (0, 0, 0.0)


def test_settings_that_cannot_be_are_told_and_left(caplog: pytest.LogCaptureFixture) -> None:
    pool = PoolTwin(FLEET)
    for _ in range(3):
        pool.adopt({"num_gpu_blocks": 1})
    assert pool.mirror.fleet.settings.engine == FLEET.engine
    assert len([record for record in caplog.records if "are impossible" in record.message]) == 1
