"""Every command that the documentation shows, executed: as it is written, with what its placeholders stand for.

`CHECKS` says how each kind is executed. What would take minutes, or needs a cluster, an engine or another machine, is
checked as far as this one goes; the check's description says how and why. A command that no entry covers fails.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

from deploy.helm_chart import CHART, ROOT, only, render
from documentation.commands import Command, documented, fences, of_the_help
from kafka_broker import SCRAM_PASSWORD, USER, Broker, OurBroker
from kavier_twin import __version__
from kavier_twin.commands import tap
from kavier_twin.commands.main import COMMANDS, main
from real_parts import curl, helm, prometheus, shell

pytestmark = pytest.mark.slow

PATIENCE_SECONDS = 300.0  # before a test fails: a kernel may have to be compiled first
RECORDINGS = ROOT / "tests/data/recordings"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REGISTRY = "registry.example/llm"
TOKEN = "token-of-the-test"


class World:
    """A directory with all the files that commands name, and what their placeholders stand for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._write_traces()
        self._write_settings()
        self.stands_for = {
            r"TRACE\b": "trace.jsonl",
            r"RECORDING_A|recordings/cached|monday(?= tuesday)": str(self._recording("chat-400")),
            r"RECORDING_B|recordings/uncached|tuesday": str(self._recording("chat-400-nocache")),
            r"recording/|recordings/monday": str(self._recording("chat-400")),
            r"golden/": f"{ROOT}/tests/data/golden/",
            r"WATTS\.csv": "watts.csv",
            r"FLEET\.yaml|\bf\.yaml": "fleet.yaml",
            r"\bDIR\b": "out",
            r"\$TOKEN": TOKEN,
        }

    def path(self, name: str) -> Path:
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        return path

    def take_files_of(self, page: str) -> None:
        """The files that a page gives the contents of, in blocks below a line that names them; a later one adds."""
        contents: dict[str, Any] = {}
        for fence in fences(ROOT / page) if page.endswith(".md") else ():
            named = re.search(r"`(\w+\.yaml)`[^`]*:$", fence.says)
            if fence.language == "yaml" and named:
                content = yaml.safe_load(fence.text)
                contents[named[1]] = {**contents.get(named[1], {}), **content} if isinstance(content, dict) else content
        for name, content in contents.items():
            if "sources" in content:
                content["http"] = {"port": 0}  # whatever port is free
            self.path(name).write_text(yaml.safe_dump(content))

    def _write_traces(self) -> None:
        requests = [
            {"kind": "request", "id": f"r{n}", "time_seconds": 1790000000.0 + n, "prompt_tokens": 900 + n}
            | {"output_tokens": 40 + n % 50, "block_tokens": 512, "block_hashes": [1 + n % 5, 100 + n]}
            for n in range(240)
        ]
        self.path("trace.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
        mooncake = [
            {"timestamp": 1000 * n, "input_length": 900, "output_length": 50, "hash_ids": [n % 5, 100 + n]}
            for n in range(500)
        ]
        self.path("mooncake.jsonl").write_text("".join(json.dumps(request) + "\n" for request in mooncake))
        azure = [f"2024-05-10 00:{n // 60:02}:{n % 60:02}.000000,{900 + n % 7},50\n" for n in range(500)]
        self.path("azure.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(azure))
        watts = "".join(f"{1790000000 + second},{300 + second % 7}\n" for second in range(240))
        self.path("watts.csv").write_text("time,watts\n" + watts)

    def _write_settings(self) -> None:
        engine = {"num_gpu_blocks": 2000, "max_num_seqs": 64}
        self.path("live.yaml").write_text(
            yaml.safe_dump(
                {
                    "fleet": {"engine": engine, "replicas": 2},
                    "mirror": {"calibrate_after_requests": 30},
                    "sources": [{"type": "trace_file", "path": "trace.jsonl"}],
                    "forecast": {"every_seconds": 10, "horizons_seconds": [10], "scenarios": 2, "workers": 1},
                    "http": {"port": 0, "token": {"file": "token"}},
                    "checkpoints": {"directory": "state", "every_seconds": 5},
                }
            )
        )
        self.path("policies.yaml").write_text("[{name: today}, {name: fp8, overrides: {kv_cache_dtype: fp8}}]")
        self.path("token").write_text(TOKEN)
        tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}
        self.path("Llama-3.1-8B/tokenizer.json").write_text(json.dumps(tokenizer))
        self.path("state/none").touch()
        self.take_files_of("docs/getting-started.md")

    def _recording(self, name: str) -> Path:
        """The first 200 requests of a recording."""
        directory = self.directory / name
        if not directory.exists():
            shutil.copytree(RECORDINGS / name, directory)
            requests = gzip.decompress((RECORDINGS / name / "requests.jsonl.gz").read_bytes()).splitlines(True)
            (directory / "requests.jsonl.gz").write_bytes(gzip.compress(b"".join(requests[:200])))
        return directory


class Here:
    """What a check may need, made when it is asked for."""

    def __init__(self, world: World, request: pytest.FixtureRequest) -> None:
        self.world = world
        self._request = request

    @property
    def daemon(self) -> str:
        """The address of a running daemon, host:port."""
        return str(self._request.getfixturevalue("daemon"))

    @property
    def kafka(self) -> str:
        """The address of a broker that has the topic."""
        broker: Broker = self._request.getfixturevalue("topic")
        return broker.address

    @property
    def kafka_with_password(self) -> str:
        """The address of its listener with TLS and SASL; the world gets what is needed to be let in."""
        self._request.getfixturevalue("topic")
        broker: OurBroker = self._request.getfixturevalue("real_kafka")
        shutil.copy(broker.certificate, self.world.path("ca.pem"))
        password = {"file": str(self.world.path("kafka-password"))}
        self.world.path("kafka-password").write_text(SCRAM_PASSWORD)
        sasl = {"mechanism": "SCRAM-SHA-512", "username": USER, "password": password}
        self.world.path("kafka.yaml").write_text(yaml.safe_dump({"tls": {"ca": "ca.pem"}, "sasl": sasl}))
        return broker.secure_address

    @property
    def data(self) -> Path:
        """Data that is not in the repository."""
        return Path(self._request.getfixturevalue("shared_data"))

    def filled(self, text: str) -> str:
        """A command with what its placeholders stand for."""
        for placeholder, value in self.world.stands_for.items():
            text = re.sub(placeholder, lambda _, value=value: value, text)
        if re.search(r"localhost:9469|127\.0\.0\.1:9469|twin:9469|twin\.example:9469|POD:9469|--url URL", text):
            text = re.sub(r"(?<=--url )(https?://[\w.]+:9469|URL)", f"http://{self.daemon}", text)
            text = re.sub(r"[\w.]+:9469", self.daemon, text)
        if "kafka:9093" in text:
            text = text.replace("kafka:9093", self.kafka_with_password)
        if re.search(r"kafka:9092|HOST:PORT", text):
            text = re.sub(r"kafka:9092|HOST:PORT", self.kafka, text)
        return text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("documented"))


@pytest.fixture(scope="module")
def topic(apache_kafka: Broker) -> Broker:
    """The broker, with the topic that the documentation names."""
    client = pytest.importorskip("kafka.admin").KafkaAdminClient(bootstrap_servers=apache_kafka.address)
    if "llm-requests" not in client.list_topics():
        client.create_topics({"llm-requests": {"num_partitions": 1, "replication_factor": 1}})
    client.close()
    return apache_kafka


@pytest.fixture(scope="module")
def daemon(world: World) -> Iterator[str]:
    """`kavier-twin run` on the trace: host:port, once it has forecast."""
    with started(world, ["run", "--config", "live.yaml"]) as process:
        address = process.said(r"http://(127\.0\.0\.1:\d+)")
        wait_for(lambda: urllib3.request("GET", f"http://{address}/readyz", retries=False).data == b"ready\n", process)
        yield address
        assert process.stopped() == 0, process.log()


class Started:
    """A process of the command line, with all that it said."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self._path = path

    def log(self) -> str:
        return self._path.read_text()

    def said(self, pattern: str) -> str:
        """The first group of what it says sooner or later."""
        wait_for(lambda: re.search(pattern, self.log()), self)
        found = re.search(pattern, self.log())
        assert found
        return found[1]

    def stopped(self) -> int:
        """The exit status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def started(world: World, words: list[str]) -> Iterator[Started]:
    path = world.path("log.txt" if words[0] == "run" else f"{words[0]}.txt")
    with path.open("wb") as log:
        command = [sys.executable, "-m", "kavier_twin.commands.main", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=world.directory, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Started(process, path)
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], Any], process: Started) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.process.poll() is None, process.log()
        assert time.monotonic() < deadline, process.log()
        time.sleep(0.2)


Check = Callable[[Command, Here], None]


def ran(command: Command, here: Here) -> None:
    """Run in this process, as the command line would: it must end with 0."""
    text = re.sub(r" *\[[^]]*\]", "", here.filled(command.text))  # options of a synopsis
    for option in re.findall(r"--[\w-]+", command.text):
        assert option in help_of(command.words[1:])
    words = shlex.split(text, comments=False)
    target = words[words.index(">") + 1] if ">" in words else None
    out = io.StringIO()
    with contextlib.chdir(here.world.directory), contextlib.redirect_stdout(out):
        assert status_of([word for word in words[1:] if word not in (">", target)]) == 0
    if target is not None:
        here.world.path(target).write_text(out.getvalue())


def ran_on_data(command: Command, here: Here) -> None:
    """The same on the tables of Kavier's paper, which are not ours to ship."""
    ran(command._replace(text=command.text.replace("DATA", str(here.data / "kavier"))), here)


def demo(command: Command, here: Here) -> None:
    """Run once and fast: it would play for a minute and then serve until it is told to end."""
    ran(command._replace(text="kavier-twin demo --once --no-ui --speed 1000 --port 0"), here)


def checked(command: Command, here: Here) -> None:
    """`run --check` on the settings file: it must be fine. `ran_until_stopped` starts one for real."""
    text = command.text.replace("FILE", "twin.yaml").replace(" --check", "") + " --check"
    here.world.take_files_of(command.page)
    ran(command._replace(text=text), here)


def ran_until_stopped(command: Command, here: Here) -> None:
    """Run as a process until it says that it does its work, then told to end: it must end well."""
    words = shlex.split(here.filled(command.text))[1:]
    if words[0] == "run":
        here.world.take_files_of(command.page)
    if "--metrics-port" in words:
        with socket.create_server(("127.0.0.1", 0)) as free:
            words[words.index("--metrics-port") + 1] = str(free.getsockname()[1])
    if words[0] == "tap":
        words += ["--port", "0", "--metrics-port", "0"]
    says = {"run": r"(serving metrics)", "replay": r"(round 1)", "tap": r"(tap at)"}[words[0]]
    with started(here.world, words) as process:
        process.said(says)
        assert process.stopped() == 0, process.log()
        assert "Traceback" not in process.log()


def ran_by_curl(command: Command, here: Here) -> None:
    """Asked of the running daemon: it must answer with success."""
    words = [curl(), *shlex.split(here.filled(command.text))[1:], "-sS", "--fail-with-body"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def asked(command: Command, here: Here) -> None:
    """Run, of the running daemon; without an address it would ask one on the usual port."""
    elsewhere = re.search(r"(--url|--db) (?!.*\])", command.text)
    ran(command if elsewhere else command._replace(text=f"{command.text} --url URL"), here)


def named(command: Command, here: Here) -> None:
    """A mention of a command: there is one of this name."""
    assert command.mention
    assert command.words[1].replace("-", "_") in COMMANDS


def parsed(command: Command, here: Here) -> None:
    """Its options are known. It is not run: minutes, or a file of the reader's; tests/commands runs the like."""
    words = shlex.split(command.text)[1:]
    for option in re.findall(r"--[\w-]+", command.text):
        assert option in help_of(words)


def benchmark(command: Command, here: Here) -> None:
    """There is one of this name that can be started. They take up to minutes, on a machine that does nothing else."""
    path = ROOT / "benchmarks" / f"{command.words[2].removeprefix('benchmarks.')}.py"
    assert '__name__ == "__main__"' in path.read_text()


def installs(command: Command, here: Here) -> None:
    """Extras and paths exist. CI installs the package in a new environment; this one has it already."""
    named_extras = [extra for group in re.findall(r"\[([\w,-]+)\]", command.text) for extra in group.split(",")]
    assert set(named_extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert "kavier-twin" in command.text or re.search(r" '?\.", command.text)


def of_ci(command: Command, here: Here) -> None:
    """CI's own stages, which run this very test among others: the tool is a dependency, the path exists."""
    words = [word for word in shlex.split(command.text) if "=" not in word]
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[0] not in (".", "python", "python3"):
        tools = {"lint-imports": "import-linter"}
        tool = tools.get(words[0], words[0]).removeprefix(".venv/bin/")
        assert any(line.startswith(tool) for line in PROJECT["project"]["optional-dependencies"]["dev"])
    if "-m" in words and words[0] == "pytest":
        (marker,) = re.findall(r"\w+$", words[words.index("-m") + 1])
        assert any(line.startswith(marker) for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"])
    for word in words[1:]:
        if "/" in word and not word.startswith(".venv"):
            assert (ROOT / word).exists()


def generates(command: Command, here: Here) -> None:
    """The module is there and its page too; that they agree is a test of its own beside each."""
    words = command.words
    assert importlib.util.find_spec(words[words.index("-m") + 1])
    assert (ROOT / words[-1]).is_file()


def made(command: Command, here: Here) -> None:
    """Run by a shell in the directory."""
    subprocess.run([shell(), "-c", command.text], cwd=here.world.directory, check=True)


def rendered(command: Command, here: Here) -> None:
    """`helm template` with the same arguments, as there is no cluster; tests/deploy checks what is rendered."""
    here.world.take_files_of(command.page)
    words = shlex.split(command.text.replace("REGISTRY", REGISTRY))
    options = [word for word in words[3:] if word not in ("...", "--reuse-values", "helm/kavier-twin")]
    assert words[2] == "twin"
    files = [str(ROOT / word) if word.startswith("helm/") else word for word in options]
    with contextlib.chdir(here.world.directory):
        pod = only(render(*files, release=words[2]), "StatefulSet")["spec"]["template"]["spec"]
    if "REGISTRY" in command.text:
        assert pod["containers"][0]["image"] == f"{REGISTRY}/kavier-twin:{__version__}"


def helm_test(command: Command, here: Here) -> None:
    """The chart has a test; tests/deploy/test_live.py runs its script against a live twin."""
    (pod,) = (found for found in render() if found["kind"] == "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"


def helm_shows(command: Command, here: Here) -> None:
    """Run."""
    done = subprocess.run([helm(), *command.words[1:], CHART], capture_output=True, text=True, check=True)
    assert "settings:" in done.stdout


def names_what_is_rendered(command: Command, here: Here) -> None:
    """What kubectl is asked for is in the manifests of the chart, as there is no cluster."""
    manifests = render()
    for kind, name in re.findall(r"(svc|statefulset)/([\w-]+)", command.text):
        found = only(manifests, {"svc": "Service", "statefulset": "StatefulSet"}[kind])
        assert found["metadata"]["name"] == name
    for port in re.findall(r"\d+:(\d+)$|svc/[\w-]+ (\d+)$", command.text):
        assert int(port[0] or port[1]) in [entry["port"] for entry in only(manifests, "Service")["spec"]["ports"]]
    for key, value in re.findall(r"-l ([\w./-]+)=([\w-]+)", command.text):
        pod = only(manifests, "StatefulSet")["spec"]["template"]
        assert pod["metadata"]["labels"][key] == value


def makes_the_secret_that_the_sample_names(command: Command, here: Here) -> None:
    """The name and the keys are those that the sample's settings read."""
    sample = yaml.safe_load((ROOT / command.page).read_text())
    name = command.words[command.words.index("generic") + 1]
    (volume,) = (volume for volume, secret in sample["secrets"].items() if secret == name)
    for key in re.findall(r"--from-literal=([\w.]+)=|--from-file=([\w.]+)", command.text):
        assert f"/run/secrets/{volume}/{''.join(key)}" in (ROOT / command.page).read_text()


def somebody_elses(command: Command, here: Here) -> None:
    """Names the reader's own Service: only the form can be checked."""
    assert re.fullmatch(r"kubectl( -n \w+)? port-forward svc/[\w-]+ \d+:\d+", command.text)


def of_another_program(command: Command, here: Here) -> None:
    """Its options are given in the form that it takes. tests/live starts vLLM and Prometheus with the like."""
    words = shlex.split(command.text)
    if "--kv-events-config" in words:
        events = json.loads(words[words.index("--kv-events-config") + 1])
        assert events.keys() == {"enable_kv_cache_events", "publisher", "endpoint", "replay_endpoint", "topic"}
    elif words[0] == "prometheus":
        done = subprocess.run([prometheus(), "--help"], capture_output=True, text=True, check=False)
        for option in re.findall(r"--[\w.-]+", command.text):
            assert option in done.stdout + done.stderr
    else:
        assert int(words[words.index("--partitions") + 1]) > 0
        assert re.fullmatch(r"retention\.ms=\d+", words[words.index("--config") + 1])


def docker(command: Command, here: Here) -> None:
    """Files and version are right. There may be no engine: tests/deploy goes through the image's steps and holds the
    compose file against the specification."""
    words = command.words
    if words[1] in ("build", "compose"):
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    for version in re.findall(r"REGISTRY/kavier-twin(:?\S*)", command.text):
        assert version == f":{__version__}"


# How each is checked, by what it begins with (a regular expression); the first that fits.
def serves_with_the_tap(command: Command, here: Here) -> None:
    """The options hold, and the class is one. tests/tap/test_middleware.py loads it into a server as vLLM does."""
    given, *words = shlex.split(command.text)
    name, _, options = given.partition("=")
    module, _, attribute = words[words.index("--middleware") + 1].rpartition(".")
    imported = importlib.import_module(module)
    assert name == imported.OPTIONS
    assert isinstance(getattr(imported, attribute), type)
    parser = argparse.ArgumentParser()
    tap.add_parser(parser.add_subparsers())
    assert tap._records(parser.parse_args(["tap", "--hand-over", "3", *shlex.split(options)])).kafka


CHECKS: list[tuple[str, Check]] = [
    (r"(\.venv/bin/)?kavier-twin demo( --once.*)?$", demo),
    (r"kavier-twin( \w+)? --(help|version)$", ran),
    (r"kavier-twin accuracy recordings/monday", ran),
    (r"kavier-twin mirror ", parsed),
    (r"kavier-twin (doctor|init)", parsed),
    (r"kavier-twin accuracy( \.\./.*)?$", parsed),
    (r"kavier-twin (scores|whatif .*--token-file)", asked),
    (r"kavier-twin [\w-]+$", named),
    (r"kavier-twin kavier", ran_on_data),
    (r"kavier-twin run --config twin\.yaml$", ran_until_stopped),
    (r"kavier-twin run", checked),
    (r"kavier-twin (replay|tap)", ran_until_stopped),
    (r"kavier-twin (simulate|compare|capacity|misses|backtest|counterfactual|calibrate-power|schema)", ran),
    (r"python -m benchmarks\.", benchmark),
    (r"PYTHONPATH=tests python -m", generates),
    (r"python tests/", of_ci),
    (r"(\.venv/bin/)?pip install", installs),
    (r"(UPDATE_GOLDEN=1 |\.venv/bin/)?(pytest|ruff|mypy|lint-imports|bash|python3 -m venv|\.)( |$)", of_ci),
    (r"curl", ran_by_curl),
    (r"KAVIER_TWIN_TAP=", serves_with_the_tap),
    (r"PYTHONHASHSEED=0 vllm serve|kafka-topics\.sh|prometheus ", of_another_program),
    (r"mkdir", made),
    (r"docker", docker),
    (r"helm (install|upgrade)", rendered),
    (r"helm show", helm_shows),
    (r"helm .*test", helm_test),
    (r"kubectl -n monitoring port-forward", somebody_elses),
    (r"kubectl .*create secret", makes_the_secret_that_the_sample_names),
    (r"kubectl", names_what_is_rendered),
]


def check_of(command: Command) -> Check | None:
    return next((check for pattern, check in CHECKS if re.match(pattern, command.text)), None)


@pytest.mark.parametrize("command", documented(), ids=lambda command: f"{command.page}:{command.line}")
def test_it_works_as_written(command: Command, world: World, request: pytest.FixtureRequest) -> None:
    check = check_of(command)
    assert check is not None, f"{command.page}:{command.line}: nothing in CHECKS covers: {command.text}"
    check(command, Here(world, request))


def test_every_check_has_a_command() -> None:
    used = [check_of(command) for command in documented()]
    assert [pattern for pattern, check in CHECKS if check not in used] == []


def test_every_command_has_examples_below_its_help() -> None:
    shown = {command.words[1] for command in of_the_help()}
    assert {name.replace("_", "-") for name in COMMANDS} - shown == set()


def status_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def help_of(words: list[str]) -> str:
    """The help of a command, of the experiment where it has several."""
    told = io.StringIO()
    names = words[: 0 if words[0].startswith("-") else 2 if words[0] == "kavier" else 1]
    with contextlib.redirect_stdout(told):
        status_of([*names, "--help"])
    return told.getvalue()
