"""What a run says of its random examples is enough to repeat it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

TESTS = Path(__file__).parent
DRAWS = """
from hypothesis import given, strategies as st
import effort
@given(st.integers(0, 10**9))
@effort.examples(5)
def test_draws(number):
    print("drawn", number)
def test_throws():
    print("drawn", effort.dice().random())
"""


def test_the_example_that_failed_is_shown() -> None:
    @given(st.just("this one"))
    def fails(text: str) -> None:
        raise AssertionError

    with pytest.raises(AssertionError) as caught:
        fails()
    assert "this one" in "".join(caught.value.__notes__)


def test_the_seed_of_a_run_repeats_it_and_another_run_has_another(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(DRAWS)

    def drawn(*options: str) -> tuple[list[str], str]:
        plugins = ["-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider"]
        paths = ["-c", "/dev/null", "-o", f"pythonpath={TESTS}", str(tmp_path)]
        command = [sys.executable, "-m", "pytest", "-s", *plugins, *paths, *options]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # those take seconds to start
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout
        (seed,) = {word for word in said.split() if word.startswith("--hypothesis-seed=")}
        return [line for line in said.splitlines() if "drawn" in line], seed

    first, seed = drawn()
    assert len(first) >= 5
    assert drawn(seed) == (first, seed)
    other, other_seed = drawn()
    assert other_seed != seed
    assert other != first
