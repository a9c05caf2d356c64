"""A pool of which only a Prometheus server knows: from its stored scrapes to forecasts."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from connectors.traces.recording import read_metrics
from kavier_twin.daemon.config import read_settings
from kavier_twin.daemon.daemon import Daemon
from prometheus_server import RealPrometheus, openmetrics
from waiting import wait_until

pytestmark = pytest.mark.real

RECORDING = Path(__file__).parents[1] / "data" / "recordings" / "chat-400"
PATIENCE_SECONDS = 300.0  # a kernel may have to be compiled first


def test_a_prometheus_server_alone_makes_forecasts(tmp_path: Path) -> None:
    scrapes = read_metrics(RECORDING)[::7]  # one in 14 s, as Prometheus' default nearly is
    requests = json.loads((RECORDING / "meta.json").read_text())["requests"]
    labels = {"job": "vllm", "instance": "10.0.0.1:8000", "namespace": "chat", "pod": "vllm-0"}
    gpu = 'DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-0",exported_namespace="chat",exported_pod="vllm-0"}'
    exporter = {"job": "dcgm", "instance": "10.0.0.2:9400", "namespace": "gpu-operator", "pod": "dcgm-exporter-x"}
    server = RealPrometheus(tmp_path)
    page = openmetrics(scrapes, labels).removesuffix("# EOF\n")
    server.backfill(page + openmetrics([(at, f"{gpu} 300") for at, _ in scrapes], exporter))
    server.start()
    settings = tmp_path / "twin.yaml"
    reach = time.time() - scrapes[0][0] + 60.0
    settings.write_text(f"""
fleet:
  engine:
    {{block_size: 32, num_gpu_blocks: 400, max_num_seqs: 16, max_num_batched_tokens: 1024, max_model_len: 4096,
     async_scheduling: false}}
  footprint: {{power: {{idle_watts: 100, max_watts: 400}}}}
sources:
  - {{type: prometheus, url: "{server.url}", engines: {{namespace: chat}}, warm_up_seconds: {reach},
     max_backfill_seconds: 1000000000}}
forecast: {{scenarios: 3, horizons_seconds: [60], policies: [{{name: today}}], every_seconds: 1}}
http: {{port: 0}}
""")
    daemon = Daemon.of(read_settings(settings))
    daemon.start()
    try:
        wait_until(lambda: daemon.view.finished_requests > 0.95 * requests, PATIENCE_SECONDS)
        wait_until(lambda: daemon.view.outlook and daemon.view.outlook.event_seconds > scrapes[-3][0], PATIENCE_SECONDS)
        view = daemon.view
        assert view.source == "metrics"
        assert view.calibrated
        hits = view.score("prefix_cache_hit_ratio")
        assert hits is not None
        assert abs(hits.error) < 0.01
        assert view.power is not None
        assert view.power.observed_watts == pytest.approx(300.0)
        assert daemon.http is not None
        text = urllib.request.urlopen(f"{daemon.http.url}/metrics", timeout=20).read().decode()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        predicted = families["kavier_twin_predicted_e2e_seconds"].samples
        assert predicted
        assert {sample.labels["source"] for sample in predicted} == {"metrics"}
    finally:
        assert daemon.stop()
        server.stop()
