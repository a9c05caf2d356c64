"""A real Prometheus server, a VictoriaMetrics, an Alertmanager, and recorded `/metrics` for it to read."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import urllib3
import yaml

from real_parts import alertmanager, prometheus, promtool, victoria_metrics
from waiting import wait_until


class RealPrometheus:
    """The server as a child process, with its data in a directory that outlives it."""

    def __init__(
        self, directory: Path, scrape_configs: Iterable[Mapping[str, Any]] = (), web: Any = None, **settings: Any
    ) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.address = free_address()
        self.url = f"http://{self.address}"
        self._settings = directory / "prometheus.yml"
        self._settings.write_text(yaml.safe_dump({"scrape_configs": list(scrape_configs), **settings}))
        self._web = directory / "web.yml"
        self._web.write_text(yaml.safe_dump(web or {}))
        self._process: subprocess.Popen[bytes] | None = None

    def backfill(self, exposition: str) -> None:
        """Store samples with their own times, given in the OpenMetrics text format. The server must not run."""
        page = self.directory / "backfill.om"
        page.write_text(exposition)
        subprocess.run(
            [promtool(), "tsdb", "create-blocks-from", "openmetrics", page, self.data],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def start(self) -> None:
        """Raises AssertionError where the server does not listen within 30 s."""
        with (self.directory / "prometheus.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    prometheus(),
                    f"--config.file={self._settings}",
                    f"--web.config.file={self._web}",
                    f"--web.listen-address={self.address}",
                    f"--storage.tsdb.path={self.data}",
                    "--storage.tsdb.retention.time=100y",  # recordings are old
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        host, port = self.address.split(":")
        wait_until(lambda: _listens(host, int(port)), 30.0)

    def suspend(self) -> None:
        """Let it answer nothing, while connections to it are still made."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(30)
            self._process = None


class RealVictoriaMetrics:
    """A single-node VictoriaMetrics, which scrapes as Prometheus does, as a child process."""

    def __init__(self, directory: Path, scrape_configs: Iterable[Mapping[str, Any]]) -> None:
        self._directory = directory
        self._settings = directory / "scrape.yml"
        self._settings.write_text(yaml.safe_dump({"scrape_configs": list(scrape_configs)}))
        self.address = free_address()
        self.url = f"http://{self.address}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises AssertionError where it does not listen within 30 s."""
        command = [
            victoria_metrics(),
            f"-promscrape.config={self._settings}",
            f"-storageDataPath={self._directory / 'data'}",
            f"-httpListenAddr={self.address}",
        ]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        host, port = self.address.split(":")
        wait_until(lambda: _listens(host, int(port)), 30.0)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None


class RealAlertmanager:
    """Prometheus' Alertmanager as a child process."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self._directory = directory / "alertmanager"
        self._directory.mkdir()
        self._settings = self._directory / "alertmanager.yml"
        self._settings.write_text(yaml.safe_dump(dict(settings)))
        self.address = free_address()
        self.url = f"http://{self.address}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises AssertionError where it does not listen within 30 s."""
        command = [
            alertmanager(),
            f"--config.file={self._settings}",
            f"--storage.path={self._directory}",
            f"--web.listen-address={self.address}",
            "--cluster.listen-address=",
        ]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        host, port = self.address.split(":")
        wait_until(lambda: _listens(host, int(port)), 30.0)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None


def free_address() -> str:
    """HOST:PORT of this machine where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


class Pages:
    """An HTTP server that answers every GET with what `page` gives for its path: status, content type and body.

    A redirect's body is where it points to.
    """

    def __init__(self, page: Callable[[str, Mapping[str, str]], tuple[int, str, bytes]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                self.rfile.read(length)
                status, kind, body = page(self.path, dict(self.headers.items()))
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                if 300 <= status < 400 and body:
                    self.send_header("Location", body.decode())
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.address}"
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def openmetrics(scrapes: Iterable[tuple[float, str]], labels: Mapping[str, str]) -> str:
    """Recorded `/metrics` texts as one page with the time of each scrape, as `promtool` takes it.

    A page has each series' samples together; types are left out, under which any name is allowed.
    """
    attached = ",".join(f'{name}="{value}"' for name, value in labels.items())
    series: dict[str, list[str]] = {}
    for at, text in scrapes:
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                series.setdefault(name, []).append(f"{value} {at:.3f}")
    lines = []
    for name, samples in series.items():
        labelled = f"{name[:-1]},{attached}}}" if name.endswith("}") else f"{name}{{{attached}}}"
        lines += [f"{labelled} {sample}" for sample in samples]
    return "\n".join([*lines, "# EOF", ""])


def _listens(host: str, port: int) -> bool:
    try:
        return urllib3.request("GET", f"http://{host}:{port}/-/ready", retries=False, timeout=1.0).status != 503
    except urllib3.exceptions.HTTPError:
        with socket.socket() as probe:  # TLS, perhaps
            probe.settimeout(1.0)
            return False if probe.connect_ex((host, port)) else _speaks_tls(host, port)


def _speaks_tls(host: str, port: int) -> bool:
    try:
        url = f"https://{host}:{port}/-/ready"
        with urllib3.PoolManager(cert_reqs="CERT_NONE") as pool:
            return pool.request("GET", url, retries=False, timeout=1.0).status != 503
    except urllib3.exceptions.HTTPError:
        return False
