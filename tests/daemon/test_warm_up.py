from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from threading import Event
from types import ModuleType

import pytest

from daemon.test_daemon import events, get, recorded, running, until
from kavier_twin.daemon import warm_up
from kavier_twin.daemon.warm_up import compiled, remove_old_caches
from memory_source import MemorySource

DAY_SECONDS = 86_400.0


def test_progress_is_told_while_a_module_is_still_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = ModuleType("kavier_twin.growing")

    def is_kernel(found: object) -> bool:
        setattr(growing, f"name_{len(vars(growing))}", found)
        return False

    monkeypatch.setitem(sys.modules, growing.__name__, growing)
    monkeypatch.setattr(warm_up, "_is_kernel", is_kernel)
    assert compiled().kernels == 0


def test_all_is_served_while_kernels_are_made_ready_and_nothing_is_lost() -> None:
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


def test_kernels_are_counted() -> None:
    found = compiled()
    assert 200 < found.kernels < 1_000
    assert 0 <= found.compiled <= found.kernels


def cache(directory: Path, number: int, unused_days: float) -> Path:
    path = directory / f"kernels-{number:016x}"
    (path / "kernels_0").mkdir(parents=True)
    (path / "kernels_0" / "a.nbc").write_bytes(b"code")
    used = time.time() - unused_days * DAY_SECONDS
    os.utime(path, (used, used))
    return path


def test_caches_of_other_versions_are_removed_when_old_or_many(tmp_path: Path) -> None:
    ours = cache(tmp_path, 0, 50.0)
    old, fifth, fourth, third, second = (cache(tmp_path, n, days) for n, days in enumerate((31, 9, 8, 7, 6), 1))
    (tmp_path / "kafka-4.1.1").mkdir()
    remove_old_caches(ours)
    assert not old.exists()
    assert not fifth.exists()
    assert not fourth.exists()
    assert third.exists()
    assert second.exists()
    assert (ours / "kernels_0" / "a.nbc").exists()  # used now, whatever its age was
    assert (tmp_path / "kafka-4.1.1").exists()


def test_caches_that_may_be_in_use_stay(tmp_path: Path) -> None:
    ours, *others = (cache(tmp_path, number, 0.1 * number) for number in range(8))
    remove_old_caches(ours)
    assert all(path.exists() for path in others)


def test_no_other_folder_is_touched(tmp_path: Path) -> None:
    other = cache(tmp_path, 1, 90.0)
    remove_old_caches(tmp_path / "elsewhere")  # where no cache can be written, numba has none of ours
    assert other.exists()
