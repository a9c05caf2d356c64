"""vLLM and the twin as processes, and their metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import urllib3
import yaml
from prometheus_client.parser import text_string_to_metric_families

from live import environment
from prometheus_server import free_address
from waiting import until

BLOCKS, BLOCK_TOKENS, SEQUENCES, BATCHED_TOKENS, LONGEST_TOKENS = 400, 32, 8, 1024, 4096
START_SECONDS = 300.0
MODEL = "tiny"


class Process:
    """A process that writes to a log and can be killed and started again."""

    def __init__(self, command: list[str | Path], log: Path, variables: dict[str, str] | None = None) -> None:
        self.log = log
        self._command, self._variables = command, variables or {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self._variables},
                start_new_session=True,  # so that a kill reaches vLLM's engine process too
            )

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """`kill -9` of the process and of all that it started."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(60)

    def _end(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._process.wait(60)

    def said(self) -> str:
        return self.log.read_text(errors="replace")


class Vllm(Process):
    """`vllm serve` on the CPU, with KV events."""

    def __init__(self, pod: str, model: Path, log: Path) -> None:
        self.pod = pod
        self.address, self.events, self.replay = free_address(), free_address(), free_address()
        self.url = f"http://{self.address}"
        host, port = self.address.split(":")
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.events.rpartition(':')[2]}",
            "replay_endpoint": f"tcp://*:{self.replay.rpartition(':')[2]}",
            "topic": f"kv@{pod}@{MODEL}",
        }
        options = {
            "--host": host,
            "--port": port,
            "--served-model-name": MODEL,
            "--load-format": "dummy",
            "--dtype": "float32",
            "--max-model-len": LONGEST_TOKENS,
            "--block-size": BLOCK_TOKENS,
            "--num-gpu-blocks-override": BLOCKS,
            "--max-num-seqs": SEQUENCES,
            "--max-num-batched-tokens": BATCHED_TOKENS,
            "--kv-events-config": json.dumps(events),
        }
        flags = ["--enable-prompt-tokens-details", "--enable-prefix-caching", "--enforce-eager"]
        variables = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "DEVICE_TIME": "1",
        }
        given = [str(word) for pair in options.items() for word in pair]
        super().__init__(
            [environment.place() / "bin" / "vllm", "serve", model, *given, *flags],
            log,
            {**variables, "PATH": f"{environment.place() / 'bin'}{os.pathsep}{os.environ['PATH']}"},
        )

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.runs, self.said()[-5000:]
            return answers(f"{self.url}/health")

        until(ready, f"vLLM starts: {self.log}", patience_seconds=START_SECONDS)

    def load(self) -> tuple[float, float]:
        """Requests waiting and running, as its gauges have them."""
        found = metrics(f"{self.url}/metrics")
        return found["vllm:num_requests_waiting"], found["vllm:num_requests_running"]


class Twin(Process):
    """`kavier-twin run` with a settings file and checkpoints."""

    def __init__(self, directory: Path, sources: list[dict[str, Any]], **settings: Any) -> None:
        self.address = free_address()
        self.url = f"http://{self.address}"
        engine = {
            "num_gpu_blocks": BLOCKS,
            "block_size": BLOCK_TOKENS,
            "max_num_seqs": SEQUENCES,
            "max_num_batched_tokens": BATCHED_TOKENS,
            "max_model_len": LONGEST_TOKENS,
        }
        content = {
            "pool": "chat",
            "fleet": {"engine": engine},
            "mirror": {"calibrate_after_requests": 60, "recalibrate_every_requests": 200},
            "sources": sources,
            "forecast": {
                "every_seconds": 10,
                "horizons_seconds": [60],
                "scenarios": 5,
                "workers": 1,
                "policies": [{"name": "today"}],
                "slos": [{"name": "fast", "metric": "ttft_p99_seconds", "threshold": 1.5}],
            },
            "http": {"port": int(self.address.rpartition(":")[2])},
            "checkpoints": {"directory": "state", "every_seconds": 5},
            **settings,
        }
        (directory / "state").mkdir(parents=True)
        file = directory / "twin.yaml"
        file.write_text(yaml.safe_dump(content))
        program = [sys.executable, "-m", "kavier_twin.commands.main"]
        super().__init__([*program, "run", "--config", file], directory / "twin.log")

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.runs, self.said()[-5000:]
            return answers(f"{self.url}/readyz")

        until(ready, f"the twin is ready: {self.log}", patience_seconds=START_SECONDS)

    def get(self, path: str) -> dict[str, Any]:
        """The only pool's part of an answer of the API."""
        answer = urllib3.request("GET", f"{self.url}{path}", timeout=20.0, retries=False)
        assert answer.status == 200, answer.data
        (pool,) = answer.json()["pools"]
        return dict(pool)

    def metrics(self) -> dict[str, float]:
        return metrics(f"{self.url}/metrics")


def answers(url: str) -> bool:
    """Whether it answers 200."""
    try:
        return urllib3.request("GET", url, timeout=5.0, retries=False).status == 200
    except urllib3.exceptions.HTTPError:
        return False


def metrics(url: str) -> dict[str, float]:
    """The sums of a page's series by name, and its single series by name and labels without pool (`name{kpi="x"}`)."""
    answer = urllib3.request("GET", url, timeout=20.0, retries=False)
    assert answer.status == 200, answer.data
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.data.decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()) if name != "pool")
            for name in {sample.name, f"{sample.name}{{{labels}}}"}:
                found[name] = found.get(name, 0.0) + sample.value
    return found
