"""The tap inside the engine's server: FastAPI on uvicorn, with the middleware added as vLLM adds it."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from kavier_twin.tap import middleware
from kavier_twin.tap.hashing import BlockHasher
from kavier_twin.tap.watching import Watch
from tap.openai_server import Running, event, serving, token_ids
from waiting import until

PROMPT = "once upon a canary"
HASHER = BlockHasher("sha256", 4)


def engine(*, with_tap: bool = True) -> FastAPI:
    """A server of the form of vLLM's."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(raw: Request) -> Response:
        asked = await raw.json()
        await asyncio.sleep(asked.get("wait", 0.0))
        if asked.get("fails"):
            raise RuntimeError("the engine's own fault")
        if asked.get("refused"):
            return JSONResponse({"error": {"message": "too long"}}, 400)
        count = asked.get("max_tokens", 4)
        usage = {"prompt_tokens": len(asked["messages"][0]["content"]), "completion_tokens": count}
        if not asked.get("stream"):
            choice = {"index": 0, "message": {"content": "x" * count}, "finish_reason": "length"}
            return JSONResponse({"choices": [choice], "usage": usage})

        async def events() -> AsyncIterator[bytes]:
            yield event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for number in range(count):
                await asyncio.sleep(asked.get("pause", 0.0))
                if number == asked.get("breaks_after"):
                    raise RuntimeError("the engine's own fault")
                yield event({"choices": [{"index": 0, "delta": {"content": "x"}}]})
            yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "usage": usage})
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/tokenize")
    async def tokenize(raw: Request) -> dict[str, Any]:
        asked = await raw.json()
        return {"tokens": token_ids(asked["prompt"] if "prompt" in asked else asked["messages"][0]["content"])}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "base", "parent": None, "root": "base"}]}

    @app.post("/v1/audio/transcriptions")
    def transcribe() -> dict[str, Any]:
        return {"text": "x"}

    if with_tap:  # as `vllm/entrypoints/serve/middleware/register.py` does for --middleware
        imported = importlib.import_module("kavier_twin.tap.middleware").Tap
        assert inspect.isclass(imported)
        app.add_middleware(imported)
    return app


class Tapped:
    """A running engine with a tap in it, and what it wrote."""

    def __init__(self, running: Running, output: Path) -> None:
        self.url = running.url
        self._output = output

    def post(self, **more: Any) -> httpx.Response:
        asked = {"model": "base", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5, **more}
        return httpx.post(f"{self.url}/v1/chat/completions", json=asked, timeout=20.0)

    @property
    def text(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def records(self, kind: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.text.splitlines() if line.endswith("}")]
        return [record for record in found if record["kind"] == kind]

    def last(self, kind: str, wanted: Callable[[dict[str, Any]], Any] = bool) -> dict[str, Any]:
        """The last record of a kind, once it is as wanted."""
        return dict(until(lambda: [each for each in self.records(kind)[-1:] if wanted(each)], kind)[0])


def worker() -> int:
    """The second process, 0 if there is none."""
    threads = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = " ".join(children.read_text() for children in threads).split()
    named = [int(child) for child in children if b"--hand-over" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return named[-1] if named else 0


@contextmanager
def tapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Iterator[Tapped]:
    output = tmp_path / "records.jsonl"
    given = f"--output '{output}' --metrics-port 0 --block-tokens 4 --pool chat --pod vllm-0"
    monkeypatch.setenv(middleware.OPTIONS, " ".join((given, *options)))
    app = engine()
    with serving(app, lifespan="on") as running:
        stack: Any = app.middleware_stack
        while not isinstance(stack, middleware.Tap):
            stack = stack.app
        until(lambda: stack._worker is not None, "the second process starts")
        yield Tapped(running, output)


def test_a_stream_makes_records_and_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(engine(with_tap=False)) as bare:
        asked = {"model": "base", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5, "stream": True}
        expected = httpx.post(f"{bare.url}/v1/chat/completions", json=asked)
    with tapped(tmp_path, monkeypatch) as tap:
        got = tap.post(stream=True)
        assert (got.content, got.headers) == (expected.content, expected.headers)
        seen = tap.last("request_seen", lambda record: record.get("block_hashes"))
        finished = tap.last("request_finished", lambda record: record.get("block_hashes"))
        assert tuple(seen["block_hashes"]) == HASHER.hashes(token_ids(PROMPT))
        assert tuple(finished["block_hashes"]) == HASHER.hashes(token_ids(PROMPT + "xxxxx"))
        assert (seen["pool"], seen["pod"], seen["prompt_tokens"]) == ("chat", "vllm-0", len(PROMPT))
        assert (finished["id"], finished["output_tokens"], finished["finish_reason"]) == (seen["id"], 5, "length")
        assert 0.0 <= finished["ttft_seconds"] <= finished["e2e_seconds"]
        assert seen["time_seconds"] <= finished["time_seconds"]
        assert "canary" not in tap.text


def test_an_arrival_is_recorded_before_the_answer_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tapped(tmp_path, monkeypatch) as tap:

        async def ask() -> None:
            async with httpx.AsyncClient(timeout=20.0) as client:
                message = {"role": "user", "content": PROMPT}
                answer = client.post(f"{tap.url}/v1/chat/completions", json={"messages": [message], "wait": 1.5})
                under_way = asyncio.create_task(answer)
                await asyncio.to_thread(tap.last, "request_seen")
                assert not under_way.done()
                await under_way

        asyncio.run(ask())
        assert tap.last("request_finished").get("ttft_seconds") is None  # no stream


def test_a_client_that_leaves_is_an_abort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tapped(tmp_path, monkeypatch) as tap:
        asked = {"messages": [{"role": "user", "content": PROMPT}], "stream": True, "max_tokens": 1_000, "pause": 0.02}
        with httpx.stream("POST", f"{tap.url}/v1/chat/completions", json=asked) as answer:
            next(answer.iter_raw())
        finished = tap.last("request_finished")
        assert finished["finish_reason"] == "abort"
        assert finished["output_tokens"] < 1_000


@pytest.mark.parametrize("more", [{"fails": True}, {"stream": True, "breaks_after": 2, "pause": 0.01}])
def test_an_error_of_the_engine_passes_and_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    with tapped(tmp_path, monkeypatch) as tap:
        if "fails" in more:
            assert tap.post(wait=0.3, **more).status_code == 500
        else:
            with pytest.raises(httpx.RemoteProtocolError):
                tap.post(**more)
        finished = tap.last("request_finished")
        assert finished["finish_reason"] == "error"
        assert finished["output_tokens"] == more.get("breaks_after", 0)


def test_a_fault_of_the_tap_leaves_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError(PROMPT)

    with tapped(tmp_path, monkeypatch) as tap:
        for name in ("__init__", "body", "began", "head", "piece", "ended"):
            with monkeypatch.context() as patch:
                patch.setattr(Watch, name, fail)
                assert tap.post(stream=True).text.endswith("data: [DONE]\n\n")
                assert tap.post().json()["usage"]["completion_tokens"] == 5
    assert caplog.text.count("kavier-twin tap: a fault") == 1
    assert "canary" not in caplog.text


def test_wrong_options_leave_the_engine_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for options, expected in (("--mirror --output x", "--mirror: a middleware sees"), ("--output 'x", "No closing")):
        monkeypatch.setenv(middleware.OPTIONS, options)
        with serving(engine(), lifespan="on") as running:
            until(lambda expected=expected: expected in caplog.text, "the error is told")
            tap = Tapped(running, Path("gone"))
            assert tap.post(stream=True).status_code == 200
    assert "the options are in KAVIER_TWIN_TAP" in caplog.text


def test_a_second_process_that_did_not_start_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(middleware, "_AGAIN_SECONDS", 0.1)
    place = tmp_path / "mounted later"
    monkeypatch.setenv(middleware.OPTIONS, f"--output '{place}/records.jsonl' --metrics-port 0 --block-tokens 4")
    with serving(engine(), lifespan="on") as running:
        tap = Tapped(running, place / "records.jsonl")
        until(lambda: "no records are made" in caplog.text, "the error is told")
        place.mkdir()
        until(lambda: tap.post().status_code == 200 and tap.records("request_finished"), "records")
    assert caplog.text.count("no records are made") == 1


def test_the_engine_outlives_the_second_process_and_flushes_it_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    with tapped(tmp_path, monkeypatch) as tap:
        first = worker()
        os.kill(first, signal.SIGKILL)
        assert tap.post(stream=True).status_code == 200
        until(lambda: worker() not in (0, first), "another one")
        until(lambda: tap.post().status_code == 200 and tap.records("request_finished"), "records again")
        tap.last("request_seen", lambda record: record.get("block_hashes"))  # it knows where to ask for tokens
        assert tap.post(session_id="the-last").status_code == 200
    assert "another one is started" in caplog.text
    assert "the-last" in tap.text  # the server has ended, and so has the second process
    until(lambda: worker() == 0, "it ends")


def test_unrecorded_paths_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    with tapped(tmp_path, monkeypatch) as tap:
        httpx.post(f"{tap.url}/v1/audio/transcriptions")
        said = until(lambda: [line for line in capfd.readouterr().err.splitlines() if "generate" in line], "the log")
    assert "'/v1/audio/transcriptions'" in said[0]


# What vLLM has in its environment anyway, kafka-python apart; nothing that only the twin needs.
ABSENT = (
    *("numba", "scipy", "simpy", "apscheduler", "rich", "pandas", "sklearn"),
    *("pyarrow", "zmq", "ray"),
    *("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "urllib3", "h11"),
)
PROGRAM = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import kavier_twin.tap.middleware, kavier_twin.tap.worker
from kavier_twin.commands import main, tap
import argparse
parser = argparse.ArgumentParser()
tap.add_parser(parser.add_subparsers())
args = parser.parse_args(["tap", "--hand-over", "3", "--kafka", "127.0.0.1:9"])
print(tap._records(args).topic)
"""


def test_it_needs_nothing_of_the_twin_in_the_engines_environment() -> None:
    pytest.importorskip("kafka", reason="needs the extra kafka")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("llm-requests\n", 0), done.stderr
