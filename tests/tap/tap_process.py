"""`kavier-twin tap` as a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import until


class TapProcess:
    """A running tap. `said` is what it wrote to standard output and error."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log
        found = until(self._address, f"the tap starts: {self.said}")
        self.url, self.metrics_url = found.groups()

    def _address(self) -> re.Match[str] | None:
        assert self.process.poll() is None, self.said
        return re.search(r"tap at (http\S+), metrics at (http\S+)\n", self.said)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def metrics(self) -> str:
        return str(urllib.request.urlopen(self.metrics_url, timeout=20).read().decode())

    def counted(self, line: str) -> None:
        """Wait until the metrics have this line."""
        until(lambda: f"\nkavier_twin_tap_{line}\n" in self.metrics(), line)

    def metric(self, name: str) -> float:
        """The value of a series now; 0 where there is none."""
        found = re.search(rf"^kavier_twin_tap_{re.escape(name)} (\S+)$", self.metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def worker(self) -> int:
        """The process that makes records, 0 if there is none."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = " ".join(children.read_text() for children in threads).split()
        named = [
            int(child) for child in children if b"kavier_twin.tap\0" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        return named[-1] if named else 0

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, give the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def tap_process(log: Path, *options: str | Path, environment: dict[str, str] | None = None) -> Iterator[TapProcess]:
    """Run a tap that writes what it says to `log`."""
    command = [sys.executable, "-m", "kavier_twin.commands.main", "tap", "--port", "0", "--metrics-port", "0"]
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, *map(str, options)], stdout=said, stderr=said, env={**os.environ, **(environment or {})}
        )
        try:
            yield TapProcess(process, log)
        finally:
            process.kill()
            process.wait(30)
