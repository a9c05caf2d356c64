"""`kavier-twin tap` before it runs, and its ways to an engine."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from kavier_twin.commands.main import main
from real_parts import openssl
from tap.openai_server import OpenAIServer, serving
from tap.tap_process import tap_process
from waiting import until


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    security = tmp_path / "kafka.yaml"
    security.write_text("tls: {ca: gone.pem, verify: false}\nsasl: {mechanism: X, username: u, password: hunter2}\n")
    options = [
        *("--upstream", "http://user:pass@vllm/v1", "--upstream-ca", "gone.pem", "--port", "70000"),
        *("--kafka", "kafka", "--topic", "a b", "--kafka-security", str(security), "--pool", ""),
        *("--tokenizer", "gone.json", "--block-tokens", "0", "--hash-algorithm", "xxhash"),
    ]
    assert main(["tap", *options]) == 1
    told = capsys.readouterr().err
    for option in options[::2]:
        assert f"{option}" in told, option
    for place in ("tls.verify", "sasl.mechanism", "sasl.password"):
        assert f"{security}: {place}" in told
    assert "12 to fix; nothing was started" in told
    for secret in ("hunter2", "pass@"):
        assert secret not in told


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--output", "x.jsonl"], "--upstream is missing"),
        (["--mirror", "--output", "x.jsonl"], "--mirror needs what tokenises"),
        (["--upstream", "vllm:8000", "--output", "x.jsonl"], "--upstream: give scheme, host and port only"),
        (["--upstream", "http://v:99999", "--output", "x.jsonl"], "--upstream: give scheme, host and port only"),
        (["--upstream", "http://v", "--output", "gone/x.jsonl"], "the directory gone does not exist"),
        (["--upstream", "http://v", "--output", "x", "--kafka-security", "k"], "--kafka-security: there is no --kafka"),
        (["--upstream", "http://v", "--kafka", "k:1", "--kafka-security", "gone"], "--kafka-security gone: cannot be"),
    ],
)
def test_what_is_wrong_is_told(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tap", *options]) == 1
    assert expected in capsys.readouterr().err


def test_what_shows_only_at_the_start_is_told_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By either of the two processes."""
    output = ["--upstream", "http://127.0.0.1:1", "--output", str(tmp_path / "x.jsonl")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["tap", *output, "--port", port]) == 1
        assert main(["tap", *output, "--port", "0", "--metrics-port", port]) == 1
    wrong = tmp_path / "tokenizer.json"
    wrong.write_text("{}")
    assert main(["tap", *output, "--port", "0", "--metrics-port", "0", "--tokenizer", str(wrong)]) == 1
    told = capfd.readouterr().err
    assert f"--port {port}: cannot listen" in told
    assert f"--metrics-port {port}: Address already in use" in told
    assert f"--tokenizer {wrong}: no tokenizer.json" in told
    assert "Traceback" not in told


def test_an_engine_behind_tls_is_reached_and_another_one_is_not(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [openssl(), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    subprocess.run([*command, *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    output = tmp_path / "records.jsonl"
    asked = {"model": "base", "prompt": "once upon a time", "stream": True}
    with serving(OpenAIServer(), ssl_certfile=str(certificate), ssl_keyfile=str(key)) as upstream:
        url = upstream.url.replace("http://127.0.0.1", "https://localhost")
        options = ("--upstream", url, "--output", output, "--block-tokens", "4")
        with tap_process(tmp_path / "log", *options, "--upstream-ca", certificate) as tap:
            assert httpx.post(f"{tap.url}/v1/completions", json=asked).text.endswith("data: [DONE]\n\n")
            until(lambda: output.read_text().count("\n") == 2, "both records")
            assert tap.end() == 0
        assert len(json.loads(output.read_text().splitlines()[0])["block_hashes"]) == 4
        with tap_process(tmp_path / "log2", *options) as tap:
            assert httpx.post(f"{tap.url}/v1/completions", json=asked).status_code == 502
            assert "no answer from the engine: SSLCertVerificationError" in tap.said
