from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from forecast.streams import chat_stream, fleet_settings, snapshot_at
from kavier_twin.commands.duration import seconds_of
from kavier_twin.commands.main import main
from kavier_twin.forecast.slo import DEFAULT_SLOS
from kavier_twin.forecast.whatif import Question, WhatIf


class Daemon(BaseHTTPRequestHandler):
    """Answers what-ifs from a snapshot, or refuses as told."""

    refuse: tuple[int, dict[str, Any]] | None = None
    asked: ClassVar[list[tuple[str, str, Question]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        question = Question.model_validate_json(body)
        self.asked.append((self.path, self.headers.get("Authorization", ""), question))
        if self.refuse:
            status, reply = self.refuse[0], json.dumps(self.refuse[1])
        else:
            snapshot = snapshot_at(chat_stream(1, 60.0), fleet_settings(num_gpu_blocks=500), 50.0, 50.0)
            status, reply = 200, WhatIf(lambda: snapshot, DEFAULT_SLOS, 1).ask(question).model_dump_json()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply.encode())))
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Daemon.refuse, Daemon.asked = None, []
    with HTTPServer(("127.0.0.1", 0), Daemon) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_question_and_its_answer(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    given = ["--policy", "kv_cache_dtype=fp8", "--replicas", "2", "--load", "1.5x", "--horizon", "15s"]
    assert main(["whatif", "--url", url, "--token-file", str(token), *given]) == 0
    ((path, authorization, question),) = Daemon.asked
    assert (path, authorization) == ("/v1/whatif", "Bearer s3cret")
    assert question == Question(overrides={"kv_cache_dtype": "fp8", "replicas": 2}, load=1.5, horizon_seconds=15.0)
    told = capsys.readouterr().out
    for words in ("replicas=2", "load x 1.5", "TTFT p99", "breaks ttft_p99", "--kv-cache-dtype fp8", "replicas=2:"):
        assert words in told
    assert main(["whatif", "--url", url, "--horizon", "5", "--json"]) == 0
    assert [case["name"] for case in json.loads(capsys.readouterr().out)["cases"]] == ["today"]


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ((401, {"detail": "no token"}), "give the daemon's token with --token-file"),
        ((422, {"detail": "overrides: unknown policy setting 'color'"}), "unknown policy setting 'color'"),
        ((429, {"detail": "8 questions wait"}), "try again in a few seconds"),
        ((404, {"detail": "there is no pool 'x'"}), "there is no pool 'x'\n"),
        ((404, {}), "is it a Kavier Twin of this version?"),
        ((200, {}), "is it a Kavier Twin?"),
    ],
)
def test_refusals_are_told(
    url: str, refusal: tuple[int, dict[str, Any]], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Daemon.refuse = refusal
    assert main(["whatif", "--url", url]) == 1
    told = capsys.readouterr().err
    assert says in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--policy", "nonsense"], "expected NAME=VALUE"),
        (["--load", "0"], "--load: is 0.0; it should be greater than 0"),
        (["--token-file", "/nowhere"], "--token-file /nowhere: cannot be read"),
        (["--url", "not a url"], "correct --url"),
    ],
)
def test_what_cannot_be_asked(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["whatif", *given]) == 1
    assert says in capsys.readouterr().err


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["whatif", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert "no daemon answers" in capsys.readouterr().err


def test_durations() -> None:
    assert [seconds_of(text) for text in ("90", "90s", "15m", "1.5h", "2d", "500ms")] == [
        90.0,
        90.0,
        900.0,
        5400.0,
        172_800.0,
        0.5,
    ]


@pytest.mark.parametrize("text", ["", "m", "-5s", "0", "inf", "1 week"])
def test_no_durations(text: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["whatif", "--horizon", text])
    assert ended.value.code == 2
