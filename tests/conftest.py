"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real data: `KAVIER_SHARED_DATA`, or `../shared/data` beside the repository.

    Most of it may not be copied into the repository, so a test that asks for it skips where it is not there.
    """
    named = os.environ.get("KAVIER_SHARED_DATA")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real data is missing: {path} is no directory; set KAVIER_SHARED_DATA")
    return path
