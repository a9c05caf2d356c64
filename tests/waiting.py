"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

PATIENCE_SECONDS = 60.0  # before a test fails: the machine may have much else to do


def until(condition: Callable[[], Any], what: str, *, patience_seconds: float = PATIENCE_SECONDS) -> Any:
    """What `condition` gives once it gives something."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    pytest.fail(f"waited in vain: {what}")


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
    """`until`, where the condition tells what is waited for."""
    until(condition, "it did not come to pass", patience_seconds=seconds)
