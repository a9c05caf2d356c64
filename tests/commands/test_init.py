"""`kavier-twin init` on a real Prometheus: what it writes is what `run` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from connectors.prometheus.api import PrometheusApi
from connectors.prometheus.http import Access, FetchError, HttpClient
from connectors.prometheus.names import running_selector
from connectors.settings import Prometheus
from fake_engines import engine_page, serve_page
from kavier_twin.commands.main import main
from kavier_twin.daemon.config import read_settings
from prometheus_server import RealPrometheus
from waiting import wait_until

LLAMA, OWN = "meta-llama/Llama-3.1-8B-Instruct", "acme/own-model"
DCGM = 'DCGM_FI_DEV_POWER_USAGE{gpu="%d",UUID="GPU-%d",modelName="NVIDIA H100 80GB HBM3",pod="%s",namespace="prod"} 300'


def cards(pod: str, *numbers: int) -> list[str]:
    return [DCGM % (number, number, pod) for number in numbers]


@pytest.mark.real
def test_two_models_and_what_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = 'vllm:cache_config_info{engine="0",model_name="%s",num_gpu_blocks="4321",block_size="16"} 1'
    pages = {
        "llama-0": serve_page(engine_page({"model_name": LLAMA}, extra=cards("llama-0", 0, 1))),
        "llama-1": serve_page(engine_page({"model_name": LLAMA}, extra=cards("llama-1", 2, 3))),
        "own-0": serve_page(engine_page({"model_name": OWN}, extra=[config % OWN])),
    }
    targets = [{"targets": [page.address], "labels": {"pod": pod, "namespace": "prod"}} for pod, page in pages.items()]
    scraped = {"job_name": "vllm", "scrape_interval": "1s", "honor_labels": True, "static_configs": targets}
    server = RealPrometheus(tmp_path, [scraped])
    server.start()
    api = PrometheusApi(server.url, HttpClient(Access()), 5.0)

    def stored() -> bool:
        try:
            return len({series.labels["pod"] for series in api.instant(running_selector())}) == len(pages)
        except FetchError:
            return False

    path = tmp_path / "twin.yaml"
    words = ["init", "--prometheus", server.url, "--output", str(path)]
    try:
        wait_until(stored, 60.0)
        assert main(words) == 0
    finally:
        server.stop()
        for page in pages.values():
            page.close()
    said = capsys.readouterr().out
    assert "llama-0/0, llama-1/0" in said
    assert f"not found: own-model: the shape of '{OWN}'" in said
    assert "not found: own-model: the GPU" in said
    settings = read_settings(path)
    llama, own = (settings.by_pool[name].fleet for name in ("llama-3.1-8b-instruct", "own-model"))
    assert llama.hardware is not None
    assert (llama.replicas, llama.hardware.tensor_parallel_size) == (2, 2)
    assert own.replicas == 1
    assert own.engine.num_gpu_blocks == 4321
    chosen = {source.pool: source.engines for source in settings.sources if isinstance(source, Prometheus)}
    assert chosen["own-model"]["model_name"] == OWN
    assert chosen["llama-3.1-8b-instruct"]["model_name"] == LLAMA
    before = path.read_text()
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
    assert path.read_text() == before


def test_nothing_is_written_where_nothing_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "twin.yaml"
    words = ["init", "--prometheus", "http://127.0.0.1:9", "--kafka", "127.0.0.1:9", "--output", str(path)]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "not found: Prometheus: " in said.out
    assert "not found: Kafka: 127.0.0.1:9 cannot be asked" in said.out
    assert not path.exists()
