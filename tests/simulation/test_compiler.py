"""Libraries of kernels are compiled once for each version, in other processes, and shared by all that use it."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import kavier_twin
from kavier_twin.forecast.drawing import DRAWING
from kavier_twin.simulation.compiler import libraries, unit
from kavier_twin.simulation.kernels import ENGINE, FLEET, POLICIES, TIERS
from simulation import tiny_kernels
from simulation.tiny_kernels import FIRST, SECOND, double, halve

PACKAGE = Path(kavier_twin.__file__).parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and libraries that are not loaded."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    for library in (FIRST, SECOND):
        monkeypatch.setattr(library, "is_loaded", False)
        for kernel in library.entries:
            kernel._reset_overloads()
            kernel._can_compile = True
    return tmp_path / "cache"


def test_a_library_is_compiled_once_and_then_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = libraries.compiled()
    numbers = np.arange(3)
    assert double(numbers) == 6
    assert numbers.tolist() == [0, 2, 4]
    assert libraries.compiled() == (*before, "first")
    assert [path.name for path in cache.iterdir()] == [libraries.cached_file(FIRST).name]
    FIRST.is_loaded = False
    FIRST.load()
    assert libraries.compiled() == (*before, "first")


def test_kernels_of_another_library_are_called_once_it_is_loaded() -> None:
    with pytest.raises(RuntimeError, match=r"tiny_kernels\.half is called, but its library is not loaded"):
        halve(10)
    SECOND.load()
    assert halve(10) == 5


def test_what_does_not_fit_is_refused_by_name() -> None:
    for _ in range(2):  # before it is loaded and after
        with pytest.raises(
            TypeError, match=r"double takes no numbers of type array\(float64, 1d, C\): it is to be arr"
        ):
            double(np.zeros(2))
    assert halve.__doc__


def test_numbers_are_converted() -> None:
    SECOND.load()
    assert halve(np.int32(7)) == 3


def test_damaged_code_is_compiled_again(caplog: pytest.LogCaptureFixture) -> None:
    FIRST.load()
    libraries.cached_file(FIRST).write_bytes(b"damaged")
    FIRST.is_loaded = False
    FIRST.load()
    assert "cannot be read" in caplog.text
    assert isinstance(libraries._read(libraries.cached_file(FIRST)), unit.Code)


def test_without_a_cache_it_works_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file/cache"))
    assert double(np.arange(2)) == 2
    assert f"compiled kernels cannot be kept in {tmp_path}/file/cache (Not a directory)" in caplog.text


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/python"])
def test_where_no_process_can_compile_this_one_does(
    program: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    assert double(np.arange(2)) == 2
    assert "process" in caplog.text


def test_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    libraries.load(FIRST, SECOND)
    assert "compiling kernels: first, second" in caplog.text
    assert "kernels compiled: first, second, in " in caplog.text


def test_several_processes_that_want_the_same_compile_it_once(cache: Path) -> None:
    program = "from simulation.tiny_kernels import FIRST; from kavier_twin.simulation.compiler import libraries; "
    program += "FIRST.load(); print(len(libraries.compiled()))"
    command = [sys.executable, "-c", program]
    path = {"PYTHONPATH": ":".join(sys.path), "NUMBA_CACHE_DIR": str(cache)}
    processes = [subprocess.Popen(command, env=path, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate()[0].strip() for process in processes) == ["0", "0", "1"]
    assert [path.suffix for path in cache.iterdir()] == [".kernels"]


def test_code_is_named_by_what_it_follows_from_not_by_where_that_lies(tmp_path: Path) -> None:
    copied = shutil.copytree(PACKAGE, tmp_path / "elsewhere/kavier_twin", ignore=shutil.ignore_patterns("__pycache__"))
    program = "from kavier_twin.simulation.kernels import ENGINE; import kavier_twin; "
    program += "print(kavier_twin.__file__, ENGINE.digest)"

    def digest() -> str:
        path = {"PYTHONPATH": ":".join([str(copied.parent), *sys.path]), "HOME": str(tmp_path)}
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, env=path, cwd=tmp_path, check=True, capture_output=True, text=True)
        where, found = run.stdout.split()
        assert where.startswith(str(copied))
        return found

    assert digest() == ENGINE.digest
    source = copied / "simulation/kernels/cache/keys.py"
    source.write_text(source.read_text() + "\n# another version\n")
    assert digest() != ENGINE.digest


def test_each_kernel_is_compiled_for_one_set_of_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else constants, widths of integers and layouts of arrays multiply what a first start takes."""
    monkeypatch.undo()  # the cache of all tests
    libraries.load(ENGINE, FLEET, DRAWING, POLICIES, TIERS)
    twice = set()
    for library in (ENGINE, FLEET, DRAWING, POLICIES, TIERS):
        code = libraries._read(libraries.cached_file(library))
        assert code is not None
        assert len(code.functions) > 5
        twice |= {name.rpartition(".")[2] for name, count in Counter(code.functions).items() if count > 1}
    assert twice == {"bucket_of", "find", "remove"}  # of blocks and of what was evicted


def test_the_tiny_libraries_are_what_the_tests_take_them_for() -> None:
    assert {kernel.py_func.__name__ for kernel in FIRST.entries} == {"double", "halve"}
    assert SECOND.exports == [tiny_kernels.half]
