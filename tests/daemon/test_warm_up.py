from __future__ import annotations

import os
import re
import time
from pathlib import Path
from threading import Event

from daemon.test_daemon import events, get, recorded, running, until
from kavier_twin.daemon.warm_up import compiled, make_ready, remove_old_libraries
from kavier_twin.serve.models import Compiling
from memory_source import MemorySource

DAY_SECONDS = 86_400.0


def test_all_is_served_while_kernels_are_made_ready_and_nothing_is_lost() -> None:
    make_ready()
    source, ready = MemorySource(), Event()
    for event in events(recorded(20)):
        source.push(event)
    source.end()
    try:
        with running(source, prepare=lambda: ready.wait(60.0) and None) as daemon:
            assert daemon.http is not None
            url = daemon.http.url
            assert get(f"{url}/healthz")[0] == 200
            status, why = get(f"{url}/readyz")
            assert status == 503
            assert re.fullmatch(r"not ready: pool chat: compiling kernels, \d+ of \d+\n", why)
            for path in ("/", "/metrics", "/v1/state", "/v1/fidelity", "/v1/forecast", "/v1/history", "/v1/scores"):
                assert get(url + path)[0] == 200, path
            assert daemon.preparing
            assert daemon.view.records.get("accepted", 0) == 0
            ready.set()
            until(lambda: daemon.drained and daemon.view.finished_requests == 20, "all requests followed")
            assert daemon.view.compiling is None
            assert "compiling" not in get(f"{url}/readyz")[1]
    finally:
        ready.set()


def test_libraries_are_counted() -> None:
    make_ready()
    assert compiled() == Compiling(3, 3)


def test_libraries_not_used_for_a_month_are_removed(tmp_path: Path) -> None:
    for name, unused_days in (("engine", 31), ("fleet", 29), ("tiers", 0)):
        file = tmp_path / f"{name}-0123456789abcdef.kernels"
        file.write_bytes(b"code")
        os.utime(file, (time.time() - unused_days * DAY_SECONDS,) * 2)
    other = tmp_path / "notes.txt"
    other.touch()
    os.utime(other, (0.0, 0.0))
    remove_old_libraries(tmp_path)
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["fleet", "notes.txt", "tiers"]
    remove_old_libraries(tmp_path / "elsewhere")  # where no cache was written
