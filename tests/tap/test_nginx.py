"""The tap beside a real nginx that mirrors to it, set up as docs/tap.md says."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import httpx

from real_parts import nginx
from tap.openai_server import OpenAIServer, free_port, serving
from tap.tap_process import tap_process
from waiting import until

DOCUMENT = Path(__file__).parents[2] / "docs" / "tap.md"
AROUND = """
daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
  uwsgi_temp_path {directory}; scgi_temp_path {directory};
  {servers}
}}
"""


def test_requests_that_nginx_mirrors_are_recorded_and_its_clients_wait_for_nothing(tmp_path: Path) -> None:
    found = re.search(r"```nginx\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    output, port = tmp_path / "records.jsonl", free_port()
    asked = {"model": "base", "prompt": "once upon a time", "stream": True, "max_tokens": 3}
    with serving(OpenAIServer()) as engine:
        options = ("--mirror", "--upstream", engine.url, "--output", output, "--block-tokens", "4")
        with tap_process(tmp_path / "log", *options) as tap:
            servers = found[1].replace("server vllm:8000", f"server {engine.url.removeprefix('http://')}")
            servers = servers.replace("server tap:9470", f"server {tap.url.removeprefix('http://')}")
            servers = servers.replace("listen 8080", f"listen 127.0.0.1:{port}")
            settings = tmp_path / "nginx.conf"
            settings.write_text(AROUND.format(directory=tmp_path, servers=servers))
            with subprocess.Popen([nginx(), "-c", settings, "-e", tmp_path / "error.log"]) as proxy:
                try:
                    url = f"http://127.0.0.1:{port}/v1/completions"
                    until(lambda: _answers(url), "nginx answers")
                    before = time.time()
                    answer = httpx.post(url, json=asked, headers={"X-Session-ID": "s"})
                    assert answer.text.endswith("data: [DONE]\n\n")
                    until(lambda: output.exists() and output.read_text(), "the record")
                finally:
                    proxy.terminate()
            assert tap.end() == 0
    (record,) = map(json.loads, output.read_text().splitlines())
    assert (record["kind"], record["session"], record["prompt_tokens"]) == ("request_seen", "s", 16)
    assert before <= record["time_seconds"] <= time.time()
    assert len(record["block_hashes"]) == 4


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code > 0
    except httpx.TransportError:
        return False
